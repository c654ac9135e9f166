"""The branches of guidance: computed in one pass of the generation tower, or each in a pass of its own.

Shapes: B branches, T context tokens, J generation blocks, M understanding layers, C channels, H x W the latent's size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from mos_cli.towers.bank import StateBank, join
from mos_cli.towers.layers import VariableLengths
from mos_cli.towers.router import Route, Steering

SteeringInput = Steering | Route | None


class Predictor(Protocol):
    """What the sampler needs of a generation tower: (z_t, t, bank) -> (clean latent, route)."""

    def __call__(
        self, z_BCHW: Tensor, t_B: Tensor, bank: StateBank, *, steering: SteeringInput
    ) -> tuple[Tensor, Route]: ...


class Branches:
    """Asks the tower for the branches that count at a step.

    Args:
        banks: what each branch reads.
        together: of one picture, those with references are computed in one pass and those without in another. Attention
            is still each branch's own: the padding of a shorter prompt is never seen.
    """

    def __init__(self, tower: Predictor, banks: Mapping[str, StateBank], *, together: bool) -> None:
        self.tower, self.banks, self.together = tower, banks, together
        self._made: dict[tuple[str, ...], StateBank] = {}
        self._steered: dict[tuple[str, ...], tuple[list[SteeringInput], SteeringInput]] = {}

    def __call__(
        self, names: Sequence[str], z_BCHW: Tensor, t: float, steer: Callable[[str], SteeringInput]
    ) -> tuple[dict[str, Tensor], dict[str, Route]]:
        """The clean latent that each branch predicts, and its route."""
        x_hats, routes = {}, {}
        for group in self._passes(names):
            ask = self._one if len(group) == 1 else self._several
            for name, x_hat_BCHW, route in ask(group, z_BCHW, t, steer):
                x_hats[name], routes[name] = x_hat_BCHW, route
        return x_hats, routes

    def _one(
        self, group: Sequence[str], z_BCHW: Tensor, t: float, steer: Callable[[str], SteeringInput]
    ) -> Iterator[tuple[str, Tensor, Route]]:
        (name,), t_B = group, z_BCHW.new_full(z_BCHW.shape[:1], t)
        yield name, *self.tower(z_BCHW, t_B, self.banks[name], steering=steer(name))

    def _several(
        self, group: tuple[str, ...], z_1CHW: Tensor, t: float, steer: Callable[[str], SteeringInput]
    ) -> Iterator[tuple[str, Tensor, Route]]:
        if group not in self._made:
            self._made[group] = join([self.banks[name] for name in group])
        bank, steerings = self._made[group], [steer(name) for name in group]
        assert isinstance(bank.padding, VariableLengths)
        z_BCHW, t_B = z_1CHW.expand(len(group), -1, -1, -1), z_1CHW.new_full((len(group),), t)
        before, steering = self._steered.get(group, ([], None))
        if not before or any(old is not new for old, new in zip(before, steerings, strict=True)):
            # Most steps share their steering with the one before.
            steering = _join_steerings(steerings, [self.banks[name] for name in group], bank.padding)
            self._steered[group] = (steerings, steering)
        x_hat_BCHW, route = self.tower(z_BCHW, t_B, bank, steering=steering)
        for number, (name, steering_inputs) in enumerate(zip(group, steerings, strict=True)):
            row = route.row(bank.padding, number)
            # A branch that no rule speaks of counts no decisions as turned.
            row = row if steering_inputs is not None else replace(row, changed_BTJ=None)
            yield name, x_hat_BCHW[number : number + 1], row

    def _passes(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        if not self.together:
            return [(name,) for name in names]
        sighted = tuple(name for name in names if self.banks[name].references is not None)
        blind = tuple(name for name in names if self.banks[name].references is None)
        return [group for group in (sighted, blind) if group]


def _join_steerings(
    steerings: Sequence[SteeringInput], banks: Sequence[StateBank], padding: VariableLengths
) -> SteeringInput:
    """What rules say of several branches as one; a baseline, and an order of layers, say the same of all of them."""
    spoken = next((steering for steering in steerings if steering is not None), None)
    if not isinstance(spoken, Steering):
        return spoken
    allowed, bias, biased = [], [], False
    for steering, bank in zip(steerings, banks, strict=True):
        free_BTJM = spoken.allowed_BTJM.new_ones(1, bank.bank_BTMD.shape[1], *spoken.allowed_BTJM.shape[2:])
        allowed.append(steering.allowed_BTJM if isinstance(steering, Steering) else free_BTJM)
        bias_BTJM = steering.bias_BTJM if isinstance(steering, Steering) else None
        biased |= bias_BTJM is not None
        bias.append(torch.zeros_like(free_BTJM, dtype=torch.float32) if bias_BTJM is None else bias_BTJM)
    return Steering(padding.join(allowed, fill=True), padding.join(bias) if biased else None, spoken.order_JM)
