"""`mos train`: from a recipe and an art file to a bundle."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mos_cli.cli.completion import model_names, recipe_names
from mos_cli.cli.options import ArtFile
from mos_cli.cli.output import stderr, stdout
from mos_cli.cli.progress import stop_between_steps
from mos_cli.errors import UsageError


def train(
    recipe: Annotated[
        str,
        typer.Argument(autocompletion=recipe_names, help="A TOML file, or the name of a shipped recipe (train-...)."),
    ],
    start_from: Annotated[
        str | None,
        typer.Option(
            "--from",
            autocompletion=model_names,
            help="The base model that a router is trained for: name or folder.",
            show_default="the recipe's",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Folder of captioned pictures, for a router.", show_default="the recipe's"),
    ] = None,
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
    from mos_cli.utils.extras import require
    from mos_cli.utils.files import check_writable
    from mos_cli.utils.quiet import quieten

    if show:
        stdout.print(
            recipe_path(recipe).read_text(encoding="utf-8"), end="", markup=False, highlight=False, soft_wrap=True
        )
        return
    from mos_cli.adapters.recipe import is_router_recipe

    if is_router_recipe(path := recipe_path(recipe)):
        from mos_cli.cli.train_router import train_router

        quieten()
        train_router(path, data=data, base=start_from, run=run, export=export, steps=steps)
        return
    if start_from is not None or data is not None:
        raise UsageError(f"--from and --data are for the recipe of a router, and {recipe} trains a whole model")
    require("training", "train", "inflect", "matplotlib", "tensorboard")
    overrides = {"steps": steps, "ema": ema}
    loaded = load_recipe(recipe, {name: value for name, value in overrides.items() if value is not None})
    folder = run or Path("runs") / loaded.bundle.name
    for place in (folder, export or folder):
        check_writable(place.expanduser())
    quieten()
    from mos_cli.bundles.bundle import INDEX
    from mos_cli.datasets.art.file import data_folder
    from mos_cli.training.loop import RECIPE
    from mos_cli.training.run import export as export_bundle
    from mos_cli.training.run import train as run_training
    from mos_cli.training.stages import curriculum
    from mos_cli.utils.files import check_folder

    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:.0f} images/s"),
        TimeRemainingColumn(),
    ]
    main_process = os.environ.get("RANK", "0") == "0"
    if main_process:
        check_folder(folder, RECIPE)
        if export is not None:
            check_folder(export, INDEX, "card.md")
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
