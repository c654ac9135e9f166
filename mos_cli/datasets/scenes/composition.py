"""A picture as named objects at known places. Edits are made of it, drawn from it and checked against it.

Lengths and places are in canvas widths; x grows to the right, y downwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Self

from mos_cli.datasets.scenes.backgrounds import named_background
from mos_cli.datasets.scenes.description import Relation
from mos_cli.datasets.scenes.layout import FAR, JITTER, NEAR, Placed, Scene, Spot
from mos_cli.datasets.scenes.vocabulary import COLOURS, Vocabulary

MIDDLE = 0.5
PLANS: tuple[tuple[Spot, ...], ...] = (
    ((NEAR, MIDDLE, 0.45), (FAR, MIDDLE, 0.45)),
    ((MIDDLE, NEAR, 0.45), (MIDDLE, FAR, 0.45)),
    ((NEAR, NEAR, 0.45), (FAR, FAR, 0.45)),
    ((FAR, NEAR, 0.45), (NEAR, FAR, 0.45)),
    ((0.18, MIDDLE, 0.31), (MIDDLE, MIDDLE, 0.31), (0.82, MIDDLE, 0.31)),
    ((MIDDLE, 0.18, 0.31), (MIDDLE, MIDDLE, 0.31), (MIDDLE, 0.82, 0.31)),
    ((MIDDLE, NEAR, 0.42), (NEAR, FAR, 0.42), (FAR, FAR, 0.42)),
    ((NEAR, NEAR, 0.42), (FAR, NEAR, 0.42), (MIDDLE, FAR, 0.42)),
    *[((NEAR, NEAR, 0.42), (FAR, NEAR, 0.42), (NEAR, FAR, 0.42), (FAR, FAR, 0.42))] * 3,
)
"""Spots in reading order that do not overlap; the four corners have the weight of three plans."""
ALONE: Spot = (MIDDLE, MIDDLE, 0.7)
LOW, HIGH = 0.38, 0.62
"""Where 'left' ends and 'right' begins; the same from top to bottom."""
APART = 0.2
"""The least distance along an axis at which one object counts as left of, above etc. another."""
LEVEL = 0.15
"""The largest distance across an axis at which two objects are side by side, or one above the other."""
NEIGHBOURS = 0.6
"""The largest distance of neighbours."""


@dataclass(frozen=True)
class Item:
    """An object: its word, style, centre and side, its paint if any, and whether it is flipped left to right."""

    word: str
    style: str
    x: float
    y: float
    side: float
    colour: str | None = None
    mirrored: bool = False

    @property
    def place(self) -> str | None:
        """Its place on the canvas, a key of `captions.PLACES`; None is the middle."""
        across = "left" if self.x < LOW else "right" if self.x > HIGH else ""
        down = "top" if self.y < LOW else "bottom" if self.y > HIGH else ""
        return f"{down} {across}".strip() or None

    def at(self, x: float, y: float) -> Self:
        """The same object at another place."""
        return replace(self, x=x, y=y)


@dataclass(frozen=True)
class Composition:
    """Items from back to front and the name of a background; None is white."""

    items: tuple[Item, ...]
    background: str | None = None

    def scene(self, vocabulary: Vocabulary) -> Scene:
        """The scene for the compositor."""
        placed = (
            Placed(
                vocabulary.words[item.word].pictures[item.style],
                item.x,
                item.y,
                item.side,
                COLOURS[item.colour][0] if item.colour else None,
                item.mirrored,
            )
            for item in self.items
        )
        return Scene(tuple(placed), named_background(self.background))

    def with_item(self, index: int, item: Item) -> Self:
        """With one item replaced."""
        return replace(self, items=(*self.items[:index], item, *self.items[index + 1 :]))

    def without(self, index: int) -> Self:
        """With one item removed."""
        return replace(self, items=(*self.items[:index], *self.items[index + 1 :]))

    def mirrored(self) -> Self:
        """The mirror image, left to right; the background does not change."""
        items = (replace(item, x=round(1 - item.x, 4), mirrored=not item.mirrored) for item in self.items)
        return replace(self, items=tuple(items))


def choose_spots(count: int, random: Random) -> list[Spot]:
    """At least `count` spots of a random plan, in reading order, each shifted a little."""
    return [jittered(spot, random) for spot in random.choice([plan for plan in PLANS if len(plan) >= count])]


def free_spots(items: Sequence[Item], count: int) -> list[Spot]:
    """The spots for `count` more objects: the first free ones, in reading order, of the first plan that fits all items.

    They follow from the picture, so that "two more" has one answer.
    """
    for plan in PLANS:
        free = [spot for spot in plan if not any(_stands_on(item, spot) for item in items)]
        if len(plan) - len(free) == len(items) and len(free) >= count:
            return free[:count]
    raise ValueError("no plan fits these items and has enough free spots")


def _stands_on(item: Item, spot: Spot) -> bool:
    return max(abs(item.x - spot[0]), abs(item.y - spot[1])) < 2 * JITTER


def jittered(spot: Spot, random: Random) -> Spot:
    """A spot nearby, rounded to four digits for data files."""
    x, y, side = spot
    return (
        round(x + random.uniform(-JITTER, JITTER), 4),
        round(y + random.uniform(-JITTER, JITTER), 4),
        round(side * random.uniform(0.9, 1.05), 4),
    )


def relation_of(item: Item, anchor: Item) -> Relation | None:
    """The relation of an object to a neighbour that is straight to one side of it."""
    right, down = item.x - anchor.x, item.y - anchor.y
    if abs(down) < LEVEL and APART < abs(right) < NEIGHBOURS:
        return "right" if right > 0 else "left"
    if abs(right) < LEVEL and APART < abs(down) < NEIGHBOURS:
        return "below" if down > 0 else "above"
    return None


def direction(item: Item, moved: Item) -> str | None:
    """The place that an object moves to; only the side, if it moves straight there."""
    for side in (moved.place or "").split():
        axis, across = ("x", "y") if side in ("left", "right") else ("y", "x")
        far = abs(getattr(item, axis) - getattr(moved, axis)) > APART
        if far and abs(getattr(item, across) - getattr(moved, across)) < LEVEL:
            return side
    return moved.place
