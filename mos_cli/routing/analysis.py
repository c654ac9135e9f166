"""Analysis of routes: summaries, the words of a prompt, and differences between steps and branches.

Shapes: S steps, J generation blocks, T context tokens, K kept layers, M understanding layers.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Protocol

import numpy as np

from mos_cli.errors import UsageError

DIGITS = 4


class Spanned(Protocol):
    """A token with its span of characters in the prompt, or its cell of a picture."""

    @property
    def text(self) -> str: ...
    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def patch(self) -> tuple[int, int, int] | None: ...


@dataclass(frozen=True)
class Word:
    """A word of the prompt, or a picture, and the numbers of its tokens; see `split_words`.

    `nth` (from 1) is its occurrence in the prompt.
    """

    text: str
    tokens: tuple[int, ...]
    special: bool = False
    nth: int = 1

    @property
    def label(self) -> str:
        return self.text if self.nth == 1 else f"{self.text}#{self.nth}"


def summarise(ids_SJTK: np.ndarray, weights_SJTK: np.ndarray, layers: int) -> dict[str, Any]:
    """The fields of a branch's summary, as plain tuples of floats of four digits; weights need not sum to 1.

    mean_layer_ST: the layer each token reads on average over blocks, weighted, per step.
    layer_use_JM: per block, the share of each layer in the mixing weights; 0 only if its weight is exactly 0.
    entropy_S: per step, the entropy of the layers' shares over blocks and tokens, divided by ln(layers).
    """
    steps, blocks = ids_SJTK.shape[:2]
    weights = weights_SJTK.astype(np.float64)
    mean_layer_ST = (weights * ids_SJTK).sum(axis=(1, 3)) / weights.sum(axis=(1, 3))

    columns_SJ11 = np.arange(steps * blocks).reshape(steps, blocks, 1, 1)
    cells = (columns_SJ11 * layers + ids_SJTK).ravel()
    use_SJM = np.bincount(cells, weights.ravel(), minlength=steps * blocks * layers).reshape(steps, blocks, layers)
    use_JM = _shares(use_SJM.sum(axis=0))
    use_SM = _shares(use_SJM.sum(axis=1))
    logs_SM = np.log(use_SM, out=np.zeros_like(use_SM), where=use_SM > 0)
    entropy_S = (use_SM * -logs_SM).sum(axis=1) / np.log(layers)

    # Values above 0 are not rounded to 0, so that unused layers are distinct from rarely used ones.
    use_JM = np.where(use_JM > 0, np.maximum(use_JM.round(DIGITS), 10.0**-DIGITS), 0.0)
    return {
        "mean_layer_ST": tuple(map(tuple, mean_layer_ST.round(DIGITS).tolist())),
        "layer_use_JM": tuple(map(tuple, use_JM.tolist())),
        "entropy_S": tuple(entropy_S.round(DIGITS).tolist()),
    }


def split_words(prompt: str, tokens: Sequence[Spanned]) -> tuple[Word, ...]:
    """The words of the prompt, each with its tokens, in order; then pictures, then other tokens.

    Spaces separate words, and the punctuation or emoji before or after a word are words of their own, so that the
    tokens of a word are those that a route rule for it governs. Punctuation inside a word (red-brown) is part of it.
    A token belongs to the word of its first letter or digit, or if it has none, of its first character that is not a
    space: in some tokenizers the space or the quotation mark before a word is part of its first token.
    """
    spans = _word_spans(prompt)
    numbers: dict[tuple[int, int], list[int]] = {span: [] for span in spans}
    special, pictures = [], {}
    for number, token in enumerate(tokens):
        if token.patch is not None:
            pictures.setdefault(token.text, []).append(number)
            continue
        if (first := re.search(r"\w", text := prompt[token.start : token.end]) or re.search(r"\S", text)) is None:
            special.append(Word(token.text, (number,), special=True))
            continue
        place = token.start + first.start()
        numbers[next(span for span in spans if span[0] <= place < span[1])].append(number)
    words, seen = [], Counter[str]()
    for (start, end), held in numbers.items():
        if held:
            seen[text := prompt[start:end].casefold()] += 1
            words.append(Word(prompt[start:end], tuple(held), nth=seen[text]))
    return (*words, *(Word(name, tuple(held)) for name, held in pictures.items()), *special)


def _word_spans(prompt: str) -> list[tuple[int, int]]:
    """The characters of each word of a prompt, from `start` to `end`."""
    spans: list[tuple[int, int]] = []
    for start, end in (match.span() for match in re.finditer(r"\w(?:\S*\w)?|[^\w\s]+", prompt)):
        if spans and spans[-1][1] == start:
            # \w matches no accents and vowel signs; those after the last letter belong to the word.
            accents = list(takewhile(lambda c: unicodedata.category(c).startswith("M"), prompt[start:end]))
            start += len(accents)
            spans[-1] = spans[-1][0], start
        if start < end:
            spans.append((start, end))
    return spans


def is_special(token: Spanned) -> bool:
    """Whether a token has neither text nor a cell of a picture."""
    return token.patch is None and token.start == token.end


def find_words(words: Sequence[Word], requested: Iterable[str]) -> tuple[Word, ...]:
    """The requested words, in the prompt's order, regardless of case.

    A word is requested with all its occurrences, or with one of them, as "cat#2".

    Raises:
        UsageError: one of them is not in the prompt.
    """
    found = {}
    for text in requested:
        hits = matching_words(words, [text])
        if not hits:
            there = ", ".join(dict.fromkeys(word.label for word in words))
            raise UsageError(f"{text!r} is not a word of this prompt: its words are {there}")
        found |= dict.fromkeys(hits)
    return tuple(word for word in words if word in found)


def matching_words(words: Sequence[Word], requested: Iterable[str]) -> tuple[Word, ...]:
    """The requested words that are in `words`, matched as in `find_words`."""
    texts = {text.casefold() for text in requested}
    return tuple(word for word in words if texts & {text := word.text.casefold(), f"{text}#{word.nth}"})


def word_layers(word: Word, mean_layer_ST: Sequence[Sequence[float]] | np.ndarray) -> tuple[float, ...]:
    """The mean layer that a word reads, over its tokens, per step."""
    means_S = np.asarray(mean_layer_ST)[:, list(word.tokens)].mean(axis=1)
    return tuple(means_S.round(DIGITS).tolist())


def strongest_layers(layer_use_JM: Sequence[Sequence[float]], count: int = 3) -> tuple[tuple[int, float], ...]:
    """The layers with the largest share of the weight, mean over blocks, and that share; at most `count`."""
    shares_M = np.mean(layer_use_JM, axis=0).round(DIGITS).tolist()
    ranked = sorted(enumerate(shares_M), key=lambda layer: -layer[1])
    return tuple((layer, share) for layer, share in ranked[:count] if share > 0)


def dead_layers(layer_use_JM: Sequence[Sequence[float]]) -> tuple[int, ...]:
    """The layers without any weight in the branch."""
    return tuple(np.flatnonzero(np.max(layer_use_JM, axis=0) == 0).tolist())


def step_changes(
    ids_SJTK: np.ndarray, weights_SJTK: np.ndarray, slots_SJTK: np.ndarray | None = None
) -> tuple[float, ...]:
    """For every step but the first, the share of the kept layers that were not kept at the step before.

    Places of weight 0 do not count. In models with slots, a layer in another slot is another one.
    """
    read = weights_SJTK > 0
    same = (ids_SJTK[1:, ..., :, None] == ids_SJTK[:-1, ..., None, :]) & read[:-1, ..., None, :]
    if slots_SJTK is not None:
        same &= slots_SJTK[1:, ..., :, None] == slots_SJTK[:-1, ..., None, :]
    new = read[1:] & ~same.any(axis=-1)
    return tuple((new.sum(axis=(1, 2, 3)) / read[1:].sum(axis=(1, 2, 3))).round(DIGITS).tolist())


def agreement(first_JM: Sequence[Sequence[float]], second_JM: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Per block, the share of the weight that two branches give to the same layers, over steps and tokens.

    Their prompts have different tokens, so that single decisions cannot be compared.
    """
    shared_JM = np.minimum(_shares(np.asarray(first_JM)), _shares(np.asarray(second_JM)))
    return tuple(shared_JM.sum(axis=1).round(DIGITS).tolist())


def _shares(use: np.ndarray) -> np.ndarray:
    return use / use.sum(axis=-1, keepdims=True)
