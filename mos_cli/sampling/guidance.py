"""Classifier-free guidance and its branches, computed as one batch or one after the other.

Shapes: B branches, T context tokens, J generation blocks, M understanding layers, C channels, H x W the latent's size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from mos_cli.towers.bank import StateBank, join
from mos_cli.towers.layers import VariableLengths
from mos_cli.towers.router import Route, Steering

POSITIVE, NEGATIVE, WITHOUT_IMAGE = "positive", "negative", "unseen"
"""The names of the branches, as traces have them: the prompt, the negative prompt, and this without the pictures."""
SteeringInput = Steering | Route | None


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: x = x_negative + scale * (x_positive - x_negative) while t is in the interval.

    In an edit x_negative is guided as well: x_without + image_scale * (x_negative - x_without), where x_without is
    predicted without the pictures (InstructPix2Pix, arXiv 2211.09800). A branch without effect is not computed.
    """

    scale: float
    interval: tuple[float, float] = (0.0, 1.0)
    image_scale: float = 1.0

    def branches(self, t: float) -> tuple[str, ...]:
        """The branches that are needed at time t."""
        inside = self.interval[0] <= t <= self.interval[1]
        negative = self.scale != 1.0 or self.image_scale != 1.0
        needed = (POSITIVE, NEGATIVE, WITHOUT_IMAGE)[: 1 + negative + (self.image_scale != 1.0)]
        return needed if inside else (POSITIVE,)

    def guided(self, x_hats: dict[str, Tensor]) -> Tensor:
        """The guided clean latent, from the predictions of the branches."""
        x_hat = x_hats[POSITIVE]
        if NEGATIVE not in x_hats:
            return x_hat
        base = x_hats[NEGATIVE]
        if WITHOUT_IMAGE in x_hats:
            base = torch.lerp(x_hats[WITHOUT_IMAGE], base, self.image_scale)
        return torch.add(base, x_hat - x_hats[NEGATIVE], alpha=self.scale)


class Predictor(Protocol):
    """The interface of a generation tower for the sampler: (z_t, t, bank) -> (clean latent, route)."""

    def __call__(
        self, z_BCHW: Tensor, t_B: Tensor, bank: StateBank, *, steering: SteeringInput
    ) -> tuple[Tensor, Route]: ...


class Branches:
    """Computes the branches that are needed at a step.

    Args:
        banks: the state bank of each branch.
        batched_guidance: compute the branches with references as one batch and those without as another. Attention is
            computed branch by branch, so padding has no effect.
    """

    def __init__(self, tower: Predictor, banks: Mapping[str, StateBank], *, batched_guidance: bool) -> None:
        self.tower, self.banks, self.batched_guidance = tower, banks, batched_guidance
        self._joined: dict[tuple[str, ...], StateBank] = {}
        self._steerings: dict[tuple[str, ...], tuple[list[SteeringInput], SteeringInput]] = {}

    def __call__(
        self, names: Sequence[str], z_BCHW: Tensor, t: float, steer: Callable[[str], SteeringInput]
    ) -> tuple[dict[str, Tensor], dict[str, Route]]:
        """The clean latent that each branch predicts, and its route."""
        x_hats, routes = {}, {}
        for group in self._groups(names):
            predict = self._one if len(group) == 1 else self._batch
            for name, x_hat_BCHW, route in predict(group, z_BCHW, t, steer):
                x_hats[name], routes[name] = x_hat_BCHW, route
        return x_hats, routes

    def _one(
        self, group: Sequence[str], z_BCHW: Tensor, t: float, steer: Callable[[str], SteeringInput]
    ) -> Iterator[tuple[str, Tensor, Route]]:
        (name,), t_B = group, z_BCHW.new_full(z_BCHW.shape[:1], t)
        yield name, *self.tower(z_BCHW, t_B, self.banks[name], steering=steer(name))

    def _batch(
        self, group: tuple[str, ...], z_1CHW: Tensor, t: float, steer: Callable[[str], SteeringInput]
    ) -> Iterator[tuple[str, Tensor, Route]]:
        if group not in self._joined:
            self._joined[group] = join([self.banks[name] for name in group])
        bank, steerings = self._joined[group], [steer(name) for name in group]
        assert isinstance(bank.padding, VariableLengths)
        z_BCHW, t_B = z_1CHW.expand(len(group), -1, -1, -1), z_1CHW.new_full((len(group),), t)
        before, steering = self._steerings.get(group, ([], None))
        if not before or any(old is not new for old, new in zip(before, steerings, strict=True)):
            # Most steps have the same steering as the one before.
            steering = _join_steerings(steerings, [self.banks[name] for name in group], bank.padding)
            self._steerings[group] = (steerings, steering)
        x_hat_BCHW, route = self.tower(z_BCHW, t_B, bank, steering=steering)
        for number, (name, steering_inputs) in enumerate(zip(group, steerings, strict=True)):
            row = route.row(bank.padding, number)
            # No changed decisions are counted for a branch without rules.
            row = row if steering_inputs is not None else replace(row, changed_BTJ=None)
            yield name, x_hat_BCHW[number : number + 1], row

    def _groups(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        if not self.batched_guidance:
            return [(name,) for name in names]
        with_images = tuple(name for name in names if self.banks[name].references is not None)
        without = tuple(name for name in names if self.banks[name].references is None)
        return [group for group in (with_images, without) if group]


def _join_steerings(
    steerings: Sequence[SteeringInput], banks: Sequence[StateBank], padding: VariableLengths
) -> SteeringInput:
    """The steering of several branches as one batch. A baseline and an order of layers are equal for all branches."""
    first = next((steering for steering in steerings if steering is not None), None)
    if not isinstance(first, Steering):
        return first
    allowed, bias, biased = [], [], False
    for steering, bank in zip(steerings, banks, strict=True):
        free_BTJM = first.allowed_BTJM.new_ones(1, bank.bank_BTMD.shape[1], *first.allowed_BTJM.shape[2:])
        allowed.append(steering.allowed_BTJM if isinstance(steering, Steering) else free_BTJM)
        bias_BTJM = steering.bias_BTJM if isinstance(steering, Steering) else None
        biased |= bias_BTJM is not None
        bias.append(torch.zeros_like(free_BTJM, dtype=torch.float32) if bias_BTJM is None else bias_BTJM)
    return Steering(padding.join(allowed, fill=True), padding.join(bias) if biased else None, first.order_JM)
