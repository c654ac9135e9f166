"""A sweep of the learning rates: short runs of one recipe with every pair of rates, on the same pictures in one order.

python benchmarks/rates.py RECIPE [--muon 5e-4,1e-3,2e-3] [--adamw 4e-4,8e-4] [--steps 60] [--stage NAME] [--art FOLDER]

All runs begin with the same weights. Of stages one is run, by default the first, and its own rates are replaced. A run
warms up for at most a fifth of its steps and lowers its rates as the recipe says. The table has the mean loss of the
last tenth of the steps, a row for each rate of Muon and a column for each of AdamW; the least is in bold, and a run
whose loss was not finite is "diverged". A short run favours higher rates than a long one. Nothing of the runs is kept.
"""

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mos_cli.utils.quiet import quieten

if TYPE_CHECKING:
    from mos_cli.training.loop import Trainer
    from mos_cli.training.recipe import TrainRecipe

CHECKED = 20
"""Steps after which a run that has diverged is ended."""


def short_recipe(name: str, steps: int, stage: str | None) -> "TrainRecipe":
    """A recipe as a run of `steps` steps of one stage, with the rates of [train]."""
    from mos_cli.training.recipe import load_recipe

    recipe = load_recipe(name)
    train = {"steps": None if recipe.stages else steps, "time": None, "warmup": min(recipe.train.warmup, steps // 5)}
    stages = []
    if recipe.stages:
        chosen = next((each for each in recipe.stages if stage in (None, each.name)), None)
        if chosen is None:
            raise SystemExit(f"error: --stage {stage}: {name} has {', '.join(each.name for each in recipe.stages)}")
        stages = [chosen.model_copy(update={"steps": steps, "muon_lr": None, "adamw_lr": None})]
    return recipe.model_copy(update={"stages": tuple(stages), "train": recipe.train.model_copy(update=train)})


def with_rates(recipe: "TrainRecipe", muon: float, adamw: float) -> "TrainRecipe":
    train = recipe.train.model_copy(update={"muon_lr": muon, "adamw_lr": adamw})
    return recipe.model_copy(update={"train": train})


def losses(trainer: "Trainer") -> list[float]:
    """The losses of all steps of a run, up to where they are no longer finite."""
    rows: list[torch.Tensor] = []
    for batch in trainer.batches.stream(0):
        rows.append(trainer.advance(batch)[0])
        if len(rows) % CHECKED == 0 and not rows[-1].isfinite():
            break
    return torch.stack(rows).tolist()


def sweep(recipe: "TrainRecipe", pairs: list[tuple[float, float]], art: Path) -> dict[tuple[float, float], list[float]]:
    """The losses of a run with each pair of rates, of Muon and of AdamW."""
    from mos_cli.training.launch import start_accelerator
    from mos_cli.training.loop import Trainer
    from mos_cli.training.run import prepare
    from mos_cli.training.stages import curriculum

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        batches = prepare(recipe, art, Path(folder) / "prepared").batches
        for number, pair in enumerate(pairs):
            one, place = with_rates(recipe, *pair), Path(folder) / str(number)
            batches.follow(curriculum(one))
            accelerator = start_accelerator(one.train, place, unused_parts=one.bundle.edits is not None)
            found[pair] = losses(Trainer(one, batches, place, accelerator))
            print(f"Muon {pair[0]:g}, AdamW {pair[1]:g}: {final(found[pair]):.4f}", file=sys.stderr, flush=True)
    return found


def final(run: list[float]) -> float:
    """The mean loss of the last tenth of a run."""
    last = run[-max(1, len(run) // 10) :]
    return sum(last) / len(last)


def table(found: dict[tuple[float, float], list[float]]) -> str:
    muons, adamws = (sorted({pair[place] for pair in found}) for place in (0, 1))
    ends = {pair: final(run) for pair, run in found.items()}
    least = min((end for end in ends.values() if math.isfinite(end)), default=math.nan)

    def cell(pair: tuple[float, float]) -> str:
        if not math.isfinite(end := ends[pair]):
            return "diverged"
        return f"**{end:.4f}**" if end == least else f"{end:.4f}"

    lines = [
        "| Muon \\ AdamW | " + " | ".join(f"{adamw:g}" for adamw in adamws) + " |",
        "| --- " * (1 + len(adamws)) + "|",
    ]
    lines += [f"| {muon:g} | " + " | ".join(cell((muon, adamw)) for adamw in adamws) + " |" for muon in muons]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    from mos_cli.datasets.art.file import data_folder

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--muon", default="5e-4,1e-3,2e-3", help="rates of Muon, joined by commas")
    parser.add_argument("--adamw", default="4e-4,8e-4", help="rates of AdamW, joined by commas")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--stage", help="the stage to run (the first)")
    parser.add_argument("--art", type=Path, help="folder of the art file")
    options = parser.parse_args(arguments)
    quieten()
    muons, adamws = ([float(rate) for rate in text.split(",")] for text in (options.muon, options.adamw))
    recipe = short_recipe(options.recipe, options.steps, options.stage)
    pairs = [(muon, adamw) for muon in muons for adamw in adamws]
    print(table(sweep(recipe, pairs, options.art or data_folder())))


if __name__ == "__main__":
    main()
