"""Where pictures go and what travels in them: names from a template, PNG text chunks, reading them back."""

import re
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING

from pydantic import ValidationError

from mos_cli.errors import InputError, UsageError
from mos_cli.runtime.files import atomic_file
from mos_cli.runtime.recipe import PictureRecord, Recipe
from mos_cli.runtime.specs import first_problem

if TYPE_CHECKING:
    from PIL.Image import Image

FIELDS = ("date", "number", "prompt", "seed", "model")
ARRAYS_SUFFIX = ".routing.safetensors"
COMPANIONS = (".json", ARRAYS_SUFFIX)
"""What a trace puts beside the picture."""
IN_FOLDER = "{number}_{prompt}_s{seed}.png"


@dataclass(frozen=True)
class Naming:
    """Turns a template into paths that are free.

    Fields: {date} of today, {number} the next free one in the folder, {prompt} a slug, {seed}, {model}.

    Raises:
        UsageError: the template is not a PNG's, or has unknown fields.
    """

    template: str
    overwrite: bool = False

    def __post_init__(self) -> None:
        try:
            fields = [field for _, field, _, _ in Formatter().parse(self.template) if field is not None]
        except ValueError as error:
            raise UsageError(f"output '{self.template}' is not a template: {error}") from None
        for field in fields:
            if field not in FIELDS:
                raise UsageError(f"output field {{{field}}} is unknown: use {', '.join(FIELDS)}")
        if "{number}" in str(Path(self.template).parent):
            raise UsageError("output field {number} belongs into the file's name, not into a folder's")
        if Path(self.template).suffix.lower() != ".png":
            raise UsageError(f"output '{self.template}' must end in .png, or be a folder (end it with a slash)")

    def path(self, recipe: Recipe, taken: set[Path]) -> Path:
        """The path for a picture; `taken` holds those promised to others of the same run.

        Raises:
            InputError: the path is taken and may not be overwritten.
        """
        fields = {
            "date": date.today().isoformat(),
            "prompt": slug(recipe.prompt),
            "seed": recipe.seed,
            "model": slug(recipe.model),
        }
        path = Path(self.template.format(number="{number}", **fields))
        if "{number}" in path.name:
            # One number a picture: whatever stands in the folder under a number keeps it to itself.
            used = _numbers(path, [*_siblings(path.parent), *taken])
            path = path.with_name(path.name.replace("{number}", f"{max(used, default=0) + 1:04d}"))
        if path in taken:
            raise UsageError(f"several pictures would be written to {path}: add {{seed}} or {{number}} to the name")
        for file in (path, *(path.with_suffix(suffix) for suffix in COMPANIONS)):
            refuse_existing(file, overwrite=self.overwrite)
        return path


def naming(output: str, *, overwrite: bool = False) -> Naming:
    """A naming from the user's --output: a template, a file, or a folder."""
    if output.endswith(("/", "\\")) or Path(output).is_dir():
        return Naming(str(Path(output) / IN_FOLDER), overwrite)
    return Naming(output, overwrite)


def refuse_existing(path: Path, *, overwrite: bool) -> None:
    """Raises InputError if a file to be written is there already and may not be replaced."""
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists: choose another name, or pass --overwrite")


def slug(text: str) -> str:
    """Letters and digits of any script, joined by dashes, at most 40 characters."""
    return "-".join(re.findall(r"\w+", text.lower()))[:40].strip("-_") or "picture"


def write_picture(image: "Image", record: PictureRecord | None, path: Path, *, overwrite: bool) -> None:
    """Writes a PNG whole or not at all; `record` None leaves the metadata out."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    if record is not None:
        info.add_itxt("parameters", record.parameters())
        info.add_itxt("mos", record.to_json())
    with atomic_file(path, overwrite) as temporary:
        image.save(temporary, pnginfo=info)


def read_picture(path: Path) -> tuple["Image", PictureRecord]:
    """Opens a picture of ours with its record.

    Raises:
        InputError: it cannot be read, is no picture, or carries no record this version understands.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
            text = opened.info.get("mos")
    except UnidentifiedImageError:
        raise InputError(f"{path} is not a picture") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(text, str):
        raise InputError(f"{path} carries no recipe: it was not made by mos, or its metadata was removed")
    try:
        return image, PictureRecord.model_validate_json(text)
    except ValidationError as error:
        raise InputError(f"the recipe in {path} is damaged or of another version: {first_problem(error)}") from None


def _siblings(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _numbers(path: Path, others: list[Path]) -> list[int]:
    """The numbers that stand where the name has its own."""
    before = path.name.partition("{number}")[0]
    found = [re.match(re.escape(before) + r"(\d{4,})", other.name) for other in others if other.parent == path.parent]
    return [int(match[1]) for match in found if match]
