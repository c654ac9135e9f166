"""Pictures with their records as files: PNG, JPEG or WebP by the suffix of the name; writing and reading them."""

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import ValidationError

from mos_cli.config.recipe import EarlierPicture, PictureRecord, Recipe, StoredFormat, StoredPixels, pixels_hash
from mos_cli.errors import InputError, UsageError
from mos_cli.images.records import exif, png_text, record_text
from mos_cli.utils.validation import first_problem

if TYPE_CHECKING:
    from PIL.Image import Image

    from mos_cli.images.inputs import Inputs
    from mos_cli.images.pictures import PictureFile

PictureFormat = Literal["PNG", StoredFormat]
SUFFIXES: dict[str, PictureFormat] = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""The format of a picture by the suffix of its name."""
SUFFIX_NAMES = ".png, .jpg, .jpeg or .webp"
_OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"lossless": True, "exact": True},
}
_LONGEST_SIDE = {"JPEG": 65_500, "WEBP": 16_383}
_JPEG_METADATA = 65_000
"""The bytes that a record and the text for other tools can have in a JPEG, whose EXIF data is one segment."""
_PROVENANCE = 4_000
"""More bytes than the part of a record has that is only known when the picture is drawn."""


class Encoded(NamedTuple):
    """The bytes of a file, and the hash of the pixels that it holds: in a JPEG they differ a little from the drawn."""

    data: bytes
    sha256: str


def picture_format(path: Path) -> PictureFormat:
    """The format that a picture is written in under a name; raises UsageError for a suffix of no such format."""
    if (kind := SUFFIXES.get(path.suffix.lower())) is None:
        raise UsageError(f"{path}: the name of a picture ends in {SUFFIX_NAMES}")
    return kind


def encode(image: "Image", kind: PictureFormat, record: PictureRecord | None, *, parameters: bool = True) -> Encoded:
    """A picture as a file of a format, without metadata if `record` is None.

    Args:
        kind: "PNG", "JPEG" (quality 95, colours at full resolution) or "WEBP" (without loss).
        parameters: also with the text for other tools.
    """
    if kind == "PNG":
        return Encoded(png(image, record, parameters=parameters), pixels_hash(image))
    sha256 = pixels_hash(as_stored(image, kind))
    metadata = b""
    if record is not None:
        if sha256 != pixels_hash(image):
            record = record.model_copy(update={"stored": StoredPixels(format=kind, sha256=sha256)})
        metadata = exif(record, parameters=parameters)
    file = BytesIO()
    image.save(file, format=kind, exif=metadata, **_OPTIONS[kind])
    return Encoded(file.getvalue(), sha256)


def as_stored(image: "Image", kind: str) -> "Image":
    """The picture as a file of a format holds it; raises InputError if the format cannot hold it."""
    from PIL import Image

    file = BytesIO()
    try:
        image.save(file, format=kind, **_OPTIONS.get(kind, {}))
    except (OSError, ValueError):
        # A forged record can name any format.
        raise InputError(f"a {kind} cannot hold a picture of {image.width}x{image.height} in {image.mode}") from None
    with Image.open(file, formats=[kind]) as opened:
        return _pixels(opened)


def png(image: "Image", record: PictureRecord | None, *, parameters: bool = True) -> bytes:
    """A picture as a PNG file, without metadata if `record` is None; `parameters`: also as text for other tools."""
    file = BytesIO()
    image.save(file, format="PNG", pnginfo=None if record is None else png_text(record, parameters=parameters))
    return file.getvalue()


def check_recipe_fits(path: Path, recipe: Recipe, inputs: "Inputs | None", *, with_earlier: bool) -> None:
    """Raises UsageError if the format of a file cannot hold what a recipe draws; called before it is drawn.

    Args:
        with_earlier: the file also holds the recipes of what the picture is edited from.
    """
    size, transparent, earlier = (recipe.width, recipe.height), False, ()
    if inputs is not None and recipe.edit is not None:
        source = inputs.pictures[0].image
        kept = recipe.edit.keep_alpha or (recipe.edit.composite and size == source.size)
        transparent = kept and source.mode == "RGBA"
        earlier = inputs.earlier if with_earlier else ()
    check_fits(path, size, transparent=transparent, metadata=_PROVENANCE + _length(recipe, earlier))


def check_fits(path: Path, size: tuple[int, int], *, transparent: bool, metadata: int) -> None:
    """Raises UsageError if the format of a file cannot hold a picture.

    Args:
        size: width and height in pixels.
        metadata: bytes of its record and the text for other tools.
    """
    kind = picture_format(path)
    if max(size) > (longest := _LONGEST_SIDE.get(kind, max(size))):
        raise UsageError(f"{path}: a {kind} has at most {longest} pixels a side: choose a name that ends in .png")
    if kind == "JPEG" and transparent:
        raise UsageError(f"{path}: a JPEG cannot be transparent: choose a name that ends in .png or .webp")
    if kind == "JPEG" and metadata > _JPEG_METADATA:
        raise UsageError(
            f"{path}: a JPEG is too small for this recipe with its history: choose a name that ends in .png or .webp"
        )


def metadata_length(record: PictureRecord, *, parameters: bool) -> int:
    """Bytes of a record, and of the text for other tools, in a JPEG or WebP."""
    return len(exif(record, parameters=parameters))


def _length(recipe: Recipe, earlier: tuple[EarlierPicture, ...]) -> int:
    """Bytes of a recipe as a record and as text for other tools, and of those before it."""
    texts = [one.model_dump_json(exclude_none=True) for one in (recipe, *earlier)]
    return sum(len(text.encode()) for text in texts) + 2 * len(recipe.prompt + recipe.negative)


def read_stored(file: "PictureFile") -> tuple["Image", PictureRecord | None]:
    """The picture in a file as it is stored, RGBA or RGB, and its record; None if there is none that can be read.

    Raises:
        InputError: it cannot be read, or is no picture.
    """
    image, text = _read(file)
    try:
        return image, None if text is None else PictureRecord.model_validate_json(text)
    except ValidationError:
        return image, None


def read_drawing(file: "PictureFile") -> tuple["Image", PictureRecord]:
    """Opens a picture made by mos, with its record.

    Raises:
        InputError: it cannot be read, is not a picture, or has no record that this version can read.
    """
    from mos_cli.images.pictures import name_of

    image, text = _read(file)
    if text is None:
        raise InputError(f"{name_of(file)} carries no recipe: it was not made by mos, or its metadata was removed")
    try:
        return image, PictureRecord.model_validate_json(text)
    except ValidationError as error:
        problem = first_problem(error)
        raise InputError(f"the recipe in {name_of(file)} is damaged or of another version: {problem}") from None


def drawn_hash(image: "Image", record: PictureRecord) -> str:
    """The hash of the pixels that were drawn, for the picture of a file and its record.

    Those of the file may differ because of its format, if no other program has changed them since.
    """
    sha256 = pixels_hash(image)
    unchanged = record.stored is not None and record.stored.sha256 == sha256
    return record.sha256 if unchanged and record.sha256 is not None else sha256


def _read(file: "PictureFile") -> tuple["Image", str | None]:
    from mos_cli.images.pictures import opened_picture

    with opened_picture(file) as (opened, _):
        return _pixels(opened), record_text(opened)


def _pixels(opened: "Image") -> "Image":
    return opened.convert("RGBA" if opened.mode == "RGBA" else "RGB")
