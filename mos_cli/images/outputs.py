"""The names of outputs, from a template, and the metadata of PNGs: writing and reading."""

import os
import re
import sys
from datetime import date
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, NamedTuple

from pydantic import ValidationError

from mos_cli.config.recipe import PictureRecord, Recipe
from mos_cli.errors import InputError, UsageError
from mos_cli.utils.files import check_writable, refuse_existing
from mos_cli.utils.validation import first_problem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image

FIELDS = ("date", "number", "prompt", "seed", "model")
ARRAYS_SUFFIX = ".routing.safetensors"
PREVIEWS_SUFFIX = ".steps.webp"
PREVIEW = 128
"""Largest side of a step's preview, in pixels."""
IN_FOLDER = "{number}_{prompt}_s{seed}.png"


class Naming:
    """Turns a template into unused paths, each returned once.

    Fields: {date} of today, {number} the next free one in the folder, {prompt} a slug, {seed}, {model}.

    Raises:
        UsageError: the template does not end in .png, or has unknown fields.
    """

    def __init__(self, template: str, *, overwrite: bool = False) -> None:
        self.template, self.overwrite = template, overwrite
        self.returned: set[Path] = set()
        self._numbers: dict[tuple[Path, str], int] = {}
        try:
            fields = [part[1:] for part in Formatter().parse(template) if part[1] is not None]
        except ValueError as error:
            raise UsageError(f"output '{template}' is not a template: {error}") from None
        for field, layout, conversion in fields:
            if field not in FIELDS or layout or conversion:
                raise UsageError(f"output '{template}': use {', '.join(f'{{{name}}}' for name in FIELDS)}, as they are")
        if "{number}" in str(Path(template).parent):
            raise UsageError("output field {number} belongs into the file's name, not into a folder's")
        if "\0" in template:
            raise UsageError("the output's name has a null character")
        if Path(template).suffix.lower() != ".png":
            raise UsageError(f"output '{template}' must end in .png, or be a folder (end it with a slash)")

    def path(self, recipe: Recipe) -> Path:
        """The path for a picture.

        Raises:
            InputError: the path exists and may not be overwritten.
            UsageError: the path was returned before.
        """
        fields = {
            "date": date.today().isoformat(),
            "prompt": slug(recipe.prompt),
            "seed": recipe.seed,
            "model": slug(recipe.model),
        }
        path = Path(self.template.format(number="{number}", **fields))
        if "{number}" in path.name:
            path = path.with_name(path.name.replace("{number}", f"{self._next_number(path):04d}"))
        if path in self.returned:
            raise UsageError(f"several pictures would be written to {path}: add {{seed}} or {{number}} to the name")
        try:
            os.fsencode(path)
        except UnicodeEncodeError as error:
            raise InputError(
                f"the system's encoding, {error.encoding}, has no name {path}: set LC_ALL=C.UTF-8 or PYTHONUTF8=1"
            ) from None
        check_writable(path.parent)
        for file in (path, *companions(path)):
            refuse_existing(file, self.overwrite)
        self.returned.add(path)
        return path

    def _next_number(self, path: Path) -> int:
        """The next number that no file in the folder has."""
        before = path.name.partition("{number}")[0]
        key = (path.parent, before)
        if key not in self._numbers:
            names = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
            found = [re.match(re.escape(before) + r"(\d{4,})", name) for name in names]
            self._numbers[key] = max((int(match[1]) for match in found if match), default=0)
        self._numbers[key] += 1
        return self._numbers[key]


class Companions(NamedTuple):
    """The files of a trace beside a picture: its head, its arrays, and the previews of the steps."""

    head: Path
    arrays: Path
    previews: Path


def companions(path: Path) -> Companions:
    """The paths of the files beside a picture, or beside the head of its trace."""
    return Companions(*(path.with_suffix(suffix) for suffix in (".json", ARRAYS_SUFFIX, PREVIEWS_SUFFIX)))


def naming(output: str, *, overwrite: bool = False) -> Naming:
    """The naming of --output: a template, a file, or a folder."""
    if output.endswith(("/", "\\")) or Path(output).is_dir():
        return Naming(str(Path(output) / IN_FOLDER), overwrite=overwrite)
    return Naming(output, overwrite=overwrite)


def slug(text: str) -> str:
    """Letters and digits that names of files can have here, joined by dashes, at most 40 characters."""
    encoding = sys.getfilesystemencoding()
    text = text.encode(encoding, "ignore").decode(encoding)
    return "-".join(re.findall(r"\w+", text.lower()))[:40].strip("-_") or "picture"


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


def animation(frames: "Sequence[Image]") -> bytes:
    """The pictures as an animated WebP, each at most PREVIEW pixels wide and high."""
    from io import BytesIO

    from PIL import Image

    small = [frame.convert("RGB") for frame in frames]
    for frame in small:
        frame.thumbnail((PREVIEW, PREVIEW), Image.Resampling.LANCZOS)
    file = BytesIO()
    # Keeps equal frames, which would be merged otherwise.
    options = {"duration": 120, "loop": 0, "quality": 85, "minimize_size": False, "kmin": 1, "kmax": 1}
    small[0].save(file, format="WEBP", save_all=True, append_images=small[1:], **options)
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


def read_drawing(path: Path) -> tuple["Image", PictureRecord]:
    """Opens a picture made by mos, with its record.

    Raises:
        InputError: it cannot be read, is not a picture, or has no record that this version can read.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=["PNG"]) as opened:
            image = opened.convert("RGBA" if opened.mode == "RGBA" else "RGB")
            text = opened.info.get("mos")
    except UnidentifiedImageError:
        raise InputError(f"{path} is not a PNG picture") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(text, str):
        raise InputError(f"{path} carries no recipe: it was not made by mos, or its metadata was removed")
    try:
        return image, PictureRecord.model_validate_json(text)
    except ValidationError as error:
        raise InputError(f"the recipe in {path} is damaged or of another version: {first_problem(error)}") from None
