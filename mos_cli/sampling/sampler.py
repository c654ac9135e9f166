"""The denoising loop: from noise to a latent, step by step, with observers looking on.

Shapes: C channels, H x W the latent's size; pictures are drawn one at a time, so that a picture never depends on how
many are asked for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from mos_cli.sampling.branches import Branches, Predictor, SteeringInput
from mos_cli.sampling.flow import extrapolated, noised, velocity
from mos_cli.towers.bank import StateBank
from mos_cli.towers.router import Route
from mos_cli.utils.validation import Solver


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: x = x_negative + scale * (x_positive - x_negative) while t is in the interval.

    Editing, x_negative is guided in turn: x_unseen + image_scale * (x_negative - x_unseen), where the unseen branch
    knows nothing of the pictures (InstructPix2Pix, arXiv 2211.09800). A branch without effect is not computed.
    """

    scale: float
    interval: tuple[float, float] = (0.0, 1.0)
    image_scale: float = 1.0

    def branches(self, t: float) -> tuple[str, ...]:
        """The branches that count at time t."""
        inside = self.interval[0] <= t <= self.interval[1]
        negative = self.scale != 1.0 or self.image_scale != 1.0
        needed = (POSITIVE, NEGATIVE, WITHOUT_IMAGE)[: 1 + negative + (self.image_scale != 1.0)]
        return needed if inside else (POSITIVE,)

    def guided(self, x_hats: dict[str, Tensor]) -> Tensor:
        """The clean latent to go for, from what the branches predict."""
        x_hat = x_hats[POSITIVE]
        if NEGATIVE not in x_hats:
            return x_hat
        base = x_hats[NEGATIVE]
        if WITHOUT_IMAGE in x_hats:
            base = x_hats[WITHOUT_IMAGE] + self.image_scale * (base - x_hats[WITHOUT_IMAGE])
        return base + self.scale * (x_hat - x_hats[NEGATIVE])


@dataclass(frozen=True)
class InitialLatent:
    """The clean latent a picture is drawn over.

    Args:
        z0_BCHW: the latent; a run that begins before t = 1 leaves something of it.
        mask_11HW: how far each place may change, 0 to 1; None lets everything change.
    """

    z0_BCHW: Tensor
    mask_11HW: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """What an observer sees after each step: its number, time, predicted picture and the routes of each branch."""

    index: int
    total: int
    t: float
    x_hat_BCHW: Tensor
    routes: dict[str, Route]


Observer = Callable[[Step], None]
Steer = Callable[[int, str], SteeringInput]
"""What rules say of a branch at a step: (number of the step, branch) -> steering."""

POSITIVE, NEGATIVE, WITHOUT_IMAGE = "positive", "negative", "unseen"


def make_sigmas(scheduler: FlowMatchEulerDiscreteScheduler, steps: int, first: float = 1.0) -> Tensor:
    """The times of a run, float32 [S + 1] on the CPU: where each step begins, and 0, where the last ends.

    They are evenly spaced from `first` but for the scheduler's shift. The scheduler itself is left as it is.
    """
    made: FlowMatchEulerDiscreteScheduler = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)  # type: ignore[assignment]
    # Given a mere number of steps the scheduler would apply its shift twice.
    made.set_timesteps(sigmas=np.linspace(first, first / steps, steps).tolist())
    return made.sigmas  # type: ignore[return-value]


@torch.inference_mode()
def sample(
    tower: Predictor,
    noise_BCHW: Tensor,
    banks: dict[str, StateBank],
    *,
    sigmas: Tensor,
    solver: Solver,
    guidance: Guidance,
    together: bool = False,
    observers: Sequence[Observer] = (),
    initial: InitialLatent | None = None,
    steer: Steer = lambda step, branch: None,
    reset_cache: Callable[[], None] = lambda: None,
) -> Tensor:
    """Integrates from noise to a latent.

    Args:
        noise_BCHW: z_1, float32.
        sigmas: the times of the run; see `make_sigmas`.
        solver: "euler", or "ab2", the two-step Adams-Bashforth method. Its first step is an Euler step; so is a step
            with other branches than the one before, since the velocity jumps there and cannot be extrapolated.
        banks: the state banks of the branches that guidance asks for.
        together: branches are computed together; see `Branches`.
        observers: called after every step, in order; an exception raised by one ends the run.
        initial: what the picture is drawn over; without it, it comes from noise alone.
        steer: what rules say; without it the router decides.
        reset_cache: called before a step that asks for other branches than the one before it.
    """
    times = sigmas.tolist()
    z, steps = noise_BCHW, len(times) - 1
    if initial is not None:
        z = noised(initial.z0_BCHW, z, torch.full((z.shape[0],), times[0], device=z.device))
    predict = Branches(tower, banks, together=together)
    names = guidance.branches(times[0])
    v_before: Tensor | None = None
    for index, (t, t_next) in enumerate(pairwise(times)):
        before, names = names, guidance.branches(t)
        if names != before:
            reset_cache()
            v_before = None
        x_hats, routes = predict(names, z, t, partial(steer, index))
        x_hat = guidance.guided(x_hats)
        if initial is not None and initial.mask_11HW is not None:
            x_hat = torch.lerp(initial.z0_BCHW, x_hat, initial.mask_11HW)
        v = velocity(z, x_hat, t)
        mean_v = v
        if solver == "ab2" and v_before is not None:
            mean_v = extrapolated(v, v_before, times[index - 1], t, t_next)
        v_before = v
        z = z + (sigmas[index + 1] - sigmas[index]) * mean_v
        for observe in observers:
            observe(Step(index, steps, t, x_hat, routes))
    return z
