"""SceneBench's checks: whether the detections in a picture match its prompt, one check per category."""

from collections.abc import Callable, Sequence

from mos_cli.datasets.scenes.description import Description, Thing
from mos_cli.evaluation.judge import Detection
from mos_cli.evaluation.scenebench import Category, Entry

MARGIN = 0.08
"""The least distance of two centres in a relation, in picture widths."""

Detections = Sequence[Detection]


def passes(entry: Entry, detections: Detections) -> bool:
    """Whether the check of the entry's category holds."""
    return _CHECKS[entry.category](entry.description, detections)


def _all_found(description: Description, detections: Detections) -> bool:
    return all(_of(thing, detections) for thing in description.things)


def _counted(description: Description, detections: Detections) -> bool:
    return all(len(_of(thing, detections)) == thing.count for thing in description.things)


def _coloured(description: Description, detections: Detections) -> bool:
    """Whether every thing is found in its colour."""
    return all(any(one.colour == thing.colour for one in _of(thing, detections)) for thing in description.things)


def _placed(description: Description, detections: Detections) -> bool:
    first, second = (_of(thing, detections) for thing in description.things)
    return any(_stands(description.relation, a, b) for a in first for b in second)


def _styled(description: Description, detections: Detections) -> bool:
    return all(any(one.style == description.style for one in _of(thing, detections)) for thing in description.things)


_CHECKS: dict[Category, Callable[[Description, Detections], bool]] = {
    "single": _all_found,
    "two": _all_found,
    "counting": _counted,
    "colour": _coloured,
    "position": _placed,
    "binding": _coloured,
    "style": _styled,
}


def _of(thing: Thing, detections: Detections) -> list[Detection]:
    return [one for one in detections if one.word == thing.word]


def _stands(relation: str | None, a: Detection, b: Detection) -> bool:
    """Whether `a` is left of, right of, above or below `b`, by more than the margin and than along the other axis."""
    right, down = a.x - b.x, a.y - b.y
    towards = {"left": -right, "right": right, "above": -down, "below": down}
    aside = down if relation in ("left", "right") else right
    return relation in towards and towards[relation] > max(MARGIN, abs(aside))
