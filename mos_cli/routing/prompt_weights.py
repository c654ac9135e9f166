r"""Weights in prompts: (cat:1.3) scales what the blocks read of the tokens of "cat".

The routed context of a token is multiplied by its weight in every block, at every step; the routes stay the router's.
Where a block normalises the keys of its attention, this scales the values alone: the shares of the attention stay.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mos_cli.config.recipe import MAX_WEIGHT, PromptWeight, Recipe
from mos_cli.errors import UsageError
from mos_cli.routing.analysis import Spanned

_SPECIAL = re.compile(r"\\(?P<escaped>[()])|[():]")
_NUMBER = re.compile(r"\s*(?:\d{1,4}(?:\.\d{0,6})?|\.\d{1,6})\s*")


@dataclass
class _Open:
    """A parenthesis that is not closed yet, by its places in the text that comes out: its own, and its last colon's."""

    start: int
    colon: int | None = None
    has_weights: bool = False


def parse_weights(text: str) -> tuple[str, tuple[PromptWeight, ...] | None]:
    r"""The prompt without its weights, and these; None where all are 1, or there are none.

    A parenthesis with a colon is a weight, any other is text. A backslash before ( or ) makes it a character.

    Raises:
        UsageError: a weight is malformed, out of range, in another, or of no words.
    """
    letters: list[str] = []
    weights: list[PromptWeight] = []
    stack: list[_Open] = []
    end = 0
    while special := _SPECIAL.search(text, end):
        letters += text[end : special.start()]
        end = special.end()
        if special["escaped"]:
            letters.append(special["escaped"])
            continue
        if special[0] == "(":
            stack.append(_Open(len(letters)))
        elif special[0] == ":" and stack:
            stack[-1].colon = len(letters)
        elif special[0] == ")" and stack:
            group = stack.pop()
            if group.colon is not None:
                weights.append(_weight(letters, group))
                group.has_weights = True
            if stack:
                stack[-1].has_weights |= group.has_weights
            if group.colon is not None:
                continue
        letters.append(special[0])
    letters += text[end:]
    for group in stack:
        if group.colon is not None:
            raise _malformed("".join(letters[group.start :]), "is not closed")
    kept = tuple(weight for weight in weights if weight.weight != 1)
    return "".join(letters), kept or None


def _weight(letters: list[str], group: _Open) -> PromptWeight:
    """The weight of a group that was just closed; takes its parenthesis and its number out of the letters."""
    assert group.colon is not None
    written, number = "".join(letters[group.start :]) + ")", "".join(letters[group.colon + 1 :])
    if group.has_weights:
        raise _malformed(written, "has a weight in a weight")
    if not _NUMBER.fullmatch(number) or float(number) > MAX_WEIGHT:
        raise _malformed(written, "is no weight")
    del letters[group.colon :]
    del letters[group.start]
    words = "".join(letters[group.start :])
    if not words.strip():
        raise _malformed(written, "has no words")
    first = group.start + len(words) - len(words.lstrip())
    return PromptWeight(start=first, end=first + len(words.strip()), weight=float(number))


def _malformed(written: str, problem: str) -> UsageError:
    shown = written if len(written) <= 60 else f"{written[:57]}..."
    return UsageError(
        rf"{shown!r} {problem}: write (cat:1.3) with a number from 0 to {MAX_WEIGHT:g}, or \( for the character"
    )


def branch_weights(recipe: Recipe, branch: str) -> tuple[PromptWeight, ...]:
    """The weights of the prompt that a guidance branch reads."""
    return (recipe.weights if branch == "positive" else recipe.negative_weights) or ()


def token_weights(weights: Sequence[PromptWeight], tokens: Sequence[Spanned]) -> list[float]:
    """The weight of each token; 1 for those of no weighted words. A token of two weights has their product."""
    values = [1.0] * len(tokens)
    for weight in weights:
        for number in _tokens_of(weight, tokens):
            values[number] *= weight.weight
    return values


def weight_text(tokens: Sequence[int], weights: Sequence[float]) -> str | None:
    """The weight of a word, by the numbers of its tokens, as text; None where it is 1."""
    held = sorted({weights[number] for number in tokens})
    return None if held == [1.0] else f"{held[0]:g}" if len(held) == 1 else f"{held[0]:g} to {held[-1]:g}"


def check_weights(weights: Sequence[PromptWeight], prompt: str, tokens: Sequence[Spanned]) -> None:
    """Raises UsageError for weighted words of which the language model reads no token."""
    for weight in weights:
        if not _tokens_of(weight, tokens):
            words = prompt[weight.start : weight.end]
            raise UsageError(f"the language model reads no token of {words!r}, which has a weight: leave it out")


def _tokens_of(weight: PromptWeight, tokens: Sequence[Spanned]) -> list[int]:
    """The numbers of the tokens of weighted words, by their characters."""
    return [n for n, token in enumerate(tokens) if max(token.start, weight.start) < min(token.end, weight.end)]
