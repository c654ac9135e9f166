"""Which tokens of one prompt are those of another, and which steps of one run those of another."""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from mos_cli.routing.analysis import Spanned, split_words


class EncodedPrompt(Protocol):
    """What a branch reads: its prompt and its tokens."""

    @property
    def prompt(self) -> str: ...
    @property
    def tokens(self) -> Sequence[Spanned]: ...


@dataclass(frozen=True)
class WordKey:
    """A word is aligned by its kind, name and occurrence (from 1); how its prompt spells it counts for nothing."""

    kind: str
    name: str
    nth: int
    text: str = field(compare=False)


def keyed_words(encoding: EncodedPrompt) -> dict[WordKey, dict[Hashable, int]]:
    """The words of a branch, each with the numbers of its tokens by what they are aligned by."""
    seen: Counter[tuple[str, str]] = Counter()
    words = {}
    for word in split_words(encoding.prompt, encoding.tokens):
        first = encoding.tokens[word.tokens[0]]
        kind = "special" if word.special else "word" if first.patch is None else "picture"
        name = _bare(word.text) if kind == "word" else word.text
        seen[kind, name] += 1
        pieces: dict[Hashable, int] = {}
        spelled: Counter[Hashable] = Counter()
        for number in word.tokens:
            token = encoding.tokens[number]
            # The tokenizer's own spelling depends on what stands before a word; the characters do not.
            piece = token.patch or encoding.prompt[token.start : token.end].strip().casefold()
            spelled[piece] += 1
            pieces[piece, spelled[piece]] = number
        words[WordKey(kind, name, seen[kind, name], word.text)] = pieces
    return words


def partners(mine: EncodedPrompt, theirs: EncodedPrompt) -> tuple[int, ...]:
    """For every token of one reading the number of its like in the other, -1 where it has none."""
    others, found = keyed_words(theirs), [-1] * len(mine.tokens)
    for key, pieces in keyed_words(mine).items():
        for piece, number in pieces.items():
            found[number] = others.get(key, {}).get(piece, -1)
    return tuple(found)


def nearest_steps(times_a: Sequence[float], times_b: Sequence[float]) -> list[tuple[int, int]]:
    """The pairs of steps that are nearest to each other in time, whichever run one looks from."""
    apart = np.abs(np.subtract.outer(times_a, times_b))
    to_b, to_a = apart.argmin(axis=1), apart.argmin(axis=0)
    return [(i, int(j)) for i, j in enumerate(to_b) if to_a[j] == i]


def _bare(text: str) -> str:
    """A word without the punctuation around it and whatever its case; punctuation alone stays."""
    folded = text.casefold()
    inside = [index for index, character in enumerate(folded) if character.isalnum()]
    return folded[inside[0] : inside[-1] + 1] if inside else folded
