"""Where pictures go and what travels in them: names from a template, PNG text chunks, reading them back."""

import re
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
"""Largest side of a preview of a step, in pixels."""
IN_FOLDER = "{number}_{prompt}_s{seed}.png"


class Naming:
    """Turns a template into paths that are free, and never gives a path twice.

    Fields: {date} of today, {number} the next free one in the folder, {prompt} a slug, {seed}, {model}.

    Raises:
        UsageError: the template is not a PNG's, or has unknown fields.
    """

    def __init__(self, template: str, *, overwrite: bool = False) -> None:
        self.template, self.overwrite = template, overwrite
        self.given: set[Path] = set()
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
        if Path(template).suffix.lower() != ".png":
            raise UsageError(f"output '{template}' must end in .png, or be a folder (end it with a slash)")

    def path(self, recipe: Recipe) -> Path:
        """The path for a picture.

        Raises:
            InputError: the path is taken and may not be overwritten.
            UsageError: the template gave the same path before.
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
        if path in self.given:
            raise UsageError(f"several pictures would be written to {path}: add {{seed}} or {{number}} to the name")
        check_writable(path.parent)
        for file in (path, *companions(path)):
            refuse_existing(file, self.overwrite)
        self.given.add(path)
        return path

    def _next_number(self, path: Path) -> int:
        """One number a picture: whatever stands in the folder under a number keeps it to itself."""
        before = path.name.partition("{number}")[0]
        key = (path.parent, before)
        if key not in self._numbers:
            names = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
            found = [re.match(re.escape(before) + r"(\d{4,})", name) for name in names]
            self._numbers[key] = max((int(match[1]) for match in found if match), default=0)
        self._numbers[key] += 1
        return self._numbers[key]


class Companions(NamedTuple):
    """The files a trace puts beside a picture: its readable head, its arrays, and what was seen at every step."""

    head: Path
    arrays: Path
    previews: Path


def companions(path: Path) -> Companions:
    """What lies beside a picture, or beside the head of its trace."""
    return Companions(*(path.with_suffix(suffix) for suffix in (".json", ARRAYS_SUFFIX, PREVIEWS_SUFFIX)))


def naming(output: str, *, overwrite: bool = False) -> Naming:
    """A naming from the user's --output: a template, a file, or a folder."""
    if output.endswith(("/", "\\")) or Path(output).is_dir():
        return Naming(str(Path(output) / IN_FOLDER), overwrite=overwrite)
    return Naming(output, overwrite=overwrite)


def slug(text: str) -> str:
    """Letters and digits of any script, joined by dashes, at most 40 characters."""
    return "-".join(re.findall(r"\w+", text.lower()))[:40].strip("-_") or "picture"


def png(image: "Image", record: PictureRecord | None) -> bytes:
    """A picture as a PNG file; `record` None leaves the metadata out."""
    from io import BytesIO

    from PIL.PngImagePlugin import PngInfo

    info, file = PngInfo(), BytesIO()
    if record is not None:
        info.add_itxt("parameters", record.parameters())
        info.add_itxt("mos", record.to_json())
    image.save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def animation(frames: "Sequence[Image]") -> bytes:
    """The pictures one after the other as an animated WebP, each at most PREVIEW pixels wide and high."""
    from io import BytesIO

    from PIL import Image

    small = [frame.convert("RGB") for frame in frames]
    for frame in small:
        frame.thumbnail((PREVIEW, PREVIEW), Image.Resampling.LANCZOS)
    file = BytesIO()
    # Frames that are alike would be merged, and no longer one for every step.
    options = {"duration": 120, "loop": 0, "quality": 85, "minimize_size": False, "kmin": 1, "kmax": 1}
    small[0].save(file, format="WEBP", save_all=True, append_images=small[1:], **options)
    return file.getvalue()


def read_record(path: Path) -> PictureRecord | None:
    """The record in a picture; None if there is none, or none that this version understands."""
    from PIL import Image

    from mos_cli.images.pictures import FORMATS

    with Image.open(path, formats=FORMATS) as opened:
        text = opened.info.get("mos")
    try:
        return None if not isinstance(text, str) else PictureRecord.model_validate_json(text)
    except ValidationError:
        return None


def read_drawing(path: Path) -> tuple["Image", PictureRecord]:
    """Opens a picture of ours with its record.

    Raises:
        InputError: it cannot be read, is no picture, or carries no record this version understands.
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
