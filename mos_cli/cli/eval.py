"""`mos eval`: draw SceneBench, judge the pictures, and write the table; `mos train-judge`: make the judge again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mos_cli.cli import console
from mos_cli.cli.interrupt import gentle_interrupt
from mos_cli.cli.options import Device

if TYPE_CHECKING:
    from mos_cli.training.evaluation.results import Score

ArtFile = Annotated[
    Path | None, typer.Option("--art", help="Art file or its folder.", show_default="where `mos data build` writes it")
]
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
    from mos_cli.cli.drawing import Report, load_pipeline
    from mos_cli.cli.fetching import fetch_with_progress
    from mos_cli.cli.generate import shared_fields
    from mos_cli.runtime.bundles import find_bundle
    from mos_cli.runtime.quiet import quieten
    from mos_cli.runtime.settings import RunSettings, make_settings

    # The user's config file stays out of it: a table must not depend on whose machine it was made on.
    flags = make_settings(model=model, steps=steps, cfg=cfg, size=None if size is None else str(size), device=device)
    settings = RunSettings(**flags.model_dump(exclude_none=True))
    bundle = find_bundle(settings.model)
    common = shared_fields(settings, bundle)
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
    with _bars() as advance:
        result = run_evaluation(pipeline, Bench(entries, judging, features, true), folder, common, advance)
    _print_scores(result.scores)
    console.out.print("\n".join(markdown(result).splitlines()[-3:]), markup=False, soft_wrap=True)
    console.out.print(str(folder / "eval.md"), markup=False, soft_wrap=True)


def train_judge(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the judge to.")],
    art: ArtFile = None,
    steps: Annotated[int, typer.Option(min=10, help="Training steps.")] = 4000,
) -> None:
    """Train the judge of `mos eval` from the art file, and show how much it sees of true scenes.

    The same command gives another judge on another machine: tables compare only where the judge's hash is the same.
    """
    from mos_cli.runtime.quiet import quieten

    quieten()
    from mos_cli.training.art.file import data_folder, load_art
    from mos_cli.training.evaluation.bench import bench_data, read_bench
    from mos_cli.training.evaluation.examine import Examiner, TrueScenes
    from mos_cli.training.evaluation.judge import SIDE, Judge
    from mos_cli.training.evaluation.judge_training import load_sprites
    from mos_cli.training.evaluation.judge_training import train_judge as run_training
    from mos_cli.training.evaluation.run import scores

    opened, entries = load_art(art or data_folder()), read_bench()
    with _bars("loss {task.fields[loss]:.3f}") as advance:
        run_training(
            load_sprites(opened, bench_data()),
            output,
            steps=steps,
            log=lambda step, loss: advance("training", step, steps, loss),
        )
    judge = Judge(output)
    passed = Examiner(judge, TrueScenes(opened), entries, SIDE).ceiling()
    _print_scores(scores(entries, [takes[0] for takes in passed], passed))
    console.out.print(f"{output}  sha256 {judge.hash}", markup=False, soft_wrap=True)


@contextmanager
def _bars(*columns: str) -> Iterator[Callable[..., None]]:
    """A progress bar per stage; Ctrl-C ends after the picture or the step at hand."""
    with (
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            *columns,
            TimeRemainingColumn(),
            console=console.err,
        ) as bars,
        gentle_interrupt() as check_interrupt,
    ):
        tasks = {}

        def advance(stage: str, done: int, total: int, loss: float = 0.0) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, loss=loss)
            bars.update(tasks[stage], completed=done, loss=loss)
            check_interrupt()

        yield advance


def _print_scores(scores: "tuple[Score, ...]") -> None:
    from rich.table import Table

    from mos_cli.training.evaluation.results import HEADINGS, rows

    table = Table(box=None, pad_edge=False)
    for index, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for row in rows(scores):
        table.add_row(*row)
    console.out.print(table)
