"""The art file: the pictures of open emoji sets, drawn, named and credited, as a tensor and a manifest."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationError

from mos_cli.errors import InputError
from mos_cli.utils.files import sha256_of
from mos_cli.utils.folders import cache_folder
from mos_cli.utils.validation import Frozen

if TYPE_CHECKING:
    import torch

SCHEMA = "mos-art/1"


class ArtPackage(Frozen):
    """A package and its pinned version."""

    package: str
    version: str
    sha256: str
    licence: str


class ArtStyle(ArtPackage):
    """One set of pictures: its style, its credit, and the number of its pictures in the file."""

    style: str
    credit: str
    pictures: int


class ArtCounts(Frozen):
    """The numbers of pictures and concepts in the file, and of dropped pictures by reason."""

    pictures: int
    concepts: int
    dropped: dict[str, int]


class ArtPicture(Frozen):
    """One row of the pixel tensor: its concept, names and style."""

    index: int
    concept: str
    name: str
    keywords: tuple[str, ...]
    group: str
    subgroup: str
    style: str


class ArtManifest(Frozen):
    """The manifest of an art file; `sha256` is that of the pixel file."""

    schema_id: Literal["mos-art/1"] = Field(alias="schema")
    size: int
    sha256: str
    sets: tuple[ArtStyle, ...]
    annotations: tuple[ArtPackage, ...]
    counts: ArtCounts
    pictures: tuple[ArtPicture, ...]


@dataclass(frozen=True)
class Art:
    """An open art file: `pixels` is uint8 [N, S, S, 4], premultiplied RGBA, memory-mapped."""

    manifest: ArtManifest
    pixels: "torch.Tensor"


def data_folder() -> Path:
    """The default folder of art files."""
    return cache_folder() / "data"


def load_manifest(path: Path) -> ArtManifest:
    """Reads and checks a manifest; raises InputError if it is missing, damaged, or of an unknown schema."""
    try:
        head = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}; `mos data build` makes it") from None
    except ValueError:
        raise InputError(f"{path} is damaged: it is not JSON; build it again with `mos data build`") from None
    found = head.get("schema") if isinstance(head, dict) else None
    if found != SCHEMA:
        raise InputError(f"{path} has the schema {found!r}; this version of mos reads {SCHEMA}")
    try:
        return ArtManifest.model_validate(head)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise InputError(f"{path} is damaged at {where}; build it again with `mos data build`") from None


def load_art(path: Path) -> Art:
    """Opens an art file by its manifest, or by the folder that holds one, without reading the pixels yet.

    Raises InputError if there is none, if a folder holds several, or if manifest and pixels are damaged, do
    not belong together, or have an unknown schema.
    """
    import safetensors

    path = manifest_path(Path(path))
    manifest = load_manifest(path)
    pixels_path = path.with_suffix(".safetensors")
    try:
        with safetensors.safe_open(pixels_path, framework="pt") as file:
            schema = (file.metadata() or {}).get("schema")
            pixels = file.get_tensor("pixels")
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"cannot read {pixels_path}: {error}; build it again with `mos data build`") from None
    if sha256_of(pixels_path) != manifest.sha256:
        raise InputError(f"{pixels_path} is damaged or of another build; build both again with `mos data build`")
    size, count = manifest.size, len(manifest.pictures)
    if schema != SCHEMA or tuple(pixels.shape) != (count, size, size, 4):
        raise InputError(f"{pixels_path} does not belong to {path.name}; build both again with `mos data build`")
    return Art(manifest, pixels)


def manifest_path(path: Path) -> Path:
    """The manifest at `path`, or the only one in that folder; raises InputError if there is none or several.

    The pixels are found by the manifest, so a path of theirs is an error too.
    """
    if path.suffix.lower() == ".safetensors":
        raise InputError(f"{path} holds pixels only: give {path.with_suffix('.json').name}, or the folder with both")
    if not path.is_dir():
        return path
    found = sorted(path.glob("art-*.json"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise InputError(f"no art in {path}; `mos data build --out {path}` makes it")
    raise InputError(f"{path} holds art of several sizes ({', '.join(file.name for file in found)}): name one file")
