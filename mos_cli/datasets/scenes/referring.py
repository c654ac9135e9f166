"""Referring expressions: phrases for one object of a composition, by its name, colour, place, size or kind.

A phrase fits no other object of the composition. The names of words must not be ambiguous; see `confusable`.
"""

import tomllib
from collections.abc import Callable, Iterable
from functools import cache
from random import Random

from mos_cli.datasets.scenes.captions import PLACES
from mos_cli.datasets.scenes.composition import APART, LEVEL, Item
from mos_cli.datasets.scenes.vocabulary import COLOURS, Vocabulary
from mos_cli.utils.folders import presets_folder

LARGER = 1.4
"""The least ratio of sides between the big object and the others."""
SIDES: dict[str, tuple[str, int, tuple[str, ...], str]] = {
    "left": ("x", -1, ("left", "left-hand"), "leftmost"),
    "right": ("x", 1, ("right", "right-hand"), "rightmost"),
    "top": ("y", -1, ("top", "upper"), "topmost"),
    "bottom": ("y", 1, ("bottom", "lower"), "lowest"),
}
"""Axis, direction, and the adjectives for the object on this side, of two and of more objects."""
ALONE = ("it", "it", "the object", "the thing")
NOUNS = ("one", "one", "object")
BIG, BIGGEST = ("big", "large", "bigger", "larger"), ("biggest", "largest")
SMALL, SMALLEST = ("small", "little", "smaller"), ("smallest",)
"""The adjectives for the object of another size, of two and of more objects."""

Others = list[Item]


def refer(index: int, items: tuple[Item, ...], vocabulary: Vocabulary, random: Random) -> str | None:
    """'the cat', 'the red one', 'the one on the left', 'the animal'; None if no phrase is unambiguous."""
    item, others = items[index], [*items[:index], *items[index + 1 :]]
    if not others and random.random() < 0.3:
        return random.choice(ALONE)
    ways: list[Callable[[Item, Others, Vocabulary, Random], str | None]]
    ways = random.sample((_by_place, _by_colour, _by_size, _by_group), 4)
    ways.insert(0 if random.random() < 0.5 else 4, _by_name)
    return next((phrase for way in ways if (phrase := way(item, others, vocabulary, random))), None)


def name(item: Item, vocabulary: Vocabulary, random: Random) -> str:
    """One of an object's names, without a colour if it is painted."""
    return random.choice(vocabulary.words[item.word].names_for(counted=False, painted=item.colour is not None))


def colour_name(colour: str, random: Random) -> str:
    """A name of a paint, mostly the plain one."""
    named = COLOURS[colour][1]
    return named[0] if random.random() < 0.75 else random.choice(named)


def confusable(words: Iterable[tuple[str, tuple[str, ...]]]) -> frozenset[frozenset[str]]:
    """Pairs of words of which one name may mean both, as 'fish' a tropical fish, or 'bird' an owl.

    A name of one ends with a name of the other, or is the kind of the other in `groups`.

    Args:
        words: names in the art file with the names captions use.
    """
    ends: dict[str, set[str]] = {}
    known = {word for word, _ in words}
    for word, names in words:
        for called in names:
            parts = called.split()
            for start in range(len(parts)):
                ends.setdefault(" ".join(parts[start:]), set()).add(word)
    pairs = (
        frozenset((word, other))
        for word, names in words
        for called in names
        for other in ends[called].union(*groups().get(called, ())) & known
        if other != word
    )
    return frozenset(pairs)


def _by_name(item: Item, others: Others, vocabulary: Vocabulary, random: Random) -> str | None:
    if any(other.word == item.word for other in others):
        return None
    called = name(item, vocabulary, random)
    if item.colour and random.random() < 0.4:
        return f"the {colour_name(item.colour, random)} {called}"
    return f"the {called}"


def _by_colour(item: Item, others: Others, vocabulary: Vocabulary, random: Random) -> str | None:
    """Unpainted objects have unknown colours, so the others must be painted, too."""
    pool, noun = _pool(item, others, vocabulary, random)
    if item.colour is None or not pool or any(other.colour in (None, item.colour) for other in pool):
        return None
    return f"the {colour_name(item.colour, random)} {noun}"


def _by_place(item: Item, others: Others, vocabulary: Vocabulary, random: Random) -> str | None:
    pool, noun = _pool(item, others, vocabulary, random)
    if not pool:
        return None
    phrases = []
    if item.place and all(any(_beyond(item, other, side) for side in item.place.split()) for other in pool):
        phrases.append(f"the {noun} {random.choice(PLACES[item.place])}")
    for side, (axis, _, pairwise, extreme) in SIDES.items():
        if not all(_beyond(item, other, side) for other in pool):
            continue
        across = "y" if axis == "x" else "x"
        if any(abs(getattr(item, across) - getattr(other, across)) > LEVEL for other in pool):
            continue
        called = random.choice(pairwise) if len(pool) == 1 else extreme
        phrases.append(f"the {called} {noun}")
    if _between(item, pool):
        phrases.append(random.choice((f"the middle {noun}", f"the {noun} in the middle")))
    return random.choice(phrases) if phrases else None


def _by_size(item: Item, others: Others, vocabulary: Vocabulary, random: Random) -> str | None:
    pool, noun = _pool(item, others, vocabulary, random)
    if not pool:
        return None
    if all(item.side > LARGER * other.side for other in pool):
        words = BIG if len(pool) == 1 else BIGGEST
    elif all(LARGER * item.side < other.side for other in pool):
        words = SMALL if len(pool) == 1 else SMALLEST
    else:
        return None
    return f"the {random.choice(words)} {noun}"


def _by_group(item: Item, others: Others, vocabulary: Vocabulary, random: Random) -> str | None:
    fitting = [
        group
        for group, (members, arguable) in groups().items()
        if item.word in members and not any(other.word in members | arguable for other in others)
    ]
    return f"the {random.choice(fitting)}" if others and fitting else None


def _pool(item: Item, others: Others, vocabulary: Vocabulary, random: Random) -> tuple[Others, str]:
    """The objects to distinguish it from, and a noun: those of the same word by their name, or all as 'one'."""
    alike = [other for other in others if other.word == item.word]
    if alike and random.random() < 0.7:
        # The name stands for all of them, painted or not.
        called = vocabulary.words[item.word].names_for(counted=False, painted=any(one.colour for one in (item, *alike)))
        return alike, random.choice(called)
    return others, random.choice(NOUNS)


def _beyond(item: Item, other: Item, side: str) -> bool:
    axis, direction, _, _ = SIDES[side]
    return direction * (getattr(item, axis) - getattr(other, axis)) > APART


def _between(item: Item, pool: Others) -> bool:
    """Whether it is the second of three in a row or column."""
    if len(pool) != 2:
        return False
    return any(
        all(abs(getattr(item, across) - getattr(other, across)) < LEVEL for other in pool)
        and min(getattr(other, axis) for other in pool) + APART
        < getattr(item, axis)
        < max(getattr(other, axis) for other in pool) - APART
        for axis, across in (("x", "y"), ("y", "x"))
    )


@cache
def groups() -> dict[str, tuple[frozenset[str], frozenset[str]]]:
    """Kinds of things: their members, and words that could be one. A kind may also be the name of a word."""
    tables = tomllib.loads((presets_folder() / "words" / "groups.toml").read_text(encoding="utf-8"))
    return {
        group: (frozenset(table.get("members", ())), frozenset(table.get("arguable", ())))
        for group, table in tables.items()
    }
