"""The script that fills the table for GPUs: that every part runs here, and what it promises."""

import json
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import performance
import performance_networks as networks
from performance_caps import _cap
from performance_model import MoSL, Run, difference
from performance_steps import place

from mos_cli.planning.memory import GIB
from mos_cli.towers.layers import VariableLengths

CPU = torch.device("cpu")


@pytest.fixture
def fill(capsys: pytest.CaptureFixture[str]) -> Callable[[str], list[dict]]:
    """Runs a part with small networks; returns its rows."""

    def run(part: str) -> list[dict]:
        assert performance.main([part, "--tiny", "--rounds", "1"]) == 0
        return _rows(part, capsys.readouterr().out.splitlines())

    return run


def _rows(part: str, lines: list[str]) -> list[dict]:
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    assert rows
    assert {row["part"] for row in rows} == {part}
    assert all(row["tiny"] for row in rows)
    # A header and its rule, a line for each row, and an empty one.
    table = lines[: len(lines) - len(rows)]
    assert len(table) == len(rows) + 3
    assert len({line.count("|") for line in table[:-1]}) == 1
    return rows


@pytest.mark.parametrize("part", ["router", "rivals", "share", "nf4", "attention"])
def test_every_part_of_the_table_can_be_filled(part: str, fill: Callable[[str], list[dict]]) -> None:
    fill(part)


def test_branches_say_the_same_in_one_pass_and_in_two(fill: Callable[[str], list[dict]]) -> None:
    rows = fill("batched_guidance")
    assert [(row["blocks"], row["tokens"]) for row in rows] == list(product(("bf16", "nf4", "bf16, fetched"), (16, 64)))
    assert all(row["difference"] < 0.02 for row in rows)
    assert all(row["ratio"] == pytest.approx(row["batched_seconds"] / row["sequential_seconds"]) for row in rows)


def test_a_difference_is_that_of_the_row_that_differs_most() -> None:
    expected = torch.ones(2, 3, 4)
    said = expected * torch.tensor([1.1, 0.8])[:, None, None]
    assert difference(said, expected) == pytest.approx(0.2)
    model = MoSL(Run(CPU, rounds=1, tiny=True))
    of_one, of_another = model.step(32)(), model.step(64)()
    # The negative prompt is the same.
    assert difference(of_one[1:], of_another[1:]) < 0.02 < difference(of_one, of_another)


@pytest.mark.cuda
def test_compiled_blocks_say_the_same_and_tell_what_they_cost(fill: Callable[[str], list[dict]]) -> None:
    rows = fill("compile")
    assert [(row["blocks"], row["cuda_graph"]) for row in rows] == list(product(("eager", "compiled"), (False, True)))
    eager, compiled = rows[0], rows[2]
    assert compiled["difference"] < 0.05
    assert compiled["cost_seconds"] > 10 * eager["cost_seconds"]
    saves = compiled["step_seconds"] < eager["step_seconds"]
    assert compiled["paid_after_pictures"] == "never" or saves


def test_whether_the_host_waits_is_not_told_without_cuda(fill: Callable[[str], list[dict]]) -> None:
    rows = fill("sync")
    assert [row["steering"] for row in rows] == [False, True]
    if not torch.cuda.is_available():
        assert all(row["host"] == "no CUDA" for row in rows)


@pytest.mark.cuda
def test_the_host_never_waits_within_the_steps(fill: Callable[[str], list[dict]]) -> None:
    assert [row["host"] for row in fill("sync")] == ["never waits"] * 2


def test_the_place_where_the_host_waits_is_one_of_ours() -> None:
    with pytest.raises(RuntimeError) as caught:
        VariableLengths((1,)).join([torch.zeros(2, 2)])
    assert place(caught.value).startswith("waits in layers.py, line ")


def test_every_cap_is_drawn_under_in_the_setting_of_its_card(capsys: pytest.CaptureFixture[str]) -> None:
    assert performance.main(["caps", "--tiny"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [row["cap_gib"] for row in rows] == [24, 16, 12, 8]
    assert all(row["passes"] and row["planned_gib"] < row["cap_gib"] for row in rows)
    assert "--offload none" not in rows[-1]["setting"]


@pytest.mark.parametrize(("cap", "fraction"), [(8, 7 / 12), (24, 1.0)])
def test_a_cap_counts_what_others_took_and_is_no_more_than_the_card(
    monkeypatch: pytest.MonkeyPatch, cap: int, fraction: float
) -> None:
    told = []
    monkeypatch.setattr("torch.cuda.memory._lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (9 * GIB, 12 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * GIB)
    monkeypatch.setattr(torch._C, "_cuda_setMemoryFraction", lambda *asked: told.append(asked), raising=False)
    # As the script names it: without a number.
    _cap(cap * GIB, torch.device("cuda"))
    assert told == [(pytest.approx(fraction), 0)]


def test_without_a_gpu_the_table_is_not_filled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert performance.main(["router"]) == 6
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1


def test_the_networks_are_as_large_as_those_they_stand_for() -> None:
    for rival, parameters in ((networks.QWEN_IMAGE, 20.4e9), (networks.FLUX, 11.9e9), (networks.SANA, 4.72e9)):
        assert rival.parameters() == pytest.approx(parameters, rel=0.005)
    shape = networks.mos_l(tiny=True).understanding
    made = networks.understanding_tower(shape, CPU)
    count = sum(weight.numel() for weight in made.parameters())
    assert count == pytest.approx(shape.linear + shape.other, rel=0.01)
    assert networks.read_states(made).shape == (1, 256, *shape.states)
