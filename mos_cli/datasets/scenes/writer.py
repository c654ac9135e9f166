"""Random scenes for training, without combinations that are held out."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from random import Random
from typing import Any, Literal, get_args

from mos_cli.datasets.scenes.backgrounds import PAINTS, SCENERIES
from mos_cli.datasets.scenes.captions import caption
from mos_cli.datasets.scenes.description import (
    DEFAULT_STYLE,
    MOST_OBJECTS,
    Arrangement,
    Description,
    Place,
    Relation,
    Size,
    Thing,
    held_out,
)
from mos_cli.datasets.scenes.layout import Scene, lay_out
from mos_cli.datasets.scenes.vocabulary import COLOURS, Vocabulary
from mos_cli.errors import InputError

KINDS = {"single": 0.4, "pair": 0.3, "count": 0.15, "group": 0.15}
"""The probability of each kind of scene."""
OPEN_PAIRS, OPEN_ARRANGEMENTS = 0.45, 0.6
"""Share of the pairs that name no relation, and of the counts and groups that name no arrangement.

They have one layout (see `layout`), and are the most common prompts.
"""
PAINTED, PAINTED_TWICE = 0.3, 0.2
"""Share of things that are painted, and of pairs in which both are."""


@dataclass(frozen=True)
class SceneWriter:
    """Makes random scenes with captions.

    Raises:
        InputError: there are too few words for the scenes with most of them.
    """

    vocabulary: Vocabulary

    def __post_init__(self) -> None:
        for style in self.vocabulary.styles:
            for count, countable in ((MOST_OBJECTS, False), (2, True)):
                pool = (word for part in self.vocabulary.pools[style] for word in part)
                if not any(self._fit(words, countable) for words in combinations(pool, count)):
                    kind = "words with a plural" if countable else "words"
                    raise InputError(
                        f"the recipe's words are too few: a picture in {style} takes {count} {kind}, none of which is "
                        "held out of training in that style or beside another. Add words"
                    )

    def write(self, random: Random) -> tuple[Scene, str]:
        """One scene and its caption; all randomness comes from `random`."""
        description = self.describe(random)
        return lay_out(description, self.vocabulary, random), caption(description, self.vocabulary, random)

    def describe(self, random: Random) -> Description:
        """The description of one picture."""
        style = DEFAULT_STYLE if random.random() < 0.2 else random.choice(self.vocabulary.styles)
        (kind,) = random.choices(list(KINDS), list(KINDS.values()))
        layout = getattr(self, f"_{kind}")(style, random)
        return Description(
            **layout,
            style=style,
            style_named=style != DEFAULT_STYLE or random.random() < 0.4,
            background=choose_background({thing.colour for thing in layout["things"]}, random),
        )

    def _single(self, style: str, random: Random) -> dict:
        (word,) = self._words(1, style, random)
        place = random.choice(get_args(Place)) if random.random() < 0.2 else None
        return {"things": (self._thing(word, random),), "place": place}

    def _pair(self, style: str, random: Random) -> dict:
        painted = 1.0 if random.random() < PAINTED_TWICE else PAINTED
        things = tuple(self._thing(word, random, painted=painted) for word in self._words(2, style, random))
        return {"things": things, "relation": _open_or(Relation, OPEN_PAIRS, random)}

    def _count(self, style: str, random: Random) -> dict:
        (word,) = self._words(1, style, random, countable=True)
        things = (self._thing(word, random, random.randint(2, MOST_OBJECTS)),)
        return {"things": things, "arrangement": _open_or(Arrangement, OPEN_ARRANGEMENTS, random)}

    def _group(self, style: str, random: Random) -> dict:
        if random.random() < 0.5:
            things = tuple(self._thing(word, random) for word in self._words(random.randint(3, 4), style, random))
            return {"things": things, "arrangement": _open_or(Arrangement, OPEN_ARRANGEMENTS, random)}
        first, second = self._words(2, style, random, countable=True)
        counts = random.choice(((2, 1), (1, 2), (3, 1), (1, 3), (2, 2)))
        things = tuple(self._thing(word, random, count) for word, count in zip((first, second), counts, strict=True))
        return {"things": things, "relation": _open_or(Literal["left", "right"], OPEN_ARRANGEMENTS, random)}

    def _words(self, count: int, style: str, random: Random, *, countable: bool = False) -> list[str]:
        """Different words, without held-out pairs, that are trained in a style."""
        while True:
            chosen = self.vocabulary.sample(count, random, style)
            if self._fit(chosen, countable):
                return chosen

    def _fit(self, words: Sequence[str], countable: bool) -> bool:
        """Whether training may show words in one picture, each several times if they must be countable."""
        named = all(self.vocabulary.words[word].names_for(counted=countable, painted=False) for word in words)
        return named and not any(held_out(a, b) for a, b in combinations(words, 2))

    def _thing(self, word: str, random: Random, count: int = 1, painted: float = PAINTED) -> Thing:
        paint = random.random() < painted and self.vocabulary.words[word].names_for(counted=count > 1, painted=True)
        return Thing(
            word=word,
            count=count,
            colour=random.choice(list(COLOURS)) if paint else None,
            size=random.choice(get_args(Size)) if random.random() < 0.15 else None,
        )


def _open_or(choices: Any, share: float, random: Random) -> Any:
    """One of the values of a Literal, or None with the probability `share`."""
    return None if random.random() < share else random.choice(get_args(choices))


def choose_background(colours: set[str | None], random: Random) -> str | None:
    """A background in which none of the painted things is invisible; None is white."""
    paints = [paint for paint in PAINTS if not any(colour and colour in paint for colour in colours)]
    kind = random.random()
    if kind < 0.4 and "white" not in colours:
        return None
    if kind < 0.8:
        return random.choice(paints)
    if kind < 0.9:
        return " to ".join(random.sample(paints, 2))
    return random.choice(list(SCENERIES))
