"""Guidance and steps swept over SceneBench or EditBench: what a setting costs, how often its pictures pass, and the
difference to the first setting on the same prompts and seeds.

python benchmarks/guidance.py [--suite scenes|edit] [--model NAME] [--limit N] [--art DIR] [--steps 10 8] [--cfg 3 2]
    [--interval 0:1 0.5:1] [--image-cfg 1 1.5]
"""

import argparse
import tempfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track

from mos_cli.bundles.bundle import edit_defaults, find_bundle
from mos_cli.cli.loading import load_with_progress
from mos_cli.cli.output import Report
from mos_cli.config.recipe import make_recipe
from mos_cli.config.settings import RunSettings, make_settings
from mos_cli.datasets.art.file import data_folder, load_art
from mos_cli.evaluation.edit_run import evaluate_edits
from mos_cli.evaluation.editbench import read_edit_bench
from mos_cli.evaluation.examine import Examiner, TrueScenes
from mos_cli.evaluation.judge import Judge, judge_folder
from mos_cli.evaluation.run import tensor_of
from mos_cli.evaluation.scenebench import CATEGORIES, read_bench
from mos_cli.inference.pipeline import MoSPipeline
from mos_cli.inference.requests import recipe_fields
from mos_cli.utils.quiet import quieten
from mos_cli.utils.threads import AdaptiveThreads

DRAWS = 10_000
"""Draws of the bootstrap."""

Found = tuple[list[bool], list[str]]
"""For each prompt whether its picture passes, and the cells of a row."""


def compared(passed: list[bool], first: list[bool]) -> str:
    """The difference of the shares that pass, and its 95 % interval by a paired bootstrap."""
    differences = np.array(passed, dtype=float) - np.array(first, dtype=float)
    draws = np.random.default_rng(0).choice(differences, (DRAWS, len(differences))).mean(axis=1)
    low, high = np.percentile(draws, (2.5, 97.5))
    return f"{differences.mean():+.3f} ({low:+.3f} to {high:+.3f})"


def scenes(pipeline: MoSPipeline, judge: Judge, true: TrueScenes, limit: int | None) -> Callable[..., Found]:
    entries, examiners = read_bench(limit), {}

    def evaluate(common: dict[str, Any], image_cfg: float) -> Found:
        examiner = examiners.setdefault(common["width"], Examiner(judge, true, entries, common["width"]))
        drawn = []
        for entry in entries:
            drawn.append(tensor_of(pipeline.draw(make_recipe(prompt=entry.prompt, seed=entry.seed, **common)).image))
        _, passed = examiner.examine(torch.stack(drawn))
        shares = []
        for category in (*CATEGORIES, None):
            of = [ok for ok, entry in zip(passed, entries, strict=True) if category in (entry.category, None)]
            shares.append(f"{sum(of) / len(of):.2f}")
        return passed, shares

    return evaluate


def edits(pipeline: MoSPipeline, judge: Judge, true: TrueScenes, limit: int | None) -> Callable[..., Found]:
    entries = read_edit_bench(limit)

    def evaluate(common: dict[str, Any], image_cfg: float) -> Found:
        with tempfile.TemporaryDirectory() as folder:
            found = evaluate_edits(pipeline, entries, judge, true, Path(folder), common, image_cfg, lambda *_: None)
        whole = found.scores[-1]
        nothing = next(one for one in found.scores if one.category == "nothing")
        cells = [f"{nothing.raw:.2f}", f"{whole.outside:.1f}", f"{found.no_op_error:.1f}", f"{whole.raw:.2f}"]
        return [verdict.passed for verdict in found.verdicts], cells

    return evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", choices=("scenes", "edit"), default="scenes")
    parser.add_argument("--model")
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--art", type=Path)
    parser.add_argument("--steps", type=int, nargs="+")
    parser.add_argument("--cfg", type=float, nargs="+")
    parser.add_argument("--interval", nargs="+", default=["0:1"])
    parser.add_argument("--image-cfg", type=float, nargs="+")
    arguments = parser.parse_args()
    quieten()
    settings = RunSettings(**make_settings(model=arguments.model).model_dump(exclude_none=True))
    bundle = find_bundle(settings.model)
    editing = arguments.suite == "edit"
    defaults = edit_defaults(bundle) if editing else bundle.index.defaults
    judge, true = Judge(judge_folder()), TrueScenes(load_art(arguments.art or data_folder()))
    common = recipe_fields(settings, bundle, defaults)
    common["width"], common["height"] = bundle.index.canvas.native
    pipeline = load_with_progress(bundle, settings, Report(), precision=common["precision"], quant=None)
    evaluate = (edits if editing else scenes)(pipeline, judge, true, arguments.limit)
    adapt_threads = AdaptiveThreads()

    headings = ["nothing changed", "dB outside", "no-op error, levels", "all"] if editing else [*CATEGORIES, "all"]
    print(f"{bundle.ref} ({bundle.hash[:10]}), {arguments.limit} of each category\n")
    print(f"| steps | cfg | between | image cfg | {' | '.join(headings)} | against the first row (95 % interval) |")
    print("| ---: " * (5 + len(headings)) + "|")
    image_cfgs = arguments.image_cfg or [edit_defaults(bundle).image_cfg if editing else 1.0]
    grid = product(arguments.interval, image_cfgs, arguments.steps or [defaults.steps], arguments.cfg or [defaults.cfg])
    first: list[bool] | None = None
    for interval, image_cfg, steps, cfg in track(list(grid), "sweeping", transient=True):
        adapt_threads()
        low, high = map(float, interval.split(":"))
        passed, cells = evaluate(common | {"steps": steps, "cfg": cfg, "cfg_interval": (low, high)}, image_cfg)
        first = first or passed
        row = [str(steps), f"{cfg:g}", f"{low:g} and {high:g}", f"{image_cfg:g}", *cells, compared(passed, first)]
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
