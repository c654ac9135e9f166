"""Rectified flow as the method defines it: z_t = (1 - t) z_0 + t z_1, time 1 = noise, velocity v = z_1 - z_0.

Shapes: B batch, C channels, H x W the latent's size.
"""

import torch
from torch import Tensor

LOSS_T_MIN = 0.1
"""Below this time the weight of the x-prediction loss is constant (as in JiT)."""


def noised(z0_BCHW: Tensor, z1_BCHW: Tensor, t_B: Tensor) -> Tensor:
    """z_t on the straight path from the image z_0 to the noise z_1."""
    t = t_B[:, None, None, None]
    return (1 - t) * z0_BCHW + t * z1_BCHW


def velocity(z_t: Tensor, x_hat: Tensor, t: Tensor | float) -> Tensor:
    """The velocity of a predicted clean image: v = (z_t - x_hat) / t, for t > 0."""
    return (z_t - x_hat) / t


def extrapolated(v: Tensor, v_before: Tensor, t_before: float, t: float, t_next: float) -> Tensor:
    """The mean velocity of a step from t to t_next, extrapolated linearly from the last two velocities.

    This is the two-step Adams-Bashforth method, of second order: with equal steps 1.5 v - 0.5 v_before.
    """
    ahead = (t_next - t) / (t - t_before) / 2
    return torch.lerp(v, v_before, -ahead)


def velocity_loss(x_hat_BCHW: Tensor, z0_BCHW: Tensor, t_B: Tensor, importance_B1HW: Tensor | float = 1.0) -> Tensor:
    """Mean squared error of the velocity, written for x-prediction: || x_hat - z_0 ||^2 / max(t, 0.1)^2.

    `importance_B1HW` weighs the places.
    """
    weight_B = t_B.clamp_min(LOSS_T_MIN).square().reciprocal()
    error_BCHW = importance_B1HW * (x_hat_BCHW.float() - z0_BCHW).square()
    return (weight_B * error_BCHW.mean(dim=(1, 2, 3))).mean()


def logit_normal(count: int, mean: float, std: float, generator: torch.Generator) -> Tensor:
    """Training times in (0, 1): sigmoid of a normal variable. A positive mean favours noise."""
    return torch.sigmoid(mean + std * torch.randn(count, generator=generator))
