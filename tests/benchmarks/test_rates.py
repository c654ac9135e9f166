"""The sweep of the learning rates: all runs see the same pictures and begin with the same weights."""

from pathlib import Path

import pytest
import rates

from mos_cli.training.stages import curriculum
from tests.helpers import tiny_training as tiny


def test_runs_differ_by_their_rates_alone(tmp_path: Path, encoder_folder: Path, capsys) -> None:
    recipe = rates.short_recipe(str(tiny.write_recipe(tmp_path, encoder_folder)), 4, None)
    pairs = [(1e-2, 1e-2), (1e-3, 1e-2), (1e-2, 1e-3), (1e-2, 1e-2)]
    found = rates.sweep(recipe, [*pairs[:3], (1e30, 1e30)], tmp_path)
    firsts = {run[0] for run in found.values()}
    assert len(firsts) == 1
    assert len({run[-1] for run in found.values()}) == 4
    assert found[pairs[0]] == rates.sweep(recipe, pairs[3:], tmp_path)[pairs[0]]


def test_the_table_marks_the_least_and_what_diverged() -> None:
    found = {(1e-3, 1e-3): [1.0] * 20, (1e-3, 2e-3): [1.0] * 18 + [0.5, 0.25], (2e-3, 1e-3): [1.0, float("nan")]}
    found[2e-3, 2e-3] = [2.0]
    assert rates.table(found).splitlines()[2:] == [
        "| 0.001 | 1.0000 | **0.3750** |",
        "| 0.002 | diverged | 2.0000 |",
    ]


@pytest.mark.parametrize("stage", [None, "full"])
def test_one_stage_is_run(stage: str | None) -> None:
    plan = curriculum(rates.with_rates(rates.short_recipe("train-emoji-256", 50, stage), 3e-3, 2e-3))
    (only,) = plan.stages
    assert (only.name, plan.steps, only.muon_lr, only.adamw_lr) == (stage or "small", 50, 3e-3, 2e-3)
    assert plan.warmup == 10
