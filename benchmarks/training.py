"""The cost of data: images/s of complete training steps, compared with steps on a batch that is already on the device.

python benchmarks/training.py RECIPE [ART] [STEPS]
python benchmarks/training.py host RECIPE [ART]

`host` shows on any machine what a batch costs the processors: the milliseconds of a worker process for 512 pictures
and the operations that the process with the GPU starts. Their number does not depend on that of the pictures.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from paired_steps import Operations

from mos_cli.utils.quiet import quieten

if TYPE_CHECKING:
    from transformers import BatchEncoding

    from mos_cli.training.batches import Source


def seconds(step: Callable[[], object], steps: int, device: torch.device) -> float:
    """Mean time of a step, after three for warming up."""
    for _ in range(3):
        step()
    _wait(device)
    started = time.perf_counter()
    for _ in range(steps):
        step()
    _wait(device)
    return (time.perf_counter() - started) / steps


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def host(name: str, art: Path) -> None:
    """Prints a row for scenes and one for edits, medians of ten batches."""
    from mos_cli.datasets.tables import DataTable
    from mos_cli.towers.vision_language import load_understanding
    from mos_cli.training.recipe import load_recipe
    from mos_cli.training.references import find_autoencoder, find_understanding
    from mos_cli.training.run import find_sources
    from mos_cli.training.stages import curriculum

    recipe, device = load_recipe(name), torch.device("cpu")
    stage = curriculum(recipe).stages[-1]
    assert recipe.understanding is not None
    assert isinstance(stage.data, DataTable)
    understanding = load_understanding(find_understanding(recipe.understanding)[1])
    autoencoder = find_autoencoder(recipe.autoencoder, device)
    print("| pictures | worker, ms for 512 | operations of the process with the GPU |\n| --- | ---: | ---: |")
    for source in find_sources(stage.data, art, device):

        def pick(step: int, batch: int, source: "Source" = source) -> "tuple[Any, BatchEncoding]":
            picked = [source.pick(Random(f"{step}/{index}"), stage.canvas) for index in range(batch)]
            captions = [caption for _, caption in picked]
            tokens = understanding.prompt_tokenizer([""] * batch, captions)
            return source.collate([picture for picture, _ in picked]), tokens

        times = []
        for step in range(10):
            began = time.perf_counter()
            pick(step, 512)
            times.append(time.perf_counter() - began)
        pictures, tokens = pick(0, 8)
        with Operations() as operations:
            autoencoder.encode(source.draw(pictures, stage.canvas))
            if source.draw_before is not None:
                autoencoder.encode(source.draw_before(pictures, stage.canvas))
            understanding.states(tokens["input_ids"], tokens["attention_mask"])
        what = "scenes" if source.draw_before is None else "edits"
        print(f"| {what} | {1000 * statistics.median(times):.0f} | {operations.computing.total()} |")


def main() -> None:
    quieten()
    if sys.argv[1] == "host":
        from mos_cli.datasets.art.file import data_folder

        host(sys.argv[2], Path(sys.argv[3]) if len(sys.argv) > 3 else data_folder())
        return
    from mos_cli.datasets.art.file import data_folder
    from mos_cli.training.recipe import load_recipe
    from mos_cli.training.run import prepare

    recipe = load_recipe(sys.argv[1])
    art = Path(sys.argv[2]) if len(sys.argv) > 2 else data_folder()
    steps = int(sys.argv[3]) if len(sys.argv) > 3 else 20
    print("| stage | canvas | batch | whole step, images/s | fixed batch, images/s | ratio |\n" + "| --- " * 6 + "|")
    with tempfile.TemporaryDirectory() as folder:
        trainer = prepare(recipe, art, Path(folder))
        for stage in trainer.curriculum.stages:
            trainer.step = stage.first
            batches = trainer.batches.stream(stage.first)
            fixed = next(batches)
            pure = stage.batch / seconds(lambda batch=fixed: trainer.advance(batch), steps, trainer.device)
            trainer.step = stage.first
            whole = stage.batch / seconds(lambda source=batches: trainer.advance(next(source)), steps, trainer.device)
            print(f"| {stage.name} | {stage.canvas} | {stage.batch} | {whole:.0f} | {pure:.0f} | {whole / pure:.2f} |")


if __name__ == "__main__":
    main()
