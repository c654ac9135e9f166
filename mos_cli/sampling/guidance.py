"""Classifier-free guidance and its branches, computed as one batch or one after the other.

Shapes: P pictures, B rows, one for each branch of each picture, T context tokens, J generation blocks, M understanding
layers, C channels, H x W the latent's size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
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

    Args:
        distilled: the network has the scale as an input, and its prediction from the prompt is the guided one.
    """

    scale: float
    interval: tuple[float, float] = (0.0, 1.0)
    image_scale: float = 1.0
    distilled: bool = False

    @classmethod
    def with_network(
        cls,
        guidance_max: float | None,
        scale: float,
        interval: tuple[float, float],
        image_scale: float = 1.0,
        negative: str = "",
    ) -> "Guidance":
        """Guidance as a network allows it: distilled up to its scale `guidance_max`, away from the empty prompt."""
        distilled = guidance_max is not None and scale <= guidance_max and image_scale == 1.0 and not negative
        return cls(scale, interval, image_scale, distilled)

    def network_scale(self, t: float) -> float | None:
        """The scale that is an input of the network at time t; None if the branches are guided."""
        if not self.distilled:
            return None
        return self.scale if self._acts(t) else 1.0

    def _acts(self, t: float) -> bool:
        return self.interval[0] <= t <= self.interval[1]

    def branches(self, t: float) -> tuple[str, ...]:
        """The branches that are needed at time t."""
        if self.distilled:
            return (POSITIVE,)
        negative = self.scale != 1.0 or self.image_scale != 1.0
        needed = (POSITIVE, NEGATIVE, WITHOUT_IMAGE)[: 1 + negative + (self.image_scale != 1.0)]
        return needed if self._acts(t) else (POSITIVE,)

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
        self,
        z_BCHW: Tensor,
        t_B: Tensor,
        bank: StateBank,
        *,
        steering: SteeringInput,
        guidance_B: Tensor | None,
    ) -> tuple[Tensor, Route]: ...


class Branches:
    """Computes the branches of the pictures of a batch that are needed at a step.

    Args:
        banks: for each picture the state bank of each branch. With several pictures there are no references.
        batched_guidance: compute the branches with references as one batch and those without as another.
        bucket: prompts are padded to a multiple of so many tokens, with a mask, so that prompts of different lengths
            have the same shapes. Without it, attention is computed row by row where the rows differ in length.
    """

    def __init__(
        self,
        tower: Predictor,
        banks: Sequence[Mapping[str, StateBank]],
        *,
        batched_guidance: bool,
        bucket: int | None = None,
    ) -> None:
        self.tower, self.banks, self.batched_guidance, self.bucket = tower, banks, batched_guidance, bucket
        self._joined: dict[tuple[str, ...], StateBank] = {}
        self._steerings: dict[tuple[str, ...], tuple[list[SteeringInput], SteeringInput]] = {}

    def __call__(
        self,
        names: Sequence[str],
        z_PCHW: Tensor,
        t: float,
        steer: Callable[[int, str], SteeringInput],
        scale: float | None = None,
    ) -> tuple[dict[str, Tensor], list[dict[str, Route]]]:
        """The clean latents [P, C, H, W] that each branch predicts, and for each picture the route of each branch.

        Args:
            steer: the steering of a branch of a picture, by its number.
            scale: see `Guidance.network_scale`.
        """
        x_hats: dict[str, Tensor] = {}
        routes: list[dict[str, Route]] = [{} for _ in self.banks]
        for group in self._groups(names):
            alone = len(group) == len(self.banks) == 1 and self.bucket is None
            predict = self._one if alone else self._batch
            x_hat_BCHW, rows = predict(group, z_PCHW, t, steer, scale)
            x_hats |= zip(group, x_hat_BCHW.split(len(self.banks)), strict=True)
            for (name, number), row in zip(self._rows(group), rows, strict=True):
                routes[number][name] = row
        return x_hats, routes

    def _one(
        self,
        group: Sequence[str],
        z_1CHW: Tensor,
        t: float,
        steer: Callable[[int, str], SteeringInput],
        scale: float | None,
    ) -> tuple[Tensor, list[Route]]:
        (name,), t_1 = group, z_1CHW.new_full((1,), t)
        guidance_1 = None if scale is None else z_1CHW.new_full((1,), scale)
        x_hat_1CHW, route = self.tower(z_1CHW, t_1, self.banks[0][name], steering=steer(0, name), guidance_B=guidance_1)
        return x_hat_1CHW, [route]

    def _batch(
        self,
        group: tuple[str, ...],
        z_PCHW: Tensor,
        t: float,
        steer: Callable[[int, str], SteeringInput],
        scale: float | None,
    ) -> tuple[Tensor, list[Route]]:
        rows = self._rows(group)
        if group not in self._joined:
            self._joined[group] = join([self.banks[number][name] for name, number in rows], self.bucket)
        bank, steerings = self._joined[group], [steer(number, name) for name, number in rows]
        assert isinstance(bank.padding, VariableLengths)
        z_BCHW, t_B = z_PCHW.expand(len(group), *z_PCHW.shape).flatten(0, 1), z_PCHW.new_full((len(rows),), t)
        before, steering = self._steerings.get(group, ([], None))
        if not before or any(old is not new for old, new in zip(before, steerings, strict=True)):
            # Most steps have the same steering as the one before.
            steering = _join_steerings(steerings, [self.banks[number][name] for name, number in rows], bank.padding)
            self._steerings[group] = (steerings, steering)
        guidance_B = None if scale is None else z_PCHW.new_full((len(rows),), scale)
        x_hat_BCHW, route = self.tower(z_BCHW, t_B, bank, steering=steering, guidance_B=guidance_B)
        found = []
        for number, steering_inputs in enumerate(steerings):
            row = route.row(bank.padding, number)
            # No changed decisions are counted for a branch without rules.
            found.append(row if steering_inputs is not None else replace(row, changed_BTJ=None))
        return x_hat_BCHW, found

    def _rows(self, group: Sequence[str]) -> list[tuple[str, int]]:
        """The rows of a batch in their order: a branch of all pictures, then the next branch."""
        return list(product(group, range(len(self.banks))))

    def _groups(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        if not self.batched_guidance:
            return [(name,) for name in names]
        with_images = tuple(name for name in names if self.banks[0][name].references is not None)
        without = tuple(name for name in names if self.banks[0][name].references is None)
        return [group for group in (with_images, without) if group]


def _join_steerings(
    steerings: Sequence[SteeringInput], banks: Sequence[StateBank], padding: VariableLengths
) -> SteeringInput:
    """The steering of several rows as one batch. A baseline and an order of layers are equal for all rows."""
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
