"""The sampler: straight paths end where they should, and guidance acts when it should."""

from itertools import pairwise
from typing import get_args

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from mos_cli.sampling.flow import velocity
from mos_cli.sampling.guidance import NEGATIVE, POSITIVE, Guidance
from mos_cli.sampling.sampler import InitialLatent, Step, make_sigmas, sample
from mos_cli.towers.bank import StateBank
from mos_cli.towers.router import Route
from mos_cli.utils.validation import Solver

ROUTE = Route(torch.zeros(1, 1, 1, 2, dtype=torch.long), torch.full((1, 1, 1, 2), 0.5))
BANKS = {
    name: StateBank(torch.zeros(1, 1, 1, 1) + sign, torch.zeros(1, 1, 1))
    for name, sign in ((POSITIVE, 1), (NEGATIVE, -1))
}


NOISE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def run(tower, *, steps: int, solver: Solver = "ab2", guidance=Guidance(1.0), shift=1.0, first=1.0, **options):
    sigmas = make_sigmas(FlowMatchEulerDiscreteScheduler(shift=shift), steps, first)
    return sample(tower, NOISE, BANKS, sigmas=sigmas, solver=solver, guidance=guidance, **options)


@given(st.integers(1, 60), st.sampled_from([1.0, 3.0]), st.sampled_from(get_args(Solver)))
def test_a_perfect_predictor_lands_on_the_image(steps: int, shift: float, solver: Solver) -> None:
    image = torch.rand(1, 3, 8, 8) * 2 - 1
    landed = run(lambda z, t, bank, steering, guidance_B: (image, ROUTE), steps=steps, shift=shift, solver=solver)
    torch.testing.assert_close(landed, image, atol=2e-6, rtol=0)


def smooth(z, t, bank, steering, guidance_B=None):
    """A predictor that is smooth in time and picture: the sampler follows dz/dt = cos(3 t) - sin(z)."""
    return z - t.item() * (torch.cos(3 * t) - torch.sin(z)), ROUTE


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("ab2", 2)])
def test_the_error_falls_with_the_order_of_the_solver(solver: Solver, order: int, shift: float) -> None:
    """Twice the steps divide it by 2 or by 4, where the steps are even and where a shift makes them uneven."""
    fine = run(smooth, steps=1000, shift=shift)
    errors = [(run(smooth, steps=steps, shift=shift, solver=solver) - fine).norm() for steps in (64, 128, 256)]
    for coarse, finer in pairwise(errors):
        assert 2**order * 0.85 < coarse / finer < 2**order * 1.3


def test_with_even_steps_ab2_is_three_halves_and_minus_one_half() -> None:
    velocities: list[torch.Tensor] = []

    def tower(z, t, bank, steering, guidance_B):
        x_hat, route = smooth(z, t, bank, steering)
        velocities.append(velocity(z, x_hat, t))
        return x_hat, route

    landed = run(tower, steps=3)
    first, second, third = velocities
    expected = NOISE - (first + (1.5 * second - 0.5 * first) + (1.5 * third - 0.5 * second)) / 3
    torch.testing.assert_close(landed, expected)


@pytest.mark.parametrize("interval", [(0.0, 0.6), (0.4, 1.0), (0.3, 0.7)])
def test_nothing_is_extrapolated_over_a_jump_of_guidance(interval: tuple[float, float]) -> None:
    """Within and outside the interval the velocity is constant: any solver follows it, unless it mixes the two."""

    def tower(z, t, bank, steering, guidance_B):
        return z - t.item() * bank.bank_BTMD.item(), ROUTE

    guidance, steps = Guidance(3.0, interval), 20
    sigmas = make_sigmas(FlowMatchEulerDiscreteScheduler(), steps)[:-1].tolist()
    times_inside = [t for t in sigmas if interval[0] <= t <= interval[1]]
    # v is 1 alone, and -1 + 3 * 2 = 5 under guidance.
    expected = NOISE - (len(times_inside) * 5 + (steps - len(times_inside))) / steps
    torch.testing.assert_close(run(tower, steps=steps, guidance=guidance), expected)


@pytest.mark.parametrize("solver", get_args(Solver))
@pytest.mark.parametrize("strength", [1.0, 0.55])
def test_what_a_mask_keeps_lands_on_the_origin(solver: Solver, strength: float) -> None:
    z0 = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    landed = run(smooth, steps=7, solver=solver, first=strength, initial=InitialLatent(z0, mask))
    torch.testing.assert_close(landed[..., :4], z0[..., :4], atol=2e-6, rtol=0)
    assert (landed[..., 4:] - z0[..., 4:]).abs().max() > 0.1
    # The half that is drawn is drawn as without the mask: the predictor looks at each value alone.
    free = run(smooth, steps=7, solver=solver, first=strength, initial=InitialLatent(z0))
    torch.testing.assert_close(landed[..., 4:], free[..., 4:])


def test_times_fall_evenly_and_the_shift_is_applied_once() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    as_it_was = scheduler.sigmas.clone()
    assert make_sigmas(scheduler, 4).tolist() == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert make_sigmas(scheduler, 2, 0.6).tolist() == pytest.approx([0.6, 0.3, 0])
    assert torch.equal(scheduler.sigmas, as_it_was)
    shifted = [3 * t / (1 + 2 * t) for t in (1, 0.75, 0.5, 0.25, 0)]
    assert make_sigmas(FlowMatchEulerDiscreteScheduler(shift=3.0), 4).tolist() == pytest.approx(shifted)


def test_guidance_leads_away_from_the_negative_only_inside_its_interval() -> None:
    asked = []

    def tower(z, t, bank, steering, guidance_B):
        asked.append((round(t.item(), 3), bank is BANKS[POSITIVE]))
        return torch.full_like(z, bank.bank_BTMD.item()), ROUTE

    seen: list[Step] = []
    run(tower, steps=4, guidance=Guidance(3.0, (0.4, 0.8)), observers=[seen.append])
    assert asked == [(1.0, True), (0.75, True), (0.75, False), (0.5, True), (0.5, False), (0.25, True)]
    # x = negative + scale * (positive - negative) = -1 + 3 * 2.
    assert [step.x_hat_BCHW[0, 0, 0, 0].item() for step in seen] == [1, 5, 5, 1]
    assert [sorted(step.routes) for step in seen] == [
        [POSITIVE],
        [NEGATIVE, POSITIVE],
        [NEGATIVE, POSITIVE],
        [POSITIVE],
    ]
    assert [(step.index, step.total) for step in seen] == [(0, 4), (1, 4), (2, 4), (3, 4)]
