"""`mos eval`: draw SceneBench or EditBench, judge the pictures, and write the table."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mos_cli.cli.loading import load_with_progress
from mos_cli.cli.options import ArtFile, Device, Lora, Model, Solver
from mos_cli.cli.output import Report, print_table, stdout
from mos_cli.cli.progress import fetch_with_progress, stage_bars
from mos_cli.errors import UsageError

if TYPE_CHECKING:
    from mos_cli.evaluation.examine import TrueScenes
    from mos_cli.evaluation.judge import Judge
    from mos_cli.inference.pipeline import MoSPipeline
    from mos_cli.utils.threads import AdaptiveThreads

JudgeFolder = Annotated[
    Path | None, typer.Option("--judge", help="Folder of the judge.", show_default="the one that comes with mos")
]


class Suite(StrEnum):
    """What is evaluated: generating or editing."""

    scenes = "scenes"
    edit = "edit"


def evaluate(
    suite: Annotated[
        Suite, typer.Option("--suite", help="Drawing (SceneBench) or editing (EditBench).")
    ] = Suite.scenes,
    model: Model = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for pictures and tables.", show_default="outputs/eval-MODEL"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Prompts of each category or kind; all by default.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Denoising steps.", show_default="the model's")
    ] = None,
    solver: Solver = None,
    cfg: Annotated[
        float | None, typer.Option("--cfg", min=0, help="Guidance scale.", show_default="the model's")
    ] = None,
    image_cfg: Annotated[
        float | None,
        typer.Option("--image-cfg", min=0, help="Guidance towards the picture, editing.", show_default="the model's"),
    ] = None,
    lora: Lora = None,
    size: Annotated[
        int | None, typer.Option("--size", help="Side of the pictures.", show_default="the model's")
    ] = None,
    art: ArtFile = None,
    judge: JudgeFolder = None,
    device: Device = None,
) -> None:
    """Draw SceneBench's 700 prompts, or EditBench's 520 edits, judge the pictures, and write tables and sheets.

    An interrupted run is resumed when it is given the same --output.
    """
    from mos_cli.bundles.bundle import edit_defaults, find_bundle
    from mos_cli.config.settings import RunSettings, make_settings, parse_size
    from mos_cli.inference.requests import recipe_fields
    from mos_cli.utils.extras import require
    from mos_cli.utils.files import check_folder
    from mos_cli.utils.quiet import quieten
    from mos_cli.utils.threads import AdaptiveThreads

    # The user's config file is not read: a table must not depend on whose machine it was made on.
    side = None if size is None else str(size)
    values = {"model": model, "steps": steps, "solver": solver, "cfg": cfg, "size": side, "device": device}
    flags = make_settings(**values, loras=lora or None)
    settings = RunSettings(**flags.model_dump(exclude_none=True))
    bundle = find_bundle(settings.model)
    editing = edit_defaults(bundle) if suite is Suite.edit else None
    if image_cfg is not None and editing is None:
        raise UsageError("--image-cfg is for --suite edit")
    common = recipe_fields(settings, bundle, editing or bundle.index.defaults)
    common["width"], common["height"] = parse_size(settings.size, bundle.index.canvas)
    folder = output or Path("outputs") / f"eval-{bundle.index.name}"
    require("evaluation", "train", "inflect")
    quieten()
    from mos_cli.datasets.art.file import data_folder, load_art
    from mos_cli.evaluation.editbench import read_edit_bench
    from mos_cli.evaluation.examine import TrueScenes
    from mos_cli.evaluation.judge import Judge, judge_folder
    from mos_cli.evaluation.scenebench import read_bench

    begun = [f"pictures/{read_bench(limit)[0].id}.png", f"edits/{read_edit_bench(limit)[0].id}.png"]
    check_folder(folder, "eval.json", "edit.json", *begun)
    judging, true = Judge(judge or judge_folder()), TrueScenes(load_art(art or data_folder()))
    adapt_threads = AdaptiveThreads()
    pipeline = load_with_progress(bundle, settings, Report(), precision=common["precision"], quant=common["quant"])
    adapt_threads()
    if editing is None:
        _evaluate_scenes(pipeline, judging, true, folder, common, limit, adapt_threads)
    else:
        guidance = editing.image_cfg if image_cfg is None else image_cfg
        _evaluate_edits(pipeline, judging, true, folder, common, limit, guidance, adapt_threads)


def _evaluate_scenes(
    pipeline: "MoSPipeline",
    judge: "Judge",
    true: "TrueScenes",
    folder: Path,
    common: dict[str, Any],
    limit: int | None,
    adapt_threads: "AdaptiveThreads",
) -> None:
    from mos_cli.evaluation.features import load_features
    from mos_cli.evaluation.results import HEADINGS, markdown, table
    from mos_cli.evaluation.run import Bench
    from mos_cli.evaluation.run import evaluate as run_evaluation
    from mos_cli.evaluation.scenebench import read_bench
    from mos_cli.towers.efficientnet import features_spec

    features = load_features(fetch_with_progress(features_spec()))
    with stage_bars(after=adapt_threads) as advance:
        result = run_evaluation(pipeline, Bench(read_bench(limit), judge, features, true), folder, common, advance)
    _print(HEADINGS, table(result.scores), markdown(result), folder / "eval.md")


def _evaluate_edits(
    pipeline: "MoSPipeline",
    judge: "Judge",
    true: "TrueScenes",
    folder: Path,
    common: dict[str, Any],
    limit: int | None,
    image_cfg: float,
    adapt_threads: "AdaptiveThreads",
) -> None:
    from mos_cli.evaluation.edit_run import HEADINGS, evaluate_edits, markdown, rows
    from mos_cli.evaluation.editbench import read_edit_bench

    with stage_bars(after=adapt_threads) as advance:
        entries = read_edit_bench(limit)
        result = evaluate_edits(pipeline, entries, judge, true, folder, common, image_cfg, advance)
    _print(HEADINGS, rows(result), markdown(result), folder / "edit.md")


def _print(headings: tuple[str, ...], rows: list[tuple[str, ...]], text: str, file: Path) -> None:
    """The table, and what stands below it in the file."""
    print_table(headings, rows)
    below = text.rsplit("|\n", 1)[1].strip()
    stdout.print(f"{below}\n{file}", markup=False, soft_wrap=True)
