"""`mos eval`: draw SceneBench, judge the pictures, and write the table."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mos_cli.cli import console
from mos_cli.cli.bars import stage_bars
from mos_cli.cli.options import ArtFile, Device

if TYPE_CHECKING:
    from mos_cli.training.evaluation.results import Score

JudgeFolder = Annotated[
    Path | None, typer.Option("--judge", help="Folder of the judge.", show_default="the one that comes with mos")
]


def evaluate(
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", envvar="MOS_MODEL", help="Bundle: name, path or hub id.", show_default="emoji-nano"
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for pictures and tables.", show_default="outputs/eval-MODEL"),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts of each category; all by default.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.", show_default="the model's")] = None,
    cfg: Annotated[float | None, typer.Option(min=0, help="Guidance scale.", show_default="the model's")] = None,
    size: Annotated[int | None, typer.Option(help="Side of the pictures.", show_default="the model's")] = None,
    art: ArtFile = None,
    judge: JudgeFolder = None,
    device: Device = None,
) -> None:
    """Draw SceneBench's 700 prompts, judge the pictures, and write eval.md, eval.json, sheet.png and check.png.

    A run that was interrupted goes on where it stopped when it is given the same --output.
    """
    from mos_cli.cli.asked import shared_fields
    from mos_cli.cli.drawing import Report, load_pipeline
    from mos_cli.cli.fetching import fetch_with_progress
    from mos_cli.runtime.bundles import find_bundle
    from mos_cli.runtime.quiet import quieten
    from mos_cli.runtime.settings import RunSettings, make_settings, parse_size

    # The user's config file stays out of it: a table must not depend on whose machine it was made on.
    flags = make_settings(model=model, steps=steps, cfg=cfg, size=None if size is None else str(size), device=device)
    settings = RunSettings(**flags.model_dump(exclude_none=True))
    bundle = find_bundle(settings.model)
    common = shared_fields(settings, bundle, bundle.index.defaults)
    common["width"], common["height"] = parse_size(settings.size, bundle.index.canvas)
    quieten()
    from mos_cli.training.art.file import data_folder, load_art
    from mos_cli.training.evaluation.bench import read_bench
    from mos_cli.training.evaluation.examine import TrueScenes
    from mos_cli.training.evaluation.features import features_spec, load_features
    from mos_cli.training.evaluation.judge import Judge, judge_folder
    from mos_cli.training.evaluation.results import markdown
    from mos_cli.training.evaluation.run import Bench
    from mos_cli.training.evaluation.run import evaluate as run_evaluation

    entries, judging = read_bench(limit), Judge(judge or judge_folder())
    true = TrueScenes(load_art(art or data_folder()))
    features = load_features(fetch_with_progress(features_spec()))
    pipeline = load_pipeline(bundle, device=settings.device, precision=common["precision"], report=Report())
    folder = output or Path("outputs") / f"eval-{bundle.index.name}"
    with stage_bars() as advance:
        result = run_evaluation(pipeline, Bench(entries, judging, features, true), folder, common, advance)
    print_scores(result.scores)
    console.out.print("\n".join(markdown(result).splitlines()[-3:]), markup=False, soft_wrap=True)
    console.out.print(str(folder / "eval.md"), markup=False, soft_wrap=True)


def print_scores(scores: "tuple[Score, ...]") -> None:
    from rich.table import Table

    from mos_cli.training.evaluation.results import HEADINGS, rows

    table = Table(box=None, pad_edge=False)
    for index, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for row in rows(scores):
        table.add_row(*row)
    console.out.print(table)
