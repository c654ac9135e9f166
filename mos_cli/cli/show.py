"""`mos show`: what a picture was made from."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mos_cli.cli.completion import picture_paths
from mos_cli.cli.jobs import as_texts, recipe_text, shortened
from mos_cli.cli.options import Preview
from mos_cli.cli.output import Report, print_json, stdout
from mos_cli.cli.standard_files import picture_file
from mos_cli.cli.terminal_pictures import picture_printer

if TYPE_CHECKING:
    from PIL.Image import Image

    from mos_cli.config.recipe import PictureRecord


def show(
    picture: Annotated[
        Path, typer.Argument(autocompletion=picture_paths, help="A picture made by mos; - reads one from stdin.")
    ],
    json: Annotated[bool, typer.Option("--json", help="Print the record in the file as one JSON object.")] = False,
    preview: Preview = None,
) -> None:
    """Show what a picture was made from: its recipe, what drew it, and the pictures it was edited from."""
    from mos_cli.config.settings import make_settings, resolve
    from mos_cli.images.companions import companions
    from mos_cli.images.outputs import read_drawing

    image, record = read_drawing(picture_file(picture))
    if json:
        print_json([record.model_dump(mode="json", by_alias=True, exclude_none=True)])
        return
    show_picture = picture_printer(resolve(make_settings(preview=preview), None).preview, Report())
    if show_picture is not None:
        show_picture(image)
    beside = [] if str(picture) == "-" else [str(path) for path in companions(picture) if path.is_file()]
    for name, text in (_recipe(record) | _origin(image, record) | as_texts({"files": beside})).items():
        if text:
            stdout.print(f"{name:<14} {text}", markup=False)


def _recipe(record: "PictureRecord") -> dict[str, str]:
    from mos_cli.config.recipe import with_weights

    recipe = record.recipe
    texts = {"prompt": with_weights(recipe.prompt, recipe.weights), "seed": str(recipe.seed)} | recipe_text(recipe)
    if recipe.batch is not None:
        texts["batch"] = f"{recipe.batch.place + 1} of {recipe.batch.size}"
    if recipe.template is not None:
        texts["template"] = recipe.template.text
    if recipe.route_from is not None:
        texts["route_from"] = f"a run {recipe.route_from.sha256[:10]}, for {recipe.route_from.until:.0%} of the steps"
    return texts


def _origin(image: "Image", record: "PictureRecord") -> dict[str, str]:
    """What drew a picture, whether it is unchanged, and what it was edited from."""
    from mos_cli.config.recipe import pixels_hash

    made = record.made
    packages = {name: getattr(made, name) for name in ("mos", "torch", "diffusers", "transformers", "pillow")}
    threads = "" if made.threads is None else f", {made.threads} thread{'' if made.threads == 1 else 's'}"
    pixels = "" if record.sha256 is None else "changed by another program"
    if (found := pixels_hash(image)) == record.sha256:
        pixels = "as drawn"
    elif record.stored is not None and found == record.stored.sha256:
        pixels = f"as drawn, but for what {record.stored.format} loses"
    earlier = {one.sha256: one for one in record.earlier}
    edited = [
        f"{shortened(one.recipe.prompt)!r} (seed {one.recipe.seed})"
        if (one := earlier.get(source.sha256)) is not None
        else f"a picture of {source.width}x{source.height} that is not in this file"
        for source in (() if record.recipe.edit is None else record.recipe.edit.sources)
    ]
    return {
        "edit": ", ".join(edited),
        "mask": "one that is not in this file" if record.recipe.edit and record.recipe.edit.mask else "",
        "bundle": made.bundle_hash[:10],
        "drawn with": ", ".join(f"{name} {text}" for name, text in packages.items() if text),
        "drawn on": f"{made.device}{threads}, {made.attention} attention",
        "pixels": pixels,
    }
