"""`mos train`: from a recipe and an art file to a bundle."""

import os
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
    ema: Annotated[
        str | None,
        typer.Option(help="Moving average to export: 0.05 or 0.10 of the run wide.", show_default="the recipe's"),
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Print the recipe and stop: a start for one of your own.")
    ] = False,
) -> None:
    """Train a model and export it as a bundle. Ctrl-C stops after the step at hand; the same command goes on.

    On several GPUs or machines: accelerate launch -m mos_cli train RECIPE; with --use_fsdp the network is sharded.
    """
    from mos_cli.runtime.quiet import quieten
    from mos_cli.training.recipe import load_recipe, recipe_path

    if show:
        console.out.print(
            recipe_path(recipe).read_text(encoding="utf-8"), end="", markup=False, highlight=False, soft_wrap=True
        )
        return
    quieten()
    from mos_cli.training.art.file import data_folder
    from mos_cli.training.run import export as export_bundle
    from mos_cli.training.run import train as run_training
    from mos_cli.training.stages import course

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
        Progress(*columns, console=console.err, disable=not main_process) as bars,
        gentle_interrupt() as check_interrupt,
    ):
        task = bars.add_task("training", total=course(loaded).steps, loss=float("nan"), speed=0.0)

        def log(metrics: Any) -> None:
            bars.update(task, completed=metrics.step, loss=metrics.loss, speed=metrics.images_per_second)
            check_interrupt()

        trainer = run_training(loaded, art or data_folder(), folder, log)
    bundle = export_bundle(trainer, export or folder / "bundle")
    trainer.accelerator.end_training()
    if bundle is not None:
        console.out.print(f"{bundle.folder}", soft_wrap=True)
