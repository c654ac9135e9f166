"""Memory as people meet it: what --max-vram chooses, what is said where memory runs out, what has no effect."""

from pathlib import Path

import pytest
from test_placement import no_memory

from mos_cli import pipeline as pipeline_module
from mos_cli.errors import MemoryLimitError, UsageError
from mos_cli.runtime.blueprints import find_network
from mos_cli.runtime.bundles import Bundle
from mos_cli.runtime.fitting import CARDS, candidates, fastest
from mos_cli.runtime.memory import GIB, Setting
from mos_cli.runtime.settings import RunSettings, fitted, smaller


@pytest.mark.parametrize("name", ["mos-s", "mos-l"])
def test_max_vram_chooses_what_the_plan_says(name: str) -> None:
    size = find_network(name).canvas.native
    for gib in CARDS:
        best = fastest(candidates(find_network(name), size), gib)
        chosen = fitted(RunSettings(max_vram=gib), name, size, None)
        parts = chosen.quant.split(",")
        assert (parts[0], parts[-1]) == (best.setting.understanding, best.setting.generation)
        assert (chosen.offload, chosen.tiled) == (best.setting.offload, best.setting.tiled)


def test_what_was_asked_for_is_kept_and_the_rest_chosen() -> None:
    size = find_network("mos-l").canvas.native
    kept = fitted(RunSettings(max_vram=24, offload="blocks"), "mos-l", size, "nf4")
    assert (kept.quant, kept.offload) == ("nf4,nf4", "blocks")
    with pytest.raises(MemoryLimitError, match="nothing fits 8 GiB"):
        fitted(RunSettings(max_vram=8), "mos-l", size, "none")
    with pytest.raises(UsageError):
        fitted(RunSettings(max_vram=8), "mos-l", size, "nf5")


def test_where_memory_ran_out_a_setting_is_named_that_needs_clearly_less() -> None:
    network = find_network("mos-l")
    size, now = network.canvas.native, Setting("none", "none", "none", False)
    every = {one.setting: one for one in candidates(network, size)}
    for card in (12, 24, None):
        found = smaller("mos-l", size, now, card)
        assert found is not None
        assert found.peak < 0.9 * every[now].peak
        if card is not None:
            assert found.needs <= card * GIB
        else:
            assert found.setting.offload == "none"
    least = min(every.values(), key=lambda one: one.peak).setting
    assert smaller("mos-l", size, least, 24) is None
    assert smaller("mos-l", size, now, 1) is None
    assert smaller("no-such", size, now, 24) is None


def test_out_of_memory_names_the_setting_that_should_fit(
    mos, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_module, "sample", no_memory)
    large = find_network("mos-l")
    monkeypatch.setattr("mos_cli.runtime.blueprints.find_network", lambda ref: large)
    result = mos("generate", "a dog", "-o", tmp_path / "a.png")
    assert result.exit_code == 5
    (line,) = [line for line in result.stderr.splitlines() if "memory" in line]
    assert "--quant " in line
    assert "--size" in line
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    "moment", ["mos_cli.pipeline.load_generation", "mos_cli.towers.generation.GenerationTower.read"]
)
def test_memory_that_runs_out_at_another_moment_is_told_too(
    mos, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    monkeypatch.setattr(moment, no_memory)
    result = mos("generate", "a dog", "-o", tmp_path / "a.png")
    assert result.exit_code == 5
    (line,) = [line for line in result.stderr.splitlines() if "memory" in line]
    assert "take a smaller" in line


REFUSED = {
    "--max-vram on a CPU": (["--max-vram", "8"], 2, "--max-vram has no effect on a CPU"),
    "--offload on a CPU": (["--offload", "blocks"], 2, "--offload has no effect on a CPU"),
    "--offload of something else": (["--offload", "all"], 2, "offload"),
    "--max-vram of nothing": (["--max-vram", "0"], 2, "max_vram"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_would_have_no_effect_is_refused(mos, editor: Bundle, tmp_path: Path, mistake: str) -> None:
    options, code, words = REFUSED[mistake]
    made, recipe = tmp_path / "made.png", ["--device", "cpu"]
    assert mos("generate", "a dog", "-o", made, *recipe).exit_code == 0
    for command in (["generate", "a dog"], ["edit", made, "a cat"], ["replay", made]):
        result = mos(*command, "-o", tmp_path / "none.png", *recipe, *options)
        assert (result.exit_code, len(result.stderr.splitlines())) == (code, 1), result.output
        assert words in result.stderr
        assert not (tmp_path / "none.png").exists()


def test_to_offload_nothing_is_no_mistake(mos, bundle: Bundle, tmp_path: Path) -> None:
    assert mos("generate", "a dog", "-o", tmp_path / "a.png", "--offload", "none").exit_code == 0
