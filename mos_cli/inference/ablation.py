"""Ablation: a word may not read a layer, or only that layer, and everything else stays as it was.

Shapes: S steps, J generation blocks, T tokens, K kept layers, M understanding layers.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mos_cli.errors import UsageError
from mos_cli.images.differences import mean_difference, psnr
from mos_cli.routing.rules import Rule, tokens_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from mos_cli.config.recipe import Recipe
    from mos_cli.inference.drawing import Drawing
    from mos_cli.routing.trace import Routes, Trace
    from mos_cli.sampling.sampler import Observer, Step


@dataclass(frozen=True)
class Ablated:
    """A picture drawn without one layer for a word, or with that layer only, compared with the picture before.

    `read` is the share of the word's decisions that kept the layer before. `change` is the mean absolute difference, in
    8-bit levels (0 to 255), and `psnr` that in dB, infinite for equal pictures. `refused` is the reason why it could
    not be drawn: the other rules leave the word no layer.
    """

    layer: int
    read: float
    image: "Image"
    change: float
    psnr: float
    refused: str | None = None


class _BegunError(Exception):
    """Stops a drawing at its first step."""


def check_rule(recipe: "Recipe", rule: Rule, draw: "Callable[[Recipe, Observer], object]") -> None:
    """Checks a rule by drawing with it until the first step, before which rules are checked.

    Raises:
        UsageError: the prompt, the model or the run does not have the rule's word, blocks or steps, or it conflicts
            with other rules.
    """

    def stop(step: "Step") -> None:
        raise _BegunError

    # A bias of 0 conflicts with no other rule.
    tried = replace(rule, operator="+=", amount=0.0, layers=(0,))
    try:
        with suppress(_BegunError):
            draw(with_layer(recipe, tried, 0), stop)
    except UsageError as error:
        word = str(replace(rule, operator="=", layers=(0,), blocks=None, steps=None)).removesuffix("=0")
        raise UsageError(str(error).replace(f"the route rule {tried}", f"--word {word}")) from None


def ablate(before: "Drawing", rule: Rule, draw: "Callable[[Recipe], Image]") -> Iterator[Ablated]:
    """Bans one layer after the other for a word, or pins the word to one after the other.

    A ban of a layer that the word never read changes nothing, and is not drawn.

    Args:
        before: the picture without the rule, with its routes.
        rule: a ban or a pin; its layers are ignored.
        draw: draws a recipe with the settings of `before`.
    """
    recipe, shares_M = before.record.recipe, shares_read(before.trace, before.routes, rule)
    for layer, share in enumerate(shares_M):
        same = share == 0 and rule.operator == "!="
        try:
            image = before.image if same else draw(with_layer(recipe, rule, layer))
        except UsageError as error:
            yield Ablated(layer, share, before.image, 0.0, float("inf"), str(error))
            continue
        yield Ablated(layer, share, image, mean_difference(before.image, image), psnr(before.image, image))


def shares_read(trace: "Trace", routes: "dict[str, Routes]", rule: Rule) -> list[float]:
    """For each layer, the share of the rule's decisions, over all branches, that kept it, [M].

    All are 0 where no branch with the rule's word was computed at its steps.
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
    """The recipe with the rule for one layer added to its rules."""
    return recipe.model_copy(update={"routes": (*(recipe.routes or ()), str(replace(rule, layers=(layer,))))})
