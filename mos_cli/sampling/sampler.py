"""The denoising loop: from noise to a latent, step by step, with observers.

Pictures are drawn one at a time, unless a batch is asked for: a product of matrices rounds otherwise with more rows.

Shapes: P pictures, B = 1 picture, C channels, H x W the latent's size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from mos_cli.sampling.flow import extrapolated, noised, velocity
from mos_cli.sampling.guidance import Branches, Guidance, Predictor, SteeringInput
from mos_cli.towers.bank import StateBank
from mos_cli.towers.router import Route
from mos_cli.utils.validation import Solver


@dataclass(frozen=True)
class InitialLatent:
    """The clean latent that a run starts from.

    Args:
        z0_BCHW: the latent, mixed with noise for the first time t; at t = 1 nothing of it is left.
        mask_11HW: how far each place may change, 0 to 1; None lets everything change.
    """

    z0_BCHW: Tensor
    mask_11HW: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """The data of a step for observers: its number, time, predicted clean latent, and the routes of each branch."""

    index: int
    total: int
    t: float
    x_hat_BCHW: Tensor
    routes: dict[str, Route]


Observer = Callable[[Step], None]
Steer = Callable[[int, str], SteeringInput]
"""The steering of a branch at a step: (number of the step, branch) -> steering."""


def make_sigmas(scheduler: FlowMatchEulerDiscreteScheduler, steps: int, first: float = 1.0) -> Tensor:
    """The sigmas (times) of a run, float32 [S + 1] on the CPU: the start of each step, and 0, the end of the last.

    They are evenly spaced from `first`, apart from the scheduler's shift. The scheduler is not changed.
    """
    made: FlowMatchEulerDiscreteScheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)  # type: ignore[assignment]
    # With a number of steps instead of sigmas the scheduler would apply its shift twice.
    made.set_timesteps(sigmas=np.linspace(first, first / steps, steps).tolist())
    return made.sigmas  # type: ignore[return-value]


def sample(
    tower: Predictor,
    noise_BCHW: Tensor,
    banks: dict[str, StateBank],
    *,
    observers: Sequence[Observer] = (),
    steer: Steer | None = None,
    **sampling: Any,
) -> Tensor:
    """Integrates from noise to the latent of one picture.

    Args:
        noise_BCHW: z_1, float32.
        banks: the state banks of the branches that guidance needs.
        observers: called after every step, in order; an exception raised by one ends the run.
        steer: the steering of every step; without it the router decides.
        sampling: the other arguments of `sample_batch`.
    """
    return sample_batch(tower, noise_BCHW, [banks], observers=[observers], steer=[steer], **sampling)


@torch.inference_mode()
def sample_batch(
    tower: Predictor,
    noise_PCHW: Tensor,
    banks: Sequence[dict[str, StateBank]],
    *,
    sigmas: Tensor,
    solver: Solver,
    guidance: Guidance,
    observers: Sequence[Sequence[Observer]] = (),
    steer: Sequence[Steer | None] | None = None,
    batched_guidance: bool = False,
    bucket: int | None = None,
    initial: InitialLatent | None = None,
    reset_cache: Callable[[], None] = lambda: None,
) -> Tensor:
    """Integrates from noise to the latents of several pictures, as one batch at every step.

    Args:
        noise_PCHW: z_1, float32.
        banks, observers, steer: those of each picture; see `sample`.
        sigmas: the times of the run; see `make_sigmas`.
        solver: "euler", or "ab2", the two-step Adams-Bashforth method. Its first step is an Euler step; so is a step
            at which guidance begins or ends, since the velocity jumps there and cannot be extrapolated.
        batched_guidance, bucket: compute the branches as one batch, with prompts in buckets; see `Branches`.
        initial: the latent to start from; without it the run starts from noise alone.
        reset_cache: called before a step at which guidance begins or ends.
    """
    times = sigmas.tolist()
    z, steps = noise_PCHW, len(times) - 1
    if initial is not None:
        z = noised(initial.z0_BCHW, z, torch.full((z.shape[0],), times[0], device=z.device))
    steer = steer or [None] * len(banks)
    predict = Branches(tower, banks, batched_guidance=batched_guidance, bucket=bucket)
    guides = guidance.branches(times[0]), guidance.network_scale(times[0])
    v_before: Tensor | None = None
    for index, (t, t_next) in enumerate(pairwise(times)):
        before, guides = guides, (guidance.branches(t), guidance.network_scale(t))
        names, scale = guides
        if guides != before:
            reset_cache()
            v_before = None
        x_hats, routes = predict(names, z, t, partial(_steering, steer, index), scale)
        x_hat = guidance.guided(x_hats)
        if initial is not None and initial.mask_11HW is not None:
            x_hat = torch.lerp(initial.z0_BCHW, x_hat, initial.mask_11HW)
        v = velocity(z, x_hat, t)
        mean_v = v
        if solver == "ab2" and v_before is not None:
            mean_v = extrapolated(v, v_before, times[index - 1], t, t_next)
        v_before = v
        z = torch.add(z, mean_v, alpha=t_next - t)
        for number, observe_picture in enumerate(observers):
            for observe in observe_picture:
                observe(Step(index, steps, t, x_hat[number : number + 1], routes[number]))
    return z


def _steering(steer: Sequence[Steer | None], step: int, number: int, branch: str) -> SteeringInput:
    of_picture = steer[number]
    return None if of_picture is None else of_picture(step, branch)
