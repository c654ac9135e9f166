"""The vocabulary of scenes: things with their pictures, colours, styles, and English grammar.

Shapes: V pictures, H x W a picture's size.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from random import Random
from typing import TYPE_CHECKING

from mos_cli.datasets.scenes.description import DEFAULT_STYLE, held_out_style
from mos_cli.errors import InputError

if TYPE_CHECKING:
    import inflect
    from torch import Tensor

    from mos_cli.datasets.art.file import Art
    from mos_cli.datasets.tables import CommonWords, DataTable

RGB = tuple[float, float, float]

STYLES = {
    "fluent-3d": ("3d", "3d render"),
    "fluent": ("gradient", "soft gradient"),
    "fluent-flat": ("flat", "flat vector"),
    "noto": ("noto",),
    "noto-v1": ("vintage", "retro"),
    "fxemoji": ("fx",),
    "twemoji": ("twemoji",),
    "emojione": ("emojione",),
}
"""The names of each art set's style in captions."""

COLOURS: dict[str, tuple[RGB, tuple[str, ...]]] = {
    "red": ((0.87, 0.13, 0.16), ("red", "crimson", "scarlet")),
    "orange": ((0.97, 0.53, 0.08), ("orange",)),
    "yellow": ((0.98, 0.83, 0.12), ("yellow", "golden")),
    "green": ((0.2, 0.65, 0.24), ("green", "emerald")),
    "blue": ((0.13, 0.36, 0.85), ("blue", "azure")),
    "purple": ((0.52, 0.22, 0.74), ("purple", "violet")),
    "pink": ((0.97, 0.47, 0.7), ("pink", "rosy")),
    "brown": ((0.47, 0.29, 0.15), ("brown", "chestnut")),
    "grey": ((0.52, 0.52, 0.54), ("grey", "gray")),
    "black": ((0.12, 0.12, 0.14), ("black",)),
    "white": ((0.97, 0.97, 0.97), ("white",)),
}
"""The colours a thing can be painted in: the paint and its names."""
COLOUR_NAMES = {name for _, names in COLOURS.values() for name in names} | {"gold", "silver", "bronze"}

NO_SINGULAR = {
    "cherries",
    "fries",
    "french fries",
    "glasses",
    "sunglasses",
    "headphones",
    "grapes",
    "pancakes",
    "books",
}
NO_SINGULAR |= {"scissors", "dice"}
NO_SINGULAR |= {"lips", "paw prints", "clinking beer mugs", "clinking glasses", "champagne glasses", "fireworks"}
NO_SINGULAR |= {"sparkles", "japanese dolls", "skis", "theater masks", "theatre masks", "jeans", "shopping bags"}
NO_SINGULAR |= {"prayer beads", "control knobs", "crossed swords", "chains"}
NO_PLURAL = {"bread", "corn", "milk", "coffee", "beer", "sushi", "fire", "chocolate", "cheese", "poo"}
NO_PLURAL |= {"bacon", "popcorn", "onigiri", "rice", "ramen", "spaghetti", "dango", "shaved ice", "tea", "sake"}
NO_PLURAL |= {"whiskey", "cutlery", "earth", "tokyo tower", "statue of liberty", "kaaba", "flying money", "moai"}


@cache
def _english() -> "inflect.engine":
    """Imported when it is used: that takes more than a second, and pictures with captions need none of it."""
    import inflect

    english = inflect.engine()
    english.defnoun("burrito", "burritos")  # type: ignore[arg-type]
    english.defan("suv")  # type: ignore[arg-type]
    return english


@dataclass(frozen=True)
class VocabularyWord:
    """A concept: its names in captions, and the row of its picture in each style."""

    names: tuple[str, ...]
    pictures: dict[str, int]

    def names_for(self, *, counted: bool, painted: bool) -> list[str]:
        """The names that have a plural, if `counted`, and that contain no colour, if `painted`."""
        return [
            name
            for name in self.names
            if not (counted and name in NO_SINGULAR | NO_PLURAL) and not (painted and COLOUR_NAMES & set(name.split()))
        ]


@dataclass(frozen=True)
class Vocabulary:
    """Words by their names in the art file, their styles, and their sprites, uint8 [V, H, W, 4].

    Attributes:
        common: the words that are drawn more often; without them, all are drawn equally often.
    """

    words: dict[str, VocabularyWord]
    styles: tuple[str, ...]
    sprites_VHW4: "Tensor"
    common: "CommonWords | None" = None

    def sample(self, count: int, random: Random, style: str | None = None) -> list[str]:
        """Different words in random order; with a style, words that training may draw in it."""
        common, others = self.pools[style]
        if self.common is None:
            return random.sample(others, count)
        of_common = sum(random.random() < self.common.share for _ in range(count))
        chosen = random.sample(common, of_common) + random.sample(others, count - of_common)
        random.shuffle(chosen)
        return chosen

    @cached_property
    def pools(self) -> dict[str | None, tuple[list[str], list[str]]]:
        """The common and the other words that may be drawn in each style, and of all words (None)."""
        common = frozenset(self.common.words if self.common else ())
        pools = {}
        for style in (None, *self.styles):
            drawn = [word for word in self.words if style is None or not held_out_style(word, style)]
            pools[style] = [word for word in drawn if word in common], [word for word in drawn if word not in common]
        return pools


def load_vocabulary(art: "Art", data: "DataTable") -> Vocabulary:
    """The recipe's words with their pictures.

    Raises:
        InputError: a word has no picture in one of the styles, or the default style is not among them.
    """
    if DEFAULT_STYLE not in data.styles:
        raise InputError(f"the recipe's styles must include {DEFAULT_STYLE}: it is what an unnamed style means")
    found = {(picture.name, picture.style): picture.index for picture in art.manifest.pictures}
    words, rows = {}, []
    for name, names in data.words.items():
        missing = [style for style in data.styles if (name, style) not in found]
        if missing:
            raise InputError(f"the art file has no '{name}' in {', '.join(missing)}: drop the word or the style")
        words[name] = VocabularyWord(names, {style: len(rows) + offset for offset, style in enumerate(data.styles)})
        rows += [found[name, style] for style in data.styles]
    return Vocabulary(words, data.styles, art.pixels[rows], data.common)


ARTICLES = ("a", "an")


@cache
def with_article(noun_phrase: str) -> str:
    """'an owl', 'a unicorn'."""
    return _english().a(noun_phrase)  # type: ignore[arg-type]


@cache
def plural(noun_phrase: str) -> str:
    """'slices of cake', 'mice'."""
    return _english().plural_noun(noun_phrase)  # type: ignore[arg-type]
