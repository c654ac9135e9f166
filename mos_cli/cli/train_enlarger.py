"""`mos train-enlarger`: the autoencoder of the small models."""

from pathlib import Path
from typing import Annotated

import typer

from mos_cli.cli.options import ArtFile
from mos_cli.cli.output import stdout
from mos_cli.cli.progress import stage_bars


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
    from mos_cli.utils.extras import require
    from mos_cli.utils.files import check_writable
    from mos_cli.utils.quiet import quieten

    scenes = load_recipe(recipe).data
    if not isinstance(scenes, DataTable):
        raise UsageError(f"{recipe} has captioned pictures for data: the enlarger learns from scenes")
    require("training the enlarger", "train", "inflect")
    check_writable(output)
    quieten()
    from mos_cli.datasets.art.file import data_folder
    from mos_cli.training.enlarging import train_enlarger as run_training
    from mos_cli.training.sources import find_sources
    from mos_cli.utils.devices import choose_device
    from mos_cli.utils.files import check_folder

    check_folder(output)
    source, _ = find_sources(scenes, art or data_folder(), choose_device("auto"))
    with stage_bars("loss {task.fields[loss]:.4f}") as advance:
        run_training(source, output, steps=steps, log=lambda step, loss: advance("training", step, steps, loss))
    stdout.print(str(output), markup=False, soft_wrap=True)
