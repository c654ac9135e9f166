"""A picture as named objects at known places: what an edit is thought up in, drawn from, and checked against.

Lengths and places are in canvas widths; x grows to the right, y downwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Self

from mos_cli.datasets.scenes.description import Relation
from mos_cli.datasets.scenes.grounds import ground
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
"""Spots in reading order, none of which overlaps another; the four corners come as often as three plans."""
ALONE: Spot = (MIDDLE, MIDDLE, 0.7)
LOW, HIGH = 0.38, 0.62
"""Where 'left' ends and 'right' begins; the same from top to bottom."""
APART = 0.2
"""How much further to one side than another an object must be to be beyond it."""
LEVEL = 0.15
"""How far apart objects may be and still stand side by side or one above the other."""
NEIGHBOURS = 0.6
"""How far apart neighbours are at most."""


@dataclass(frozen=True)
class Item:
    """An object: its word, the hand that drew it, centre and side, its paint if it is painted, and whether it is
    flipped left to right."""

    word: str
    style: str
    x: float
    y: float
    side: float
    colour: str | None = None
    mirrored: bool = False

    @property
    def place(self) -> str | None:
        """Where on the canvas it is, as `captions.PLACES` has it; None is the middle."""
        across = "left" if self.x < LOW else "right" if self.x > HIGH else ""
        down = "top" if self.y < LOW else "bottom" if self.y > HIGH else ""
        return f"{down} {across}".strip() or None

    def at(self, x: float, y: float) -> Self:
        """The same object, as large as it is, somewhere else."""
        return replace(self, x=x, y=y)


@dataclass(frozen=True)
class Composition:
    """Items from back to front and the name of a ground; None is white."""

    items: tuple[Item, ...]
    ground: str | None = None

    def scene(self, vocabulary: Vocabulary) -> Scene:
        """What the compositor draws."""
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
        return Scene(tuple(placed), ground(self.ground))

    def with_item(self, index: int, item: Item) -> Self:
        """One item as another."""
        return replace(self, items=(*self.items[:index], item, *self.items[index + 1 :]))

    def without(self, index: int) -> Self:
        """One item less."""
        return replace(self, items=(*self.items[:index], *self.items[index + 1 :]))

    def mirrored(self) -> Self:
        """The mirror image, left to right; every ground is its own."""
        items = (replace(item, x=round(1 - item.x, 4), mirrored=not item.mirrored) for item in self.items)
        return replace(self, items=tuple(items))


def choose_spots(count: int, random: Random) -> list[Spot]:
    """At least `count` spots of one plan in reading order, each a little out of its place."""
    return [jittered(spot, random) for spot in random.choice([plan for plan in PLANS if len(plan) >= count])]


def free_spots(items: Sequence[Item], count: int) -> list[Spot]:
    """The spots for `count` more objects: the first in reading order of the first plan that all items stand on and
    that has room for so many.

    They follow from what is seen, so that "two more" has one answer.
    """
    for plan in PLANS:
        free = [spot for spot in plan if not any(_stands_on(item, spot) for item in items)]
        if len(plan) - len(free) == len(items) and len(free) >= count:
            return free[:count]
    raise ValueError("these items stand on no plan that has room")


def _stands_on(item: Item, spot: Spot) -> bool:
    return max(abs(item.x - spot[0]), abs(item.y - spot[1])) < 2 * JITTER


def jittered(spot: Spot, random: Random) -> Spot:
    """A spot nearby, rounded to what a data file keeps."""
    x, y, side = spot
    return (
        round(x + random.uniform(-JITTER, JITTER), 4),
        round(y + random.uniform(-JITTER, JITTER), 4),
        round(side * random.uniform(0.9, 1.05), 4),
    )


def relation_of(item: Item, anchor: Item) -> Relation | None:
    """Where an object is seen from a neighbour straight to one side of it."""
    right, down = item.x - anchor.x, item.y - anchor.y
    if abs(down) < LEVEL and APART < abs(right) < NEIGHBOURS:
        return "right" if right > 0 else "left"
    if abs(right) < LEVEL and APART < abs(down) < NEIGHBOURS:
        return "below" if down > 0 else "above"
    return None


def way(item: Item, moved: Item) -> str | None:
    """The place an object moves to; only the side, if it moves straight there."""
    for side in (moved.place or "").split():
        axis, across = ("x", "y") if side in ("left", "right") else ("y", "x")
        far = abs(getattr(item, axis) - getattr(moved, axis)) > APART
        if far and abs(getattr(item, across) - getattr(moved, across)) < LEVEL:
            return side
    return moved.place
