"""Parameter groups, learning rates and moving averages."""

from pathlib import Path

import pytest
import torch
from paired_steps import Operations

from mos_cli.training import optimiser
from mos_cli.training.ema import PowerEMA, gamma_of
from mos_cli.training.optimiser import build_optimisers, rates_at, set_rates
from mos_cli.training.stages import curriculum
from tests.helpers import tiny_training as tiny


def test_every_parameter_is_in_one_group(understanding, tmp_path: Path) -> None:
    trainer = tiny.trainer(tiny.recipe(), understanding, tmp_path)
    optimisers = build_optimisers(trainer.tower)
    grouped = [p for optimiser in optimisers for group in optimiser.param_groups for p in group["params"]]
    assert len(grouped) == len(set(map(id, grouped))) == len(list(trainer.tower.parameters()))


def test_the_rate_warms_up_once_and_ends_at_nothing() -> None:
    plan = curriculum(tiny.recipe(warmup=4, steps=20))
    assert [plan.rate(step) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    assert [plan.rate(step) for step in (12, 16, 20)] == [1, 0.5, 0]
    quiet = ({**tiny.STAGES[0], "steps": 10}, {**tiny.STAGES[1], "steps": 10, "muon_lr": 1e-3})
    plan = curriculum(tiny.recipe(quiet, steps=None, warmup=4))
    optimisers = build_optimisers(torch.nn.ModuleDict({"blocks": torch.nn.Linear(2, 2)}))
    rates = []
    for step in (9, 10, 16):
        set_rates(optimisers, rates_at(plan, step))
        rates.append(tuple(optimiser.param_groups[0]["lr"] for optimiser in optimisers))
    assert rates == [(1e-2, 1e-2), (1e-3, 1e-2), (0.5e-3, 0.5e-2)]


def test_moving_averages_are_as_wide_as_they_say() -> None:
    """Against the definition: a weighted mean of all weights so far, with weights ~ t ** gamma."""
    assert [gamma_of(width) for width in (0.05, 0.10)] == pytest.approx([16.97, 6.94], abs=0.01)  # EDM2, section 3.1
    values, weight = torch.randn(200, generator=torch.Generator().manual_seed(0)), torch.zeros(1)
    ema = PowerEMA({"w": weight})
    for step, value in enumerate(values, start=1):
        ema.update({"w": value[None]}, step)
    for width, average in ema.averages.items():
        times = torch.arange(1, 201, dtype=torch.float64)
        share = times ** (gamma_of(float(width)) + 1)
        share = torch.diff(share, prepend=torch.zeros(1, dtype=torch.float64)) / 200 ** (gamma_of(float(width)) + 1)
        assert average["w"].item() == pytest.approx((share * values).sum().item(), abs=1e-5)
        centre = (share * times).sum() / 200
        spread = ((share * (times / 200 - centre).square()).sum()).sqrt().item()
        assert spread == pytest.approx(float(width), rel=0.05)


def matrices(seed: int) -> list[torch.nn.Parameter]:
    """Wide, tall and square ones, with gradients; the last has none."""
    noise = torch.Generator().manual_seed(seed)
    shapes = ((8, 24), (24, 8), (8, 24), (16, 16), (24, 8), (8, 24), (16, 16))
    made = [torch.nn.Parameter(torch.randn(shape, generator=noise)) for shape in shapes]
    give_gradients(made, seed)
    return made


def give_gradients(parameters: list[torch.nn.Parameter], seed: int) -> None:
    noise = torch.Generator().manual_seed(seed)
    for scale, parameter in enumerate(parameters[:-1], start=1):
        parameter.grad = torch.randn(parameter.shape, generator=noise) * 10**-scale


@pytest.mark.parametrize("largest", [optimiser.LARGEST, 2 * 8 * 24])
def test_matrices_of_one_shape_together_change_as_pytorch_changes_them_alone(monkeypatch, largest: int) -> None:
    monkeypatch.setattr(optimiser, "LARGEST", largest)
    ours, theirs = matrices(0), matrices(0)
    mine = optimiser.Muon(ours)
    plain = torch.optim.Muon(theirs, lr=0.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    optimiser.start_states([mine, plain])
    before = [matrix.detach().clone() for matrix in ours]
    for step in range(4):
        for each, made in ((mine, ours), (plain, theirs)):
            each.param_groups[0]["lr"] = 0.1 / (1 + step)
            give_gradients(made, step)
            each.step()
    for one, other, start in zip(ours, theirs, before, strict=True):
        changed = (other - start).norm()
        # Rounding to bfloat16, in products of another order.
        assert (one - other).norm() <= 0.01 * changed
        assert changed > 0 or one is ours[-1]
        # The momentum has no products in it.
        assert torch.equal(mine.state[one]["momentum_buffer"], plain.state[other]["momentum_buffer"])
    # Either takes up the state of the other.
    plain.load_state_dict(mine.state_dict())
    mine.load_state_dict(plain.state_dict())
    assert torch.equal(mine.state[ours[0]]["momentum_buffer"], plain.state[theirs[0]]["momentum_buffer"])


def test_a_step_of_muon_starts_as_many_operations_for_more_matrices() -> None:
    def operations(count: int) -> int:
        made = [torch.nn.Parameter(torch.randn(8, 24)) for _ in range(count)]
        for matrix in made:
            matrix.grad = torch.randn(8, 24)
        muon = optimiser.Muon(made)
        optimiser.start_states([muon])
        with Operations() as counted:
            muon.step()
        return counted.computing.total()

    assert operations(12) == operations(3) <= 30
