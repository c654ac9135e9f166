"""`mos bench`: what it promises."""

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mos_cli.bundles.bundle import Bundle
from mos_cli.cli.bench import _print_table, measure_preset
from mos_cli.config.settings import Settings, load_preset
from mos_cli.planning.candidates import GPU_SIZES
from mos_cli.towers.autoencoder import Pixels
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.router import Router
from mos_cli.towers.understanding import UnderstandingTower

READING, ROUTING, DRAWING, DECODING = 8.0, 1.0, 3.0, 2.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time that passes in the networks alone, always the same for a call."""
    now = [0.0]

    def taking(seconds: float, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            now[0] += seconds
            return call(*arguments, **options)

        return timed

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    for owner, name, seconds in (
        (UnderstandingTower, "encode", READING),
        (Router, "forward", ROUTING),
        (GenerationTower, "forward", DRAWING),
        (Pixels, "decode", DECODING),
    ):
        monkeypatch.setattr(owner, name, taking(seconds, getattr(owner, name)))


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("steps", [2, 40])
def test_what_is_measured_is_where_the_time_went(bundle: Bundle, steps: int) -> None:
    measured = measure_preset(Settings(model="tiny", steps=steps), None, 2)
    assert measured["model"] == "tiny"
    assert measured["size"] == [32, 32]
    step = ROUTING + DRAWING
    assert measured["step_seconds"] == step
    # Both prompts are read before the first step.
    assert measured["first_step_seconds"] == 2 * READING + step
    assert measured["decode_seconds"] == DECODING
    # The first picture reads the prompts anew, too.
    assert measured["first_picture_seconds"] == measured["picture_seconds"]
    assert measured["picture_seconds"] == 2 * READING + steps * step + DECODING
    assert measured["pictures_per_minute"] == pytest.approx(60 / measured["picture_seconds"])
    assert "joules_per_picture" not in measured


@pytest.fixture
def measured(bundle: Bundle) -> dict:
    return measure_preset(Settings(model="tiny"), None, 2)


def test_the_routers_share_and_loading_are_measured(measured: dict) -> None:
    assert 0 < measured["router_share"] < 1
    assert measured["load_seconds"] > 0


@pytest.mark.slow
def test_presets_are_compared_and_one_that_fails_stops_no_other(mos, bundle: Bundle) -> None:
    done = mos("bench", "-m", "tiny", "-p", "fast", "-p", "quality", "-p", "gpu-8gb", "--rounds", 1, "--json")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["preset"], row["steps"]) for row in rows[:2]] == [("fast", 6), ("quality", 24)]
    if not torch.cuda.is_available():
        assert done.exit_code == 7
        assert "CPU" in done.stderr


def test_the_table_names_what_a_preset_sets(measured: dict, capsys: pytest.CaptureFixture) -> None:
    plain = {**measured, "threads": 1, "rounds": 1}
    _print_table([plain])
    alone = capsys.readouterr().out
    assert "feature cache" not in alone
    assert "compiled" not in alone
    assert "1 thread\n" in "\n".join(line.rstrip() for line in alone.splitlines()) + "\n"
    assert "pictures a minute" in alone
    assert "One picture after the first, its prompt read anew." in alone
    _print_table([plain, {**plain, "preset": "mine", "feature_cache": 3, "compiled": True}])
    rows = {line[:21].strip(): line[21:].split() for line in capsys.readouterr().out.splitlines()}
    assert rows["feature cache"] == ["1", "3"]
    assert rows["compiled"] == ["no", "yes"]


def test_mistakes_are_told_before_anything_is_loaded(mos) -> None:
    for option, value, word in (("-p", "nonsense", "nonsense"), ("--rounds", 0, "rounds"), ("--steps", 0, "steps")):
        said = mos("bench", option, value)
        assert said.exit_code == 2
        assert word in said.stderr


def test_presets_for_cards_say_how_large_they_are() -> None:
    for card in GPU_SIZES:
        assert load_preset(f"gpu-{card}gb").settings == Settings(max_vram=card)
