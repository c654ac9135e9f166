"""`mos train`: from a recipe and an art file to a bundle; and the two smaller networks that come with mos."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mos_cli.cli.options import ArtFile
from mos_cli.cli.output import stderr, stdout
from mos_cli.cli.progress import stage_bars, stop_between_steps


def train(
    recipe: Annotated[str, typer.Argument(help="A TOML file, or the name of a shipped recipe (train-...).")],
    art: ArtFile = None,
    run: Annotated[
        Path | None,
        typer.Option("--run", help="Folder of the run; a run found there goes on.", show_default="runs/NAME"),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option("--export", help="Where the bundle goes when the run is done.", show_default="RUN/bundle"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Training steps, instead of the recipe's.")
    ] = None,
    ema: Annotated[
        str | None,
        typer.Option(
            "--ema", help="Moving average to export: 0.05 or 0.10 of the run wide.", show_default="the recipe's"
        ),
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Print the recipe and stop: a start for one of your own.")
    ] = False,
) -> None:
    """Train a model and export it as a bundle. Ctrl-C stops after the current step; the same command goes on.

    On several GPUs or machines: accelerate launch -m mos_cli train RECIPE; with --use_fsdp the network is sharded.
    """
    from mos_cli.training.recipe import load_recipe, recipe_path
    from mos_cli.utils.quiet import quieten

    if show:
        stdout.print(
            recipe_path(recipe).read_text(encoding="utf-8"), end="", markup=False, highlight=False, soft_wrap=True
        )
        return
    quieten()
    from mos_cli.datasets.art.file import data_folder
    from mos_cli.training.run import export as export_bundle
    from mos_cli.training.run import train as run_training
    from mos_cli.training.stages import curriculum

    given = {"steps": steps, "ema": ema}
    loaded = load_recipe(recipe, {name: value for name, value in given.items() if value is not None})
    folder = run or Path("runs") / loaded.bundle.name
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:.0f} images/s"),
        TimeRemainingColumn(),
    ]
    main_process = os.environ.get("RANK", "0") == "0"
    with (
        Progress(*columns, console=stderr, disable=not main_process) as bars,
        stop_between_steps() as check_interrupt,
    ):
        task = bars.add_task("training", total=curriculum(loaded).steps, loss=float("nan"), speed=0.0)

        def log(metrics: Any) -> None:
            bars.update(task, completed=metrics.step, loss=metrics.loss, speed=metrics.images_per_second)
            check_interrupt()

        trainer = run_training(loaded, art or data_folder(), folder, log)
    bundle = export_bundle(trainer, export or folder / "bundle")
    trainer.accelerator.end_training()
    if bundle is not None:
        stdout.print(f"{bundle.folder}", soft_wrap=True)


def train_judge(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the judge to.")],
    art: ArtFile = None,
    steps: Annotated[int, typer.Option("--steps", min=10, help="Training steps.")] = 4000,
) -> None:
    """Train the judge of `mos eval` from the art file, and show how much of true scenes it detects.

    The same command gives another judge on another machine: tables compare only where the judge's hash is the same.
    """
    from mos_cli.cli.eval import print_table
    from mos_cli.utils.quiet import quieten

    quieten()
    from mos_cli.datasets.art.file import data_folder, load_art
    from mos_cli.evaluation.examine import Examiner, TrueScenes
    from mos_cli.evaluation.judge import SIDE, Judge
    from mos_cli.evaluation.judge_training import load_sprites
    from mos_cli.evaluation.judge_training import train_judge as run_training
    from mos_cli.evaluation.results import HEADINGS, table
    from mos_cli.evaluation.run import scores
    from mos_cli.evaluation.scenebench import bench_data, read_bench

    opened, entries = load_art(art or data_folder()), read_bench()
    with stage_bars("loss {task.fields[loss]:.3f}") as advance:
        run_training(
            load_sprites(opened, bench_data()),
            output,
            steps=steps,
            log=lambda step, loss: advance("training", step, steps, loss),
        )
    judge = Judge(output)
    passed = Examiner(judge, TrueScenes(opened), entries, SIDE).ceiling()
    print_table(HEADINGS, table(scores(entries, [takes[0] for takes in passed], passed)))
    stdout.print(f"{output}  sha256 {judge.hash}", markup=False, soft_wrap=True)


def train_enlarger(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the enlarger to.")],
    recipe: Annotated[
        str, typer.Option("--recipe", help="The training recipe whose scenes it learns from.")
    ] = "train-emoji",
    art: ArtFile = None,
    steps: Annotated[int, typer.Option("--steps", min=10, help="Training steps.")] = 1500,
) -> None:
    """Train the enlarger: the autoencoder of the small models, which draws pictures twice as large as their latents."""
    from mos_cli.datasets.tables import DataTable
    from mos_cli.errors import UsageError
    from mos_cli.training.recipe import load_recipe
    from mos_cli.utils.quiet import quieten

    scenes = load_recipe(recipe).data
    if not isinstance(scenes, DataTable):
        raise UsageError(f"{recipe} has captioned pictures for data: the enlarger learns from scenes")
    quieten()
    from mos_cli.datasets.art.file import data_folder
    from mos_cli.training.enlarging import train_enlarger as run_training
    from mos_cli.training.run import find_sources
    from mos_cli.utils.devices import choose_device

    source, _ = find_sources(scenes, art or data_folder(), choose_device("auto"))
    with stage_bars("loss {task.fields[loss]:.4f}") as advance:
        run_training(source, output, steps=steps, log=lambda step, loss: advance("training", step, steps, loss))
    stdout.print(str(output), markup=False, soft_wrap=True)
