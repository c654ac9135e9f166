"""Aligning the tokens of two prompts, and the steps of two runs."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from mos_cli.routing.analysis import Spanned, split_words


class EncodedPrompt(Protocol):
    """A prompt and its tokens."""

    @property
    def prompt(self) -> str: ...
    @property
    def tokens(self) -> Sequence[Spanned]: ...


@dataclass(frozen=True)
class WordKey:
    """The key by which words are aligned: kind, name and occurrence (from 1). `text` is the spelling in the prompt."""

    kind: str
    name: str
    nth: int
    text: str = field(compare=False)


KeyedWords = Mapping[WordKey, Mapping[Hashable, int]]
"""The words of a prompt, each with the numbers of its tokens by their own keys."""


def keyed_words(encoding: EncodedPrompt) -> KeyedWords:
    """The words of a prompt, each with the numbers of its tokens by their own keys."""
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
            # The characters of the prompt, because a tokenizer's spelling depends on the text before a word.
            piece = token.patch or encoding.prompt[token.start : token.end].strip().casefold()
            spelled[piece] += 1
            pieces[piece, spelled[piece]] = number
        words[WordKey(kind, name, seen[kind, name], word.text)] = pieces
    return words


def shared_words(first: KeyedWords, second: KeyedWords) -> dict[WordKey, list[tuple[int, int]]]:
    """The words that two prompts share, with the numbers in both of each token that both have; never without any."""
    shared = {
        key: [(number, second[key][piece]) for piece, number in pieces.items() if piece in second[key]]
        for key, pieces in first.items()
        if key in second
    }
    return {key: pairs for key, pairs in shared.items() if pairs}


def partners(first: EncodedPrompt, second: EncodedPrompt) -> tuple[int, ...]:
    """For every token of one prompt the number of the same token in the other, or -1."""
    found = [-1] * len(first.tokens)
    for pairs in shared_words(keyed_words(first), keyed_words(second)).values():
        for number, other in pairs:
            found[number] = other
    return tuple(found)


def nearest_steps(times_a: Sequence[float], times_b: Sequence[float]) -> list[tuple[int, int]]:
    """The pairs of steps that are mutually nearest in time."""
    distances = np.abs(np.subtract.outer(times_a, times_b))
    to_b, to_a = distances.argmin(axis=1), distances.argmin(axis=0)
    return [(i, int(j)) for i, j in enumerate(to_b) if to_a[j] == i]


def _bare(text: str) -> str:
    """A word in lower case without the punctuation around it; a word of only punctuation is kept."""
    folded = text.casefold()
    inside = [index for index, character in enumerate(folded) if character.isalnum()]
    return folded[inside[0] : inside[-1] + 1] if inside else folded
