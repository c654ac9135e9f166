"""The cost of data: images/s of complete training steps, compared with steps on a batch that is already on the device.

python benchmarks/training.py RECIPE [ART] [STEPS]
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mos_cli.utils.quiet import quieten


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


def main() -> None:
    quieten()
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
