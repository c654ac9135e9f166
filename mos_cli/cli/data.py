"""`mos data`: build the art that models are trained on, and show what is in it."""

from pathlib import Path
from typing import Annotated

import typer

from mos_cli.cli.output import print_view, print_warning, stderr, stdout
from mos_cli.cli.paths import App

data_app = App(no_args_is_help=True, help="The pictures that models are trained on.")


@data_app.command()
def build(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write to; the cache by default.")] = None,
    size: Annotated[int, typer.Option("--size", help="Side of the pictures in pixels.")] = 128,
    sets: Annotated[list[str] | None, typer.Option("--set", help="A set to use, repeatable; all by default.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Build again what is there already.")] = False,
) -> None:
    """Fetch the open emoji sets with npm, draw their objects, and write one art file with its manifest."""
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    from mos_cli.datasets.art.build import build_art, choose_sets
    from mos_cli.datasets.art.file import data_folder

    with Progress(
        *Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn(), console=stderr
    ) as bar:
        tasks = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done)

        path = build_art(out or data_folder(), size, choose_sets(sets or ()), overwrite=overwrite, progress=advance)
    _print(path)


@data_app.command()
def show(
    path: Annotated[Path | None, typer.Argument(help="An art manifest, or its folder; the cache by default.")] = None,
) -> None:
    """Show what an art file holds: its styles, pictures, licences and credits."""
    from mos_cli.datasets.art.file import data_folder, manifest_path

    _print(manifest_path(path or data_folder()))


def _print(path: Path) -> None:
    from rich.table import Table

    from mos_cli.datasets.art.file import load_manifest

    manifest = load_manifest(path)
    counts = manifest.counts
    table = Table("style", "pictures", "licence", "credit", "package")
    table.columns[1].justify = "right"
    for art in manifest.sets:
        table.add_row(art.style, f"{art.pictures:,}", art.licence, art.credit, f"{art.package} {art.version}")
    print_view(table, wide=True)
    left_out = ", ".join(f"{reason} {count:,}" for reason, count in counts.dropped.items() if count)
    stdout.print(f"{counts.pictures:,} pictures of {counts.concepts:,} objects at {manifest.size} px")
    stdout.print(f"left out: {left_out or 'nothing'}")
    if counts.dropped.get("blank"):
        print_warning(f"{counts.dropped['blank']} pictures came out blank and were dropped")
    stdout.print(str(path), soft_wrap=True)
