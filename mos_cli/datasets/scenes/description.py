"""The content of a picture as data, from which its caption and its scene are both made.

Some combinations are held out of training, so that evaluations measure composition and not memory.
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
    """One noun phrase: a word of the vocabulary, a number, and the colour of the paint, if any."""

    word: str
    count: int = Field(default=1, ge=1, le=MOST_OBJECTS)
    colour: str | None = None
    size: Size | None = None


class Description(Migrated):
    """A picture: its things and their relation, its style and background.

    Attributes:
        relation: the position of the first of two things relative to the second.
        place: of a single thing on the canvas; None is the middle.
        arrangement: of several objects; None leaves it open.
        style: name of an art set; `style_named`: whether the caption mentions it.
        background: its name; None is white, which captions do not mention.
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
        """The number of objects in the picture."""
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
