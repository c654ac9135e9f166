"""`mos gallery`: a page with the pictures of a folder and their recipes."""

from pathlib import Path
from typing import Annotated

import typer

from mos_cli.cli.options import Overwrite, Quiet
from mos_cli.cli.output import print_warning


def gallery(
    folder: Annotated[Path, typer.Argument(help="A folder with pictures, also in folders in it.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="HTML", help="The page to write.", show_default="gallery.html in the folder"
        ),
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Write a page with the pictures of a folder, which searches their prompts and shows their recipes.

    It needs no network, and holds no pictures: it names the files, so it works where they are.
    """
    from mos_cli.errors import InputError, UsageError
    from mos_cli.images.gallery import GalleryPicture, gallery_page, pictures_in
    from mos_cli.utils.files import atomic_write, check_writable, refuse_existing

    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: name one that has pictures")
    page = folder / "gallery.html" if output is None else output
    if page.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"-o {page}: name it .html")
    check_writable(page.parent)
    refuse_existing(page, overwrite)
    pictures: list[GalleryPicture] = []
    for found in pictures_in(folder):
        if isinstance(found, GalleryPicture):
            pictures.append(found)
        elif not quiet:
            print_warning(f"left out: {found}")
    if not pictures:
        raise InputError(f"{folder} has no pictures that can be read")
    atomic_write(page, gallery_page(pictures, folder, page).encode(), overwrite)
    typer.echo(str(page))
