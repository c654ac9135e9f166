"""`mos train`: from a recipe and an art file to a bundle."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mos_cli.cli import console
from mos_cli.cli.interrupt import gentle_interrupt


def train(
    recipe: Annotated[str, typer.Argument(help="A TOML file, or the name of a shipped recipe (train-...).")],
    art: Annotated[
        Path | None,
        typer.Option(help="Art file or its folder.", show_default="where `mos data build` writes it"),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(help="Folder of the run; a run found there goes on.", show_default="runs/NAME"),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(help="Where the bundle goes when the run is done.", show_default="RUN/bundle"),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Train for so many steps, not the recipe's.")] = None,
) -> None:
    """Train a model and export it as a bundle. Ctrl-C stops after the step at hand; the same command goes on."""
    from mos_cli.runtime.quiet import quieten

    quieten()
    from mos_cli.training.art.file import data_folder
    from mos_cli.training.recipe import load_recipe
    from mos_cli.training.run import export as export_bundle
    from mos_cli.training.run import train as run_training

    loaded = load_recipe(recipe, {} if steps is None else {"steps": steps})
    folder = run or Path("runs") / loaded.bundle.name
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:.0f} images/s"),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=console.err) as bars, gentle_interrupt() as check_interrupt:
        task = bars.add_task("training", total=loaded.train.steps, loss=float("nan"), speed=0.0)

        def log(metrics: Any) -> None:
            bars.update(task, completed=metrics.step, loss=metrics.loss, speed=metrics.images_per_second)
            check_interrupt()

        trainer = run_training(loaded, art or data_folder(), folder, log)
    bundle = export_bundle(trainer, export or folder / "bundle")
    console.out.print(f"{bundle.folder}", soft_wrap=True)
