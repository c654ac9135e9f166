"""What a picture shows, as data. Captions and scenes are both made from it, so that one says exactly what the other is.

Some combinations are held out of training for good, so that what is measured is composition and not memory.
"""

from typing import Literal, Self
from zlib import crc32

from pydantic import Field, model_validator

from mos_cli.utils.migration import Migrated
from mos_cli.utils.validation import Frozen

MOST_OBJECTS = 4

Relation = Literal["left", "right", "above", "below", "on", "inside", "behind"]
Arrangement = Literal["row", "pile", "ring"]
Size = Literal["small", "big"]
Place = Literal["left", "right", "top", "bottom", "top left", "top right", "bottom left", "bottom right"]


class Thing(Frozen):
    """One noun phrase: a word of the vocabulary, how many of it, and the colour they are painted in, if any."""

    word: str
    count: int = Field(default=1, ge=1, le=MOST_OBJECTS)
    colour: str | None = None
    size: Size | None = None


class Description(Migrated):
    """A whole picture: things, how they stand to each other, the hand that drew them and the ground behind.

    Attributes:
        relation: where the first of two things is, seen from the second.
        place: where on the canvas a single thing is; None is the middle.
        arrangement: how several objects are laid out; None leaves it open.
        style: name of an art set; `style_named` says whether the caption may tell.
        ground: name of a ground; None is white and goes unsaid.
    """

    things: tuple[Thing, ...] = Field(min_length=1, max_length=MOST_OBJECTS)
    relation: Relation | None = None
    place: Place | None = None
    arrangement: Arrangement | None = None
    style: str
    style_named: bool = True
    background: str | None = None

    @property
    def objects(self) -> int:
        """How many objects stand in the picture."""
        return sum(thing.count for thing in self.things)

    @model_validator(mode="after")
    def _can_be_drawn(self) -> Self:
        if self.objects > MOST_OBJECTS:
            raise ValueError(f"a scene has at most {MOST_OBJECTS} objects")
        if self.relation and len(self.things) != 2:
            raise ValueError("a relation holds between two things")
        if self.place and self.objects != 1:
            raise ValueError("a place is that of a single object")
        if self.arrangement and self.objects == 1:
            raise ValueError("an arrangement takes several objects")
        return self


def held_out(first: str, second: str) -> bool:
    """Whether two words never meet in a training scene: one pair in sixteen, whatever the order."""
    return crc32("|".join(sorted((first, second))).encode()) % 16 == 0


def held_out_style(word: str, style: str) -> bool:
    """Whether a word is never drawn in a style in training: one pair in twenty, beside the default style."""
    return style != DEFAULT_STYLE and crc32(f"{word} in {style}".encode()) % 20 == 0


DEFAULT_STYLE = "fluent-3d"
"""The style of a picture whose prompt names none."""
