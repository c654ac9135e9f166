"""What a training costs beside its arithmetic.

python benchmarks/training.py throughput|host|compile RECIPE [--art DIR] [--steps N]

`throughput` has images/s of complete steps, compared with steps on a batch that is already on the device.

`host` shows on any machine what a batch costs the processors, with one thread: the milliseconds of a worker process for
512 pictures, and of the process with the GPU the operations that it starts and its CPU time for a batch. That time is
measured with nearly no arithmetic in it: one small picture, and towers with as many layers as the real ones, a few
values wide. What depends on the number of pictures, taking over what a worker made, is measured with 512. Of Muon, and
of steps from the loss to the moving averages, only the operations are counted.

Batches and steps are computed, and replayed as CUDA graphs: then a replay itself, one call, does nothing here, and what
is left is what the host does around it. Three copies to the GPU for each batch are not counted on a CPU.

`compile` computes a step of scenes and one of edits, of the recipe's last stage. In a process of its own, beside a
training that is in an earlier stage, it fills the cache in which that training then finds its compiled steps.
"""

import argparse
import pickle
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from paired_steps import Operations

from mos_cli.datasets.art.file import data_folder
from mos_cli.utils.quiet import quieten

BATCH = 512


def seconds(step: Callable[[], object], steps: int, device: torch.device, warm_up: int) -> float:
    """Mean time of a step, after some for warming up."""
    for _ in range(warm_up):
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


def cpu_milliseconds(action: Callable[[], object], times: int) -> float:
    """The least of several calls, after three for warming up."""
    for _ in range(3):
        action()
    spent = []
    for _ in range(times):
        began = time.process_time()
        action()
        spent.append(1000 * (time.process_time() - began))
    return min(spent)


def narrow_tower(folder: Path, narrow: Path) -> None:
    """A language model with the layers, heads and tokenizer of the one in `folder`, a few values wide, at random."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(folder)
    config.hidden_size, config.intermediate_size = 2 * config.num_attention_heads, 32
    AutoModel.from_config(config).save_pretrained(narrow)
    for path in folder.iterdir():
        if path.suffix != ".safetensors" and not (narrow / path.name).exists():
            shutil.copy(path, narrow)


def host(name: str, art: Path) -> None:
    """Prints a row for scenes and one for edits, as far as the recipe has them, and one for Muon."""
    from mos_cli.datasets.scenes.compositor import Compositor
    from mos_cli.datasets.tables import DataTable
    from mos_cli.towers import efficientnet, image_encoder
    from mos_cli.towers.generation import GenerationTower
    from mos_cli.towers.vision_language import load_understanding
    from mos_cli.training import sources as training_sources
    from mos_cli.training.batches import Batch, Batches
    from mos_cli.training.ema import PowerEMA
    from mos_cli.training.graphs import WARM_UP, TrainingGraphs
    from mos_cli.training.objective import Objective
    from mos_cli.training.optimiser import build_optimisers, set_rates, start_states
    from mos_cli.training.picks import kind_of
    from mos_cli.training.recipe import load_recipe
    from mos_cli.training.references import find_autoencoder, find_understanding
    from mos_cli.training.stages import curriculum

    recipe, device = load_recipe(name), torch.device("cpu")
    plan = curriculum(recipe)
    assert recipe.understanding is not None
    data = plan.stages[0].data
    assert isinstance(data, DataTable)
    autoencoder = find_autoencoder(recipe.autoencoder, device)

    def small(sprites_VHW4: torch.Tensor, **_: bool) -> Compositor:
        """A compositor as on a GPU, of sprites of few pixels."""
        return Compositor(sprites_VHW4[:, ::16, ::16].contiguous())

    with ExitStack() as stack:
        narrow = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        narrow_tower(find_understanding(recipe.understanding)[1], narrow)
        understanding = load_understanding(narrow)
        stages = tuple((*shape, 8, count) for *shape, _, count in efficientnet.STAGES)
        for module in (efficientnet, image_encoder):
            stack.enter_context(patch.object(module, "STAGES", stages))
        stack.enter_context(patch.object(image_encoder, "SIDE", 32))
        stack.enter_context(patch.object(training_sources, "Compositor", small))
        stack.enter_context(patch("mos_cli.datasets.scenes.compositor._rows", lambda _: slice(None)))
        encoder = image_encoder.ImageEncoder(layers=understanding.layers)
        sources = dict(zip((False, True), training_sources.find_sources(data, art, device), strict=True))

        def batches(batch: int) -> Batches:
            stages = tuple(replace(stage, batch=batch, canvas=32) for stage in plan.stages)
            found = {(stage.name, edits): source for stage in stages for edits, source in sources.items()}
            whole = replace(plan, stages=stages)
            return Batches(whole, recipe.train, found, understanding, autoencoder, device, image_encoder=encoder)

        print(f"| what | a worker, ms for {BATCH} | operations | host, ms for a batch |")
        print("| --- | ---: | ---: | ---: |")
        made: list[tuple[str, Batch]] = []
        for what, edits in (("scenes", False), ("edits", True)):
            step = next((s for s in range(plan.steps) if kind_of(plan, recipe.train.seed, s)[1] == edits), None)
            if step is None:
                continue
            for way in ("computed", "replayed"):
                many, one = batches(BATCH), batches(1)
                if way == "replayed":
                    for each in (many, one):
                        each.replay(lambda _: Uncomputed(), print)
                worker = cpu_milliseconds(lambda many=many, step=step: many.picks[step], 5)
                handed = pickle.dumps(many.picks[step])
                taken = cpu_milliseconds(lambda handed=handed: pickle.loads(handed), 20)
                picked = one.picks[step]
                for _ in range(WARM_UP + 1):
                    batch = one.finish(picked)
                host = taken + cpu_milliseconds(lambda one=one, picked=picked: one.finish(picked), 100)
                with Operations() as operations:
                    one.finish(picked)
                print(f"| {what}, {way} | {worker:.0f} | {operations.computing.total()} | {host:.1f} |", flush=True)
            made.append((what, batch))
        widths = {"states_width": understanding.width, "image_state_widths": encoder.widths}
        tower = GenerationTower(**recipe.generation | widths)
        optimisers = build_optimisers(tower, capturable=True)
        start_states(optimisers)
        for parameter in tower.parameters():
            parameter.grad = torch.ones_like(parameter)
        with Operations() as operations:
            optimisers[0].step()
        print(f"| Muon | - | {operations.computing.total()} | - |")
        objective, weights = Objective(tower, recipe.train.epsilon), dict[str, torch.Tensor](tower.named_parameters())
        ema = PowerEMA(weights)

        def learn(batch: Batch, rates: Sequence[torch.Tensor]) -> torch.Tensor:
            """As `Trainer` does."""
            set_rates(optimisers, rates)
            loss, use_JM = objective(batch)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(tower.parameters(), recipe.train.clip)
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad()
            return torch.cat([loss.detach()[None], norm[None], use_JM.flatten()])

        for what, batch in made:
            for way, step in ("computed", learn), ("replayed", TrainingGraphs(learn, Uncomputed(), print)):
                for number in range(WARM_UP + 2):
                    with Operations() as operations:
                        step(batch, tuple(torch.full((), 1e-3) for _ in range(2)))
                        ema.update(weights, number + 1)
                print(f"| a step of {what}, {way} | - | {operations.computing.total()} | - |")


class Uncomputed:
    """A capture whose replays compute nothing: what is counted is what the host starts around them."""

    def warm_up(self, function: Callable[[], Any]) -> Any:
        return function()

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], object]]:
        from mos_cli.sampling.graphs import mapped

        return mapped(function(), torch.clone), lambda: None


def throughput(name: str, art: Path, steps: int) -> None:
    """Prints a row for each stage."""
    from mos_cli.training.recipe import load_recipe
    from mos_cli.training.run import prepare

    print("| stage | canvas | batch | whole step, images/s | fixed batch, images/s | ratio |\n" + "| --- " * 6 + "|")
    with tempfile.TemporaryDirectory() as folder:
        trainer = prepare(load_recipe(name), art, Path(folder))
        for stage in trainer.curriculum.stages:
            trainer.step = stage.first
            batches = trainer.batches.stream(stage.first)
            fixed = next(batches)
            # With graphs, until all kinds of steps of the stage are captured.
            device, warm_up = trainer.device, 3 if trainer.graphs is None else 24
            pure = stage.batch / seconds(lambda batch=fixed: trainer.advance(batch), steps, device, warm_up)
            # Not its first step, at which the graphs are freed.
            trainer.step = stage.first + 1
            whole = stage.batch / seconds(lambda data=batches: trainer.advance(next(data)), steps, device, warm_up)
            print(f"| {stage.name} | {stage.canvas} | {stage.batch} | {whole:.0f} | {pure:.0f} | {whole / pure:.2f} |")


def compile_last_stage(name: str, art: Path) -> None:
    """Prints how long the first step of each kind takes."""
    from mos_cli.training.picks import kind_of
    from mos_cli.training.recipe import load_recipe
    from mos_cli.training.run import prepare

    recipe = load_recipe(name)
    recipe = recipe.model_copy(update={"stages": recipe.stages[-1:]})
    with tempfile.TemporaryDirectory() as folder:
        trainer = prepare(recipe, art, Path(folder))
        plan, seed = trainer.curriculum, recipe.train.seed
        for what, edits in ("scenes", False), ("edits", True):
            step = next((step for step in range(plan.steps) if kind_of(plan, seed, step)[1] == edits), None)
            if step is None:
                continue
            batch, began = next(trainer.batches.stream(step)), time.perf_counter()
            trainer.step = step
            trainer.advance(batch)
            _wait(trainer.device)
            print(f"a first step of {what}: {time.perf_counter() - began:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("throughput", "host", "compile"))
    parser.add_argument("recipe")
    parser.add_argument("--art", type=Path, default=data_folder())
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed by `throughput` (20)")
    options = parser.parse_args()
    quieten()
    if options.what == "throughput":
        throughput(options.recipe, options.art, options.steps)
    else:
        {"host": host, "compile": compile_last_stage}[options.what](options.recipe, options.art)


if __name__ == "__main__":
    main()
