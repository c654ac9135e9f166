"""Rectified flow: velocities, the loss, and the times of training."""

import pytest
import torch

from mos_cli.sampling.flow import logit_normal, noised, velocity, velocity_loss


def test_the_velocity_of_the_true_image_is_noise_minus_image() -> None:
    z0, z1, t = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), torch.tensor([0.3, 0.9])
    z_t = noised(z0, z1, t)
    torch.testing.assert_close(velocity(z_t, z0, t[:, None, None, None]), z1 - z0)


def test_the_loss_is_the_squared_error_of_the_velocity() -> None:
    z0, z1, x_hat, t = (
        torch.randn(2, 3, 8, 8),
        torch.randn(2, 3, 8, 8),
        torch.randn(2, 3, 8, 8),
        torch.tensor([0.3, 0.9]),
    )
    v = velocity(noised(z0, z1, t), x_hat, t[:, None, None, None])
    torch.testing.assert_close(velocity_loss(x_hat, z0, t), (v - (z1 - z0)).square().mean())


def test_training_times_favour_noise_as_the_mean_says() -> None:
    t = logit_normal(20_000, 0.4, 0.8, torch.Generator().manual_seed(0))
    assert ((t > 0) & (t < 1)).all()
    assert t.median().item() == pytest.approx(1 / (1 + 2.718281828**-0.4), abs=0.01)
