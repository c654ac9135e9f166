"""The files that stand beside a picture: its trace and its previews, and which of them were made with it."""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mos_cli.config.recipe import PictureRecord, pixels_hash
from mos_cli.errors import InputError
from mos_cli.images.outputs import SUFFIXES, read_stored
from mos_cli.utils.files import NameTakenError, refuse_existing, sha256_of, write_all

if TYPE_CHECKING:
    from PIL.Image import Image

TRACE_SCHEMA, FORMER_TRACE_SCHEMA, PREVIEWS_SCHEMA = "mos-trace/2", "mos-trace/1", "mos-previews/1"
ARRAYS_SUFFIX = ".routing.safetensors"
PREVIEWS_SUFFIX = ".steps.webp"
PREVIEW = 128
"""Largest side of a step's preview, in pixels."""
_IMAGE_DESCRIPTION = 0x010E
"""The EXIF tag that says which picture the previews belong to."""


class Companions(NamedTuple):
    """The files of a trace beside a picture: its head, its arrays, and the previews of the steps."""

    head: Path
    arrays: Path
    previews: Path


def companions(path: Path) -> Companions:
    """The paths of the files beside a picture, or beside the head of its trace.

    Their suffixes replace that of a PNG, and follow that of another format: `a.json` beside `a.png`, `a.jpg.json`
    beside `a.jpg`.

    Raises:
        InputError: the path has no name, as "." and "/".
    """
    if not path.name:
        raise InputError(f"'{path}' is a folder: name a picture or the .json beside it")
    if SUFFIXES.get(path.suffix.lower(), "PNG") != "PNG":
        path = path.with_name(f"{path.name}.png")
    return Companions(*(path.with_suffix(suffix) for suffix in (".json", ARRAYS_SUFFIX, PREVIEWS_SUFFIX)))


def pictures_beside(path: Path) -> list[Path]:
    """The pictures that are there of those that the head of a trace can belong to; of a picture, itself."""
    if path.suffix.lower() in SUFFIXES:
        found = [path]
    else:
        found = [path.with_suffix(".png")]
        if Path(path.stem).suffix.lower() in SUFFIXES:
            found.insert(0, path.with_suffix(""))
    return [other for other in found if other.is_file()]


def check_name(path: Path, overwrite: bool) -> None:
    """Checks that a picture can be written to `path`, and its companions beside it.

    With `overwrite`, the picture may be replaced, and the companions that were made with it. Any other file beside it
    is the user's or another picture's.

    Raises:
        NameTakenError: a file is there that has to stay.
    """
    refuse_existing(path, overwrite)
    beside = [other for other in companions(path) if os.path.lexists(other)]
    own = own_companions(path) if beside else ()
    for other in beside:
        if other not in own:
            raise NameTakenError(f"{other} was not made with {path} and stays: move it away, or choose another name")


def own_companions(path: Path) -> tuple[Path, ...]:
    """The companions that were made with the picture at `path`, by the hash of its pixels that they hold.

    Traces of mos 0.1.0 hold none: they are the picture's if their recipe and provenance are, and its previews of that
    version cannot be told from another's.
    """
    try:
        image, record = read_stored(path)
    except InputError:
        return ()
    sha256 = pixels_hash(image)
    beside, found = companions(path), []
    head = _read_head(beside.head)
    match = belongs(head, sha256, record)
    if match or (match is None and record is not None):
        found.append(beside.head)
        arrays = head.get("arrays")
        named = arrays.get("sha256") if isinstance(arrays, dict) else None
        if beside.arrays.is_file() and sha256_of(beside.arrays) == named:
            found.append(beside.arrays)
    if _described_picture(beside.previews) == sha256:
        found.append(beside.previews)
    return tuple(found)


def write_picture(files: Mapping[Path, bytes], overwrite: bool) -> list[Path]:
    """Writes a picture, the first of `files`, and its companions: all of them or none.

    Returns:
        The files written, the picture first.

    Raises:
        NameTakenError: as `check_name`.
        InputError: the folder cannot be written.
    """
    path = next(iter(files))
    check_name(path, overwrite)
    # What a replaced picture had beside it would describe the new one wrongly.
    outdated = [other for other in own_companions(path) if other not in files] if overwrite else []
    write_all(files, overwrite, remove=outdated)
    return list(files)


def belongs(head: dict[str, Any], sha256: str, record: PictureRecord | None) -> bool | None:
    """Whether the head of a trace belongs to a picture, by its file's pixels; None if it cannot be said.

    Args:
        head: the head as JSON.
        record: the picture's, which is all that a trace of mos 0.1.0 can be compared with.
    """
    if head.get("schema") == TRACE_SCHEMA:
        return head.get("picture") == sha256
    if head.get("schema") != FORMER_TRACE_SCHEMA:
        return False
    if record is None:
        return None
    try:
        same = PictureRecord.model_validate({"schema": "mos-picture/1", "recipe": head["recipe"], "made": head["made"]})
    except (KeyError, ValueError):
        return False
    return None if (same.recipe, same.made) == (record.recipe, record.made) else False


def animation(frames: "Sequence[Image]", picture: str) -> bytes:
    """The previews of the steps as an animated WebP, each at most PREVIEW pixels wide and high.

    Args:
        picture: the hash of the pixels of the picture that they belong to.
    """
    from io import BytesIO

    from PIL import Image

    small = [frame.convert("RGB") for frame in frames]
    for frame in small:
        frame.thumbnail((PREVIEW, PREVIEW), Image.Resampling.LANCZOS)
    exif = Image.Exif()
    exif[_IMAGE_DESCRIPTION] = f"{PREVIEWS_SCHEMA} {picture}"
    file = BytesIO()
    # Keeps equal frames, which would be merged otherwise.
    options = {"duration": 120, "loop": 0, "quality": 85, "minimize_size": False, "kmin": 1, "kmax": 1, "exif": exif}
    small[0].save(file, format="WEBP", save_all=True, append_images=small[1:], **options)
    return file.getvalue()


def _read_head(path: Path) -> dict[str, Any]:
    """The head of a trace as JSON; empty if it is none."""
    try:
        head = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return head if isinstance(head, dict) else {}


def _described_picture(path: Path) -> str | None:
    """The hash of the picture that previews belong to; None if they do not say."""
    from PIL import Image

    try:
        with warnings.catch_warnings(), Image.open(path, formats=["WEBP"]) as opened:
            warnings.simplefilter("ignore")
            text = opened.getexif().get(_IMAGE_DESCRIPTION)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    schema, _, sha256 = str(text).partition(" ")
    return sha256 if schema == PREVIEWS_SCHEMA else None
