"""`mos models export`: a bundle or a LoRA file from a training run that may still go on."""

from pathlib import Path
from typing import Annotated

import typer

from mos_cli.cli.output import stdout


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a training run: runs/NAME.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Where the bundle, or the LoRA file, goes; it replaces one of an earlier export.",
            show_default="RUN/NAME-STEP",
        ),
    ] = None,
) -> None:
    """Write the bundle, or the LoRA file, of a training run from its last checkpoint, also while it goes on."""
    from mos_cli.utils.extras import require
    from mos_cli.utils.quiet import quieten

    require("training", "train", "inflect", "matplotlib", "tensorboard")
    quieten()
    from mos_cli.training.export import export_run

    stdout.print(f"{export_run(run, out)}", soft_wrap=True, markup=False)
