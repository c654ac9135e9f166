"""What each layer does for a word: the word may not read it, or nothing else, and all else stays as it was.

Shapes: S steps, J generation blocks, T tokens, K kept layers, M understanding layers.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mos_cli.errors import UsageError
from mos_cli.routing.rules import Rule, tokens_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from mos_cli.config.recipe import Recipe
    from mos_cli.inference.pipeline import Drawing
    from mos_cli.routing.trace import Routes, Trace
    from mos_cli.sampling.sampler import Observer, Step


@dataclass(frozen=True)
class Ablated:
    """A picture drawn without one layer for a word, or with that layer alone, and what became of it.

    `read` is the share of the word's decisions that kept the layer before. `change` is the mean absolute difference to
    the picture before, in 8-bit levels (0 to 255), and `psnr` the same in dB, infinite where nothing changed.
    `refused` says why it could not be drawn: the rules it was drawn with leave the word no layer.
    """

    layer: int
    read: float
    image: "Image"
    change: float
    psnr: float
    refused: str | None = None


class _BegunError(Exception):
    """Ends a drawing that has begun."""


def check_rule(recipe: "Recipe", rule: Rule, draw: "Callable[[Recipe, Observer], object]") -> None:
    """Finds out whether a recipe can be drawn with a rule, by beginning to: rules are checked before the first step.

    Raises:
        UsageError: the prompt has no such word, the model no such blocks, the run no such steps, or other rules forbid.
    """

    def stop(step: "Step") -> None:
        raise _BegunError

    with suppress(_BegunError):
        # Adding nothing clashes with no other rule.
        draw(with_layer(recipe, replace(rule, operator="+=", amount=0.0), 0), stop)


def ablate(before: "Drawing", rule: Rule, draw: "Callable[[Recipe], Image]") -> Iterator[Ablated]:
    """Bans one layer after the other, in their order, or pins the word to one after the other.

    A layer that the word never read is not drawn without: the router keeps what it kept, so that nothing can change.

    Args:
        before: the picture as it is, with its routes.
        rule: a ban or a pin; which layers it names counts for nothing.
        draw: draws a recipe, everything beside the recipe as it was for `before`.
    """
    recipe, shares_M = before.record.recipe, shares_read(before.trace, before.routes, rule)
    for layer, share in enumerate(shares_M):
        same = share == 0 and rule.operator == "!="
        try:
            image = before.image if same else draw(with_layer(recipe, rule, layer))
        except UsageError as error:
            yield Ablated(layer, share, before.image, 0.0, float("inf"), str(error))
            continue
        change, psnr = difference(before.image, image)
        yield Ablated(layer, share, image, change, psnr)


def shares_read(trace: "Trace", routes: "dict[str, Routes]", rule: Rule) -> list[float]:
    """For each layer, the share of the decisions that a rule speaks of, in all branches, that kept it, [M].

    All are 0 where guidance computed no branch with the rule's word at its steps.
    """
    kept_M, decisions = np.zeros(len(trace.layers)), 0
    for name, branch in trace.branches.items():
        tokens = list(tokens_of(rule, branch.prompt, branch.tokens))
        steps = [index for index, step in enumerate(branch.steps) if rule.steps is None or step in rule.steps]
        blocks = list(range(trace.blocks) if rule.blocks is None else rule.blocks)
        ids_SJTK = routes[name].ids_SJTK[np.ix_(steps, blocks, tokens)]
        kept_M += [(ids_SJTK == layer).any(axis=-1).sum() for layer in range(len(trace.layers))]
        decisions += len(steps) * len(blocks) * len(tokens)
    return (kept_M / max(decisions, 1)).tolist()


def with_layer(recipe: "Recipe", rule: Rule, layer: int) -> "Recipe":
    """The recipe with the rule, made to speak of one layer, beside the rules it has."""
    return recipe.model_copy(update={"routes": (*(recipe.routes or ()), str(replace(rule, layers=(layer,))))})


def difference(before: "Image", after: "Image") -> tuple[float, float]:
    """Mean absolute difference of two 8-bit pictures of one size, in levels, and their PSNR in dB."""
    apart = np.asarray(before, np.float64) - np.asarray(after, np.float64)
    squared = np.square(apart).mean()
    return float(np.abs(apart).mean()), float("inf") if squared == 0 else float(10 * np.log10(255**2 / squared))
