"""The script that fills the table for GPUs: that every part runs here, and what it promises."""

import json
from collections.abc import Callable
from itertools import product
from types import SimpleNamespace
from typing import Any

import performance
import performance_caps
import performance_networks as networks
import performance_steps
import pytest
import torch
from performance_caps import _cap
from performance_model import MoSL, Run, difference
from performance_steps import place

from mos_cli.inference.offload import Offloader
from mos_cli.planning.candidates import candidates, fastest
from mos_cli.planning.memory import GIB, Offload
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.layers import VariableLengths
from tests.helpers.memory import no_memory

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


@pytest.mark.parametrize("part", ["router", "rivals", "share", "nf4", "attention", "graphs"])
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
def test_compiled_blocks_say_the_same(fill: Callable[[str], list[dict]]) -> None:
    rows = fill("compile")
    assert [(row["blocks"], row["cuda_graph"]) for row in rows] == list(product(("eager", "compiled"), (False, True)))
    assert all(row["difference"] < 0.05 for row in rows)


@pytest.mark.parametrize(("step_seconds", "paid"), [(1.5, 62), (2.5, "never")])
def test_compiling_has_paid_when_the_steps_have_saved_what_it_cost(
    monkeypatch: pytest.MonkeyPatch, step_seconds: float, paid: int | str
) -> None:
    """With a clock of the test's own: an eager step takes 2 s, and compiling 93 s beside three steps."""
    steady = {"eager": 2.0, "compiled": step_seconds}
    first = {"eager": 3 * 2.0, "compiled": 3 * step_seconds + 93.0}
    kinds, readings = iter(steady), []

    def clock() -> float:
        # Read before and after the first calls of a row, whose steady time is asked for next.
        readings.append(0.0 if len(readings) % 2 == 0 else first[kind := next(kinds)])
        if len(readings) % 2 == 0:
            monkeypatch.setattr(performance_steps, "seconds", lambda *_: steady[kind])
        return readings[-1]

    monkeypatch.setattr(performance_steps, "time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(GenerationTower, "compile_repeated_blocks", lambda tower, **_: None)
    eager, compiled = (row for row in performance_steps.compiled(Run(CPU, rounds=1, tiny=True)) if "why" not in row)
    assert (eager["cost_seconds"], compiled["cost_seconds"]) == (0, 93)
    assert compiled["ratio"] == step_seconds / 2
    # Of a picture's three steps each saves half a second.
    assert compiled["paid_after_pictures"] == paid


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


def test_every_cap_is_drawn_under_in_the_setting_of_its_card(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is made and how it is offloaded, beside what the plan says of each card."""
    made: list[tuple[object, ...]] = []
    offloader, understanding, generation = Offloader, networks.understanding_tower, networks.generation_tower

    def offloaded(device: torch.device, offload: Offload) -> Offloader:
        made.append((offload,))
        return offloader(device, offload)

    def kept(build: Callable[..., Any]) -> Callable[..., Any]:
        def built(shape: object, device: torch.device, method: str | None = None) -> Any:
            made[-1] += (method or "none",)
            return build(shape, device, method)

        return built

    monkeypatch.setattr(performance_caps, "Offloader", offloaded)
    monkeypatch.setattr(networks, "understanding_tower", kept(understanding))
    monkeypatch.setattr(networks, "generation_tower", kept(generation))
    assert performance.main(["caps", "--tiny"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    plan = networks.mos_l(tiny=False)
    found = candidates(plan, plan.canvas.native)
    best = {cap: fastest(found, cap) for cap in (24, 16, 12, 8)}
    assert [row["cap_gib"] for row in rows] == list(best)
    assert [row["setting"] for row in rows] == [one.options for one in best.values()]
    chosen = [one.setting for one in best.values()]
    assert made == [(setting.offload, setting.understanding, setting.generation) for setting in chosen]
    assert len(set(made)) > 1
    assert all(row["passes"] and row["size"] == [128, 128] for row in rows)


def test_a_cap_that_is_too_small_is_told_with_the_stage_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "read_states", no_memory)
    tiny = networks.mos_l(tiny=True)
    row = performance_caps.draw_under(24, tiny, tiny, CPU)
    assert (row["passes"], row["stopped_after"], row["why"]) == (False, ["load"], "CUDA out of memory")


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
