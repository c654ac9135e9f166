"""The words that captions and instructions can have, and which of a prompt are none of them. Imports no torch."""

import difflib
import re
from collections.abc import Iterator
from itertools import product
from typing import Any

from mos_cli.bundles.taught import TaughtScenes
from mos_cli.datasets.scenes import backgrounds, captions, instructions, referring, vocabulary

PLURALS = {"y": "ies", "f": "ves", "fe": "ves", "man": "men", "mouse": "mice", "ox": "oxen", "die": "dice"}
"""Ends of words and of their plurals, besides -s and -es. Captions take theirs from `inflect`, of training alone."""
CAPTION_TABLES = (
    vocabulary.ARTICLES,
    captions.NUMBERS,
    captions.SIZES,
    captions.PLACES,
    captions.RELATIONS,
    captions.ENDS,
    captions.ARRANGEMENTS,
    captions.LIST,
    captions.PAIRS,
    captions.PLAIN_BACKGROUNDS,
    captions.GRADIENTS,
    captions.PICTURES,
    captions.SENTENCES,
    captions.STYLED,
    list(backgrounds.PAINTS),
    list(backgrounds.SCENERIES),
    [phrases for _, phrases in backgrounds.SCENERIES.values()],
    [names for _, names in vocabulary.COLOURS.values()],
)
"""All phrases of captions but for the objects and styles, which are those of a model."""
INSTRUCTION_TABLES = (
    instructions.ORDERS,
    instructions.WISHES,
    instructions.MANNERS,
    instructions.KEEPING,
    instructions.ALL,
    instructions.MIDDLE,
    instructions.TOWARDS,
    instructions.NAMED_BACKDROPS,
    [(pairwise, extreme) for _, _, pairwise, extreme in referring.SIDES.values()],
    referring.ALONE,
    referring.NOUNS,
    referring.BIG,
    referring.BIGGEST,
    referring.SMALL,
    referring.SMALLEST,
)
"""The further phrases of instructions."""


class KnownWords:
    """The words that a model was taught: the names of its objects, and what else captions and instructions can say."""

    def __init__(self, taught: TaughtScenes) -> None:
        styles = [names for style, names in vocabulary.STYLES.items() if style in taught.styles]
        kinds = [kind for kind, (members, _) in referring.groups().items() if members & taught.words.keys()]
        self._drawing = set(_words_in((CAPTION_TABLES, styles)))
        self._editing = self._drawing | set(_words_in((INSTRUCTION_TABLES, kinds)))
        self._objects = {name: _words_of(name) for names in taught.words.values() for name in names}
        # Without spaces, so that a firetruck is a fire truck.
        self._names = {"".join(form) for words in self._objects.values() for form in product(*map(_forms, words))}
        self._longest = max(map(len, self._objects.values()))

    def names_object(self, prompt: str) -> bool:
        """Whether a prompt has the name of one of the objects, in the singular or the plural."""
        return len(self._outside_names(prompt)) < len(_words_of(prompt))

    def unknown(self, prompt: str, *, edit: bool) -> list[str]:
        """The words of a prompt that no caption has, nor an instruction if it is one, in order."""
        known = self._editing if edit else self._drawing
        return [word for word in self._outside_names(prompt) if word not in known]

    def name_with(self, text: str) -> str | None:
        """The first name that begins or ends with a word of a text: 'birthday cake' for 'a birthday'."""
        given = set(_words_of(text))
        return next((name for name, words in self._objects.items() if given & {*words[:1], *words[-1:]}), None)

    def nearest(self, word: str, *, edit: bool) -> str | None:
        """The known word or name that an unknown word is a part of, or that is spelt nearly the same."""
        known = {*(self._editing if edit else self._drawing), *self._objects}
        alike = sorted(other for other in known if other[0] == word[0] and len(other) > 2)
        swapped = [other for other in alike if sorted(other) == sorted(word)]
        close = swapped or difflib.get_close_matches(word, alike, n=1, cutoff=0.8)
        return self.name_with(word) or next(iter(close), None)

    def _outside_names(self, prompt: str) -> list[str]:
        """The words that are not of the name of an object."""
        words, outside, place = _words_of(prompt), [], 0
        while place < len(words):
            ends = range(place + self._longest, place, -1)
            end = next((end for end in ends if "".join(words[place:end]) in self._names), None)
            if end is None:
                outside.append(words[place])
            place = end or place + 1
        return outside


def _words_of(text: str) -> list[str]:
    """Its words in lower case, without signs: 'dog' of "Dog's"."""
    words = re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.casefold().replace("\u2019", "'"))
    return [word.removesuffix("'s") for word in words]


def _words_in(phrases: Any) -> Iterator[str]:
    """The words of all phrases of a table but for those in {braces}, which stand for others."""
    if isinstance(phrases, str):
        yield from _words_of(re.sub(r"\{.*?\}", " ", phrases))
    elif isinstance(phrases, dict):
        yield from _words_in(tuple(phrases.values()))
    else:
        for part in phrases:
            yield from _words_in(part)


def _forms(word: str) -> list[str]:
    """A word in the singular and the plural."""
    irregular = [word.removesuffix(end) + plural for end, plural in PLURALS.items() if word.endswith(end)]
    return [word, f"{word}s", f"{word}es", *irregular]
