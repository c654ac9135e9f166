"""`mos data`: build the art that models are trained on, and show what is in it."""

from pathlib import Path
from typing import Annotated

import typer

from mos_cli.cli.completion import model_names, recipe_names
from mos_cli.cli.options import as_text
from mos_cli.cli.output import print_view, print_warning, stderr, stdout
from mos_cli.cli.paths import App
from mos_cli.cli.unused import print_unused
from mos_cli.errors import UsageError
from mos_cli.utils.counts import counted

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


@data_app.command("look")
def look_at(
    folder: Annotated[Path, typer.Argument(help="Folder of captioned pictures, see docs/finetune.md.")],
    recipe: Annotated[
        str, typer.Option("--recipe", autocompletion=recipe_names, help="The recipe to train with.")
    ] = "finetune",
    start_from: Annotated[
        str | None,
        typer.Option("--from", autocompletion=model_names, help="The model to continue.", show_default="the recipe's"),
    ] = None,
    caption: Annotated[
        str | None,
        typer.Option("--caption", metavar="TEXT", callback=as_text, help="That of pictures without one."),
    ] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=512, help="Pictures on the sheet.")] = 32,
    output: Annotated[Path, typer.Option("--output", "-o", help="The sheet to write, a PNG.")] = Path("look.png"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a sheet that is there.")] = False,
) -> None:
    """Write a sheet of what a network would see of a folder: cropped pictures, and captions as tokens."""
    from mos_cli.images.sheets import sheet_png
    from mos_cli.training.recipe import load_recipe
    from mos_cli.utils.files import atomic_write, expand, refuse_existing
    from mos_cli.utils.quiet import quieten

    output = expand(output)
    if output.suffix.lower() != ".png":
        raise UsageError(f"--output {output}: the sheet is a PNG")
    refuse_existing(output, overwrite)
    quieten()
    loaded = load_recipe(recipe, start_from=start_from, data=str(folder), caption=caption)
    from mos_cli.training.pictures import look

    captioned, shapes, sheet = look(loaded, count)
    print_unused([(unused.name, unused.reason) for unused in captioned.unused])
    atomic_write(output, sheet_png(sheet), overwrite)
    held_out = f", {len(captioned.held_out)} of them held out" if captioned.held_out else ""
    used = len(captioned.examples) + len(captioned.held_out)
    unused = f", {counted(len(captioned.unused), 'file')} left out" if captioned.unused else ""
    stderr.print(f"{counted(used, 'example')}{held_out}{unused}", soft_wrap=True)
    stderr.print(", ".join(f"{number} of {width}x{height}" for (width, height), number in shapes.items()))
    stdout.print(str(output), soft_wrap=True, markup=False)


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
    stdout.print(f"{counted(counts.pictures, 'picture')} of {counted(counts.concepts, 'object')} at {manifest.size} px")
    stdout.print(f"left out: {left_out or 'nothing'}")
    if blank := counts.dropped.get("blank"):
        print_warning(f"{counted(blank, 'picture')} came out blank, left out")
    stdout.print(str(path), soft_wrap=True)
