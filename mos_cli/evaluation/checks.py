"""Does a picture show what its prompt asked for? One check per category, on what the judge has seen in it."""

from collections.abc import Callable, Sequence

from mos_cli.datasets.scenes.description import Description, Thing
from mos_cli.evaluation.judge import Detection
from mos_cli.evaluation.scenebench import Category, Entry

MARGIN = 0.08
"""How far apart two centres must be to stand in a relation, in picture widths."""

Seen = Sequence[Detection]


def passes(entry: Entry, seen: Seen) -> bool:
    """Whether the check of the entry's category holds."""
    return _CHECKS[entry.category](entry.description, seen)


def _all_found(description: Description, seen: Seen) -> bool:
    return all(_of(thing, seen) for thing in description.things)


def _counted(description: Description, seen: Seen) -> bool:
    return all(len(_of(thing, seen)) == thing.count for thing in description.things)


def _coloured(description: Description, seen: Seen) -> bool:
    """Every thing is found in its own colour."""
    return all(any(one.colour == thing.colour for one in _of(thing, seen)) for thing in description.things)


def _placed(description: Description, seen: Seen) -> bool:
    first, second = (_of(thing, seen) for thing in description.things)
    return any(_stands(description.relation, a, b) for a in first for b in second)


def _styled(description: Description, seen: Seen) -> bool:
    return all(any(one.style == description.style for one in _of(thing, seen)) for thing in description.things)


_CHECKS: dict[Category, Callable[[Description, Seen], bool]] = {
    "single": _all_found,
    "two": _all_found,
    "counting": _counted,
    "colour": _coloured,
    "position": _placed,
    "binding": _coloured,
    "style": _styled,
}


def _of(thing: Thing, seen: Seen) -> list[Detection]:
    return [one for one in seen if one.word == thing.word]


def _stands(relation: str | None, a: Detection, b: Detection) -> bool:
    """Whether `a` is left of, right of, above or below `b`, by the margin and more so than along the other axis."""
    right, down = a.x - b.x, a.y - b.y
    towards = {"left": -right, "right": right, "above": -down, "below": down}
    aside = down if relation in ("left", "right") else right
    return relation in towards and towards[relation] > max(MARGIN, abs(aside))
