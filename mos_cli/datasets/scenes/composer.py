"""Random pictures to edit: allowed pairs of words on free spots, some of them painted."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from random import Random

from mos_cli.datasets.scenes.composition import ALONE, Composition, Item, choose_spots, jittered
from mos_cli.datasets.scenes.description import DEFAULT_STYLE, held_out, held_out_style
from mos_cli.datasets.scenes.layout import Spot
from mos_cli.datasets.scenes.referring import confusable
from mos_cli.datasets.scenes.vocabulary import COLOURS, Vocabulary
from mos_cli.datasets.scenes.writer import choose_background

COUNTS = {1: 3, 2: 4, 3: 2, 4: 1}
"""The weights of the numbers of objects in a picture."""


@dataclass(frozen=True)
class Composer:
    """Pictures to edit, at random.

    Args:
        held_out_pairs: the first two words of a picture are a pair held out of training; by default no pair is.
    """

    vocabulary: Vocabulary
    held_out_pairs: bool = False

    def style(self, random: Random) -> str:
        """A style; the default one more often than the others."""
        return DEFAULT_STYLE if random.random() < 0.2 else random.choice(self.vocabulary.styles)

    def count(self, random: Random, least: int = 1, most: int = max(COUNTS)) -> int:
        """The number of objects; at least two with `held_out_pairs`."""
        counts = range(max(least, 2) if self.held_out_pairs else least, most + 1)
        return random.choices(counts, [COUNTS[count] for count in counts])[0]

    def words(self, count: int, styles: Sequence[str], random: Random) -> list[str]:
        """Different words with names that cannot be confused, all of them trained in all of these styles."""
        while True:
            chosen = self.vocabulary.sample(count - 2 if self.held_out_pairs else count, random)
            if self.held_out_pairs:
                chosen = [*random.sample(random.choice(self._untrained_pairs), 2), *chosen]
            if any(held_out_style(word, style) for word in chosen for style in styles):
                continue
            pairs = [frozenset(pair) for pair in combinations(chosen, 2)]
            if any(len(pair) == 1 or pair in self._confusable for pair in pairs):
                continue
            if self.held_out_pairs or not any(held_out(*pair) for pair in pairs):
                return chosen

    def picture(
        self, words: Sequence[str], style: str, random: Random, spare: int = 0
    ) -> tuple[Composition, list[Spot]]:
        """One object of every word, sometimes two of the first instead of one of the last, and the free spots.

        Args:
            spare: the least number of free spots.
        """
        words = list(words)
        if len(words) > (2 if self.held_out_pairs else 1) and words[0] in self._several and random.random() < 0.25:
            words[-1] = words[0]
        if len(words) == 1 and not spare and random.random() < 0.5:
            spots = [jittered(ALONE, random)]
        else:
            spots = choose_spots(len(words) + spare, random)
        random.shuffle(spots)
        if len(words) > 1 and random.random() < 0.2:
            x, y, side = spots[0]
            spots[0] = x, y, round(side * 0.6, 4)
        items = [self.item(word, style, spot, random) for word, spot in zip(words, spots, strict=False)]
        if len(words) > 1 and words[-1] == words[0] and random.random() < 0.6:
            for index, colour in zip((0, -1), random.sample(list(COLOURS), 2), strict=True):
                items[index] = Item(words[0], style, *spots[index % len(words)], colour)
        return Composition(tuple(items), background_for(items, random)), spots[len(words) :]

    def stacked(self, base: str, top: str, style: str, random: Random) -> Composition:
        """One object standing on another."""
        aside = random.uniform(-0.08, 0.08)
        spots = jittered((0.5, 0.68, 0.54), random), jittered((0.5 + aside, 0.3, 0.38), random)
        items = [self.item(word, style, spot, random) for word, spot in zip((base, top), spots, strict=True)]
        return Composition(tuple(items), background_for(items, random))

    def item(self, word: str, style: str, spot: Spot, random: Random, taken: Collection[str] = ()) -> Item:
        """An object, painted or not, in none of the colours in `taken`."""
        painted = word in self.paintable and random.random() < 0.28
        return Item(word, style, *spot, self.paint(random, taken) if painted else None)

    def paint(self, random: Random, taken: Collection[str] = ()) -> str:
        """A colour that is in no name in `taken`."""
        return random.choice([colour for colour in COLOURS if not any(colour in name for name in taken)])

    def colours_of(self, item: Item) -> tuple[str, ...]:
        """The paint of an object and its names, which may contain a colour."""
        return (item.colour or "", item.word, *self.vocabulary.words[item.word].names)

    @cached_property
    def paintable(self) -> frozenset[str]:
        """Words with a name that contains no colour."""
        return frozenset(w for w, word in self.vocabulary.words.items() if word.names_for(counted=False, painted=True))

    @cached_property
    def _several(self) -> frozenset[str]:
        """Words with a name that has a plural and contains no colour."""
        return frozenset(w for w, word in self.vocabulary.words.items() if word.names_for(counted=True, painted=True))

    @cached_property
    def _confusable(self) -> frozenset[frozenset[str]]:
        return confusable([(word, known.names) for word, known in self.vocabulary.words.items()])

    @cached_property
    def _untrained_pairs(self) -> tuple[tuple[str, str], ...]:
        return tuple(pair for pair in combinations(self.vocabulary.words, 2) if held_out(*pair))


def background_for(items: Sequence[Item], random: Random) -> str | None:
    """A background in which no painted object is invisible; None is white."""
    background = choose_background({item.colour for item in items}, random)
    return None if background == "white" else background
