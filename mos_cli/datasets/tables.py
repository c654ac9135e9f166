"""The `[data]` table of a training recipe."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from PIL import ImageColor
from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from mos_cli.utils.folders import presets_folder
from mos_cli.utils.validation import Frozen, read_toml

LEAST_COMMON = 8
"""The least number of common words, and of the others: all objects of a picture may be of either."""


class CommonWords(Frozen):
    """Words that scenes and edits show more often than the others."""

    words: tuple[str, ...]
    """Names in the art file; in a recipe also a TOML file of words, its own or a preset."""
    share: float = Field(gt=0, lt=1)
    """Share of the objects that are of these words."""


class DataTable(Frozen):
    """Scenes composed from the art file: their words and styles."""

    kind: Literal["scenes"] = "scenes"
    styles: tuple[str, ...] = Field(min_length=1)
    words: dict[str, tuple[str, ...]]
    """Names in the art file to the names captions use; in a recipe also a TOML file, its own or a preset."""
    common: CommonWords | None = None
    edits: float = Field(default=0.0, ge=0, le=1)
    """Share of the steps that train edits of scenes."""

    @model_validator(mode="after")
    def _enough_words(self) -> Self:
        if len(self.words) < 2:
            raise ValueError("a pair takes two words at least")
        if self.edits and (len(self.words) < 8 or len(self.styles) < 2):
            raise ValueError("edits take eight words and two styles at least")
        if self.common is not None:
            common = set(self.common.words)
            if stray := sorted(common - self.words.keys()):
                raise ValueError(f"common has {stray[0]!r}, which is none of the words")
            if min(len(common), len(self.words) - len(common)) < LEAST_COMMON:
                raise ValueError(f"common words and the others are {LEAST_COMMON} each at least")
        return self


class MixedScenes(DataTable):
    """The scenes that a model was trained on, mixed in so that it does not forget them.

    In a recipe that continues a model, the words and styles may be left out: they are those of the model's recipe.
    """

    share: float = Field(gt=0, lt=1)
    """Share of the pictures that are scenes, in steps that do not train edits."""


class CaptionedTable(Frozen):
    """Pictures with captions in files: a folder of both, or of webdataset shards; see `datasets.captioned_folders`."""

    kind: Literal["captioned"]
    path: str
    edits: float = Field(default=0.0, ge=0, le=1)
    """Share of the steps that train its edits."""
    caption: str | None = Field(default=None, min_length=1)
    """That of pictures without one; {folder} and {name} stand for the names of its folder and its file."""
    background: str = "white"
    """The colour behind transparent parts."""
    flip: bool = False
    """Mirror half of the pictures."""
    repeats: dict[str, Annotated[int, Field(ge=1, le=1000, strict=True)]] = Field(default_factory=dict)
    """How many times as often the pictures of a folder are shown, by the folder's name."""
    buckets: bool = False
    """Give pictures sizes near their own shape, with about the canvas's area, instead of cropping them to a square."""
    held_out: float = Field(default=0.0, ge=0, lt=1)
    """Share of the pictures, and of the edits, that are not trained on: the validation loss is theirs."""
    scenes: MixedScenes | None = None

    @field_validator("background")
    @classmethod
    def _is_colour(cls, background: str) -> str:
        try:
            ImageColor.getrgb(background)
        except ValueError:
            raise ValueError(f"{background!r} is no colour: write a name, such as white, or #rrggbb") from None
        return background


def _kind(data: Any) -> str:
    return data.get("kind", "scenes") if isinstance(data, dict) else getattr(data, "kind", "scenes")


Data = Annotated[
    Annotated[DataTable, Tag("scenes")] | Annotated[CaptionedTable, Tag("captioned")],
    Discriminator(_kind, custom_error_type="kind", custom_error_message="kind is neither scenes nor captioned"),
]


def edit_share(data: DataTable | CaptionedTable) -> float:
    """Share of the steps that train edits, those of mixed scenes included."""
    mixed = data.scenes.edits if isinstance(data, CaptionedTable) and data.scenes is not None else 0.0
    return min(1.0, data.edits + mixed)


def with_words(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A `[data]` table with its words read from the files that it names, in `folder` or among the presets.

    Raises:
        InputError: a file does not exist, or it is not TOML.
    """
    if isinstance(data.get("scenes"), dict):
        data = data | {"scenes": with_words(data["scenes"], folder)}
    common = data.get("common")
    if isinstance(common, dict) and isinstance(common.get("words"), str):
        data = data | {"common": common | {"words": tuple(_word_file(common["words"], folder))}}
    if isinstance(data.get("words"), str):
        data = data | {"words": _word_file(data["words"], folder)}
    return data


def _word_file(name: str, folder: Path) -> dict[str, Any]:
    own = folder / name
    return read_toml(own if own.is_file() else presets_folder() / name)
