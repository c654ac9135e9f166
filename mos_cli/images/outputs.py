"""The metadata of PNGs: writing and reading."""

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from mos_cli.config.recipe import PictureRecord
from mos_cli.errors import InputError
from mos_cli.utils.validation import first_problem

if TYPE_CHECKING:
    from PIL.Image import Image


def png(image: "Image", record: PictureRecord | None, *, parameters: bool = True) -> bytes:
    """A picture as a PNG file, without metadata if `record` is None; `parameters`: also as text for other tools."""
    from io import BytesIO

    from PIL.PngImagePlugin import PngInfo

    info, file = PngInfo(), BytesIO()
    if record is not None:
        if parameters:
            info.add_itxt("parameters", record.parameters())
        info.add_itxt("mos", record.to_json())
    image.save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def read_record(path: Path) -> PictureRecord | None:
    """The record in a picture; None if there is none, or this version cannot read it."""
    from PIL import Image

    from mos_cli.images.pictures import FORMATS

    with Image.open(path, formats=FORMATS) as opened:
        text = opened.info.get("mos")
    try:
        return None if not isinstance(text, str) else PictureRecord.model_validate_json(text)
    except ValidationError:
        return None


def read_image(path: Path) -> "Image":
    """The picture in a PNG, RGBA or RGB, with its metadata in `info`.

    Raises:
        InputError: it cannot be read, or is not a PNG picture.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=["PNG"]) as opened:
            return opened.convert("RGBA" if opened.mode == "RGBA" else "RGB")
    except UnidentifiedImageError:
        raise InputError(f"{path} is not a PNG picture") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def read_drawing(path: Path) -> tuple["Image", PictureRecord]:
    """Opens a picture made by mos, with its record.

    Raises:
        InputError: it cannot be read, is not a picture, or has no record that this version can read.
    """
    image = read_image(path)
    text = image.info.get("mos")
    if not isinstance(text, str):
        raise InputError(f"{path} carries no recipe: it was not made by mos, or its metadata was removed")
    try:
        return image, PictureRecord.model_validate_json(text)
    except ValidationError as error:
        raise InputError(f"the recipe in {path} is damaged or of another version: {first_problem(error)}") from None
