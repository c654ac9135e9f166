"""The denoising loop: from noise to a latent, step by step, with observers looking on.

Shapes: C channels, H x W the latent's size; pictures are drawn one at a time, so that a picture never depends on how
many are asked for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from mos_cli.sampling.flow import velocity
from mos_cli.towers.bank import StateBank
from mos_cli.towers.router import Route


class Predictor(Protocol):
    """What the sampler needs of a generation tower: (z_t, t, bank) -> (clean latent, route)."""

    def __call__(self, z_BCHW: Tensor, t_B: Tensor, bank: StateBank) -> tuple[Tensor, Route]: ...


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: x = x_negative + scale * (x_positive - x_negative) while t is in the interval.

    Outside the interval, or at scale 1, the negative branch is not computed.
    """

    scale: float
    interval: tuple[float, float] = (0.0, 1.0)

    def acts(self, t: float) -> bool:
        return self.scale != 1.0 and self.interval[0] <= t <= self.interval[1]


@dataclass(frozen=True)
class Step:
    """What an observer sees after each step: its number, time, predicted picture and the routes of each branch."""

    index: int
    total: int
    t: float
    x_hat_BCHW: Tensor
    routes: dict[str, Route]


Observer = Callable[[Step], None]

POSITIVE, NEGATIVE = "positive", "negative"


def times(steps: int, scheduler: FlowMatchEulerDiscreteScheduler) -> list[float]:
    """The times at which the tower is asked, 1 first; evenly spaced but for the scheduler's own shift."""
    # Given a mere number of steps the scheduler would apply its shift twice.
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps).tolist())
    return scheduler.sigmas[:-1].tolist()  # type: ignore[index, union-attr]


@torch.inference_mode()
def sample(
    tower: Predictor,
    noise_BCHW: Tensor,
    banks: dict[str, StateBank],
    *,
    steps: int,
    guidance: Guidance,
    scheduler: FlowMatchEulerDiscreteScheduler,
    observers: Sequence[Observer] = (),
) -> Tensor:
    """Integrates from noise (t = 1) to a latent (t = 0).

    Args:
        noise_BCHW: z_1, float32.
        banks: the state banks of the "positive" and, if guidance acts, the "negative" prompt.
        observers: called after every step, in order; an exception raised by one ends the run.
    """
    z = noise_BCHW
    for index, t in enumerate(times(steps, scheduler)):
        t_B = torch.full((z.shape[0],), t, device=z.device)
        x_hat, route = tower(z, t_B, banks[POSITIVE])
        routes = {POSITIVE: route}
        if guidance.acts(t):
            x_negative, routes[NEGATIVE] = tower(z, t_B, banks[NEGATIVE])
            x_hat = x_negative + guidance.scale * (x_hat - x_negative)
        v = velocity(z, x_hat, t)
        z = scheduler.step(v, scheduler.timesteps[index], z, return_dict=False)[0]  # type: ignore[arg-type, index]
        for observe in observers:
            observe(Step(index, steps, t, x_hat, routes))
    return z
