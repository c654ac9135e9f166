"""The layout of the objects of a description.

A description has one layout; its scenes differ only by a small random shift and scale of each object. `OPEN_RELATION`
and `OPEN_ARRANGEMENT` complete a description. A small network trained with several layouts for one caption draws their
average.

Lengths and places are in canvas widths; x grows to the right, y downwards.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from mos_cli.datasets.scenes.backgrounds import Background, named_background
from mos_cli.datasets.scenes.description import Description, Relation, Thing
from mos_cli.datasets.scenes.vocabulary import COLOURS, RGB, Vocabulary

JITTER = 0.02
NEAR, FAR = 0.27, 0.73
"""The centres of the two halves."""
OPEN_RELATION: Relation = "left"
"""The relation of two things when none is named: left to right, in the order of the caption."""
OPEN_ARRANGEMENT = {2: "row", 3: "pile", 4: "corners"}
"""The arrangement of 2, 3 or 4 objects when none is named."""

Spot = tuple[float, float, float]
"""Centre and side of an object."""


@dataclass(frozen=True)
class Placed:
    """A sprite on the canvas: its row, centre and side, its paint if any, and whether it is flipped left to right."""

    picture: int
    x: float
    y: float
    side: float
    tint: RGB | None = None
    mirrored: bool = False


@dataclass(frozen=True)
class Scene:
    """Objects from back to front, and the background."""

    objects: tuple[Placed, ...]
    background: Background


def lay_out(description: Description, vocabulary: Vocabulary, random: Random) -> Scene:
    """A random scene of a description."""
    spots = _spots(description)
    placed = []
    for thing in description.things:
        picture = vocabulary.words[thing.word].pictures[description.style]
        tint = COLOURS[thing.colour][0] if thing.colour else None
        for _ in range(thing.count):
            x, y, side = spots[len(placed)]
            if description.objects > 1:
                side *= {"small": 0.68, "big": 1.2, None: 1.0}[thing.size]
            side *= random.uniform(0.94, 1.06)
            placed.append(
                Placed(picture, x + random.uniform(-JITTER, JITTER), y + random.uniform(-JITTER, JITTER), side, tint)
            )
    # The last object is in front: with "on" and "inside" the first thing, else the second.
    back_to_front = reversed(placed) if description.relation in ("on", "inside") else placed
    return Scene(tuple(back_to_front), named_background(description.background))


def _spots(description: Description) -> list[Spot]:
    """A spot for every object, in the order in which the things name them."""
    if description.objects == 1:
        return [_single(description)]
    if description.relation in ("on", "inside", "behind"):
        return _touching(description.relation)
    if description.relation or (len(description.things) == 2 and not description.arrangement):
        return _two_groups(description.things, description.relation or OPEN_RELATION)
    return _arranged(description.arrangement or OPEN_ARRANGEMENT[description.objects], description.objects)


def _single(description: Description) -> Spot:
    if description.place is None:
        return 0.5, 0.5, {"small": 0.42, "big": 0.93, None: 0.76}[description.things[0].size]
    x = NEAR if "left" in description.place else FAR if "right" in description.place else 0.5
    y = NEAR if "top" in description.place else FAR if "bottom" in description.place else 0.5
    return x, y, {"small": 0.32, "big": 0.52, None: 0.45}[description.things[0].size]


def _touching(relation: str) -> list[Spot]:
    if relation == "on":
        return [(0.5, 0.3, 0.38), (0.5, 0.68, 0.54)]
    if relation == "inside":
        return [(0.5, 0.52, 0.36), (0.5, 0.5, 0.86)]
    return [(0.5, 0.33, 0.52), (0.5, 0.66, 0.52)]


def _two_groups(things: Sequence[Thing], relation: Relation) -> list[Spot]:
    """The first thing's objects on one side, the second's on the other."""
    upright = relation in ("above", "below")
    firsts_at, seconds_at = (NEAR, FAR) if relation in ("left", "above") else (FAR, NEAR)
    spots = []
    for thing, at in zip(things, (firsts_at, seconds_at), strict=True):
        side = {1: 0.45, 2: 0.4, 3: 0.31}[thing.count]
        for index in range(thing.count):
            across = (index + 0.5) / thing.count
            spots.append((across, at, side) if upright else (at, across, side))
    return spots


def _arranged(shape: str, count: int) -> list[Spot]:
    if shape == "row":
        side = {2: 0.45, 3: 0.31, 4: 0.235}[count]
        return [((index + 0.5) / count, 0.5, side) for index in range(count)]
    if shape == "pile":
        side = {2: 0.44, 3: 0.42, 4: 0.34}[count]
        below = count - 1
        floor = [(0.5 + (index - (below - 1) / 2) * side * 0.92, 0.7, side) for index in range(below)]
        return [*floor, (0.5, 0.7 - side * 0.82, side)]
    if shape == "corners":
        return [(x, y, 0.42) for y in (NEAR, FAR) for x in (NEAR, FAR)]
    turn = {2: math.pi, 3: -math.pi / 2, 4: -math.pi / 2}[count]
    angles = [turn + 2 * math.pi * index / count for index in range(count)]
    return [(0.5 + 0.3 * math.cos(angle), 0.5 + 0.3 * math.sin(angle), 0.34) for angle in angles]
