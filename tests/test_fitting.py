"""Memory as people meet it: what --max-vram chooses, what is said where memory runs out, what has no effect."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import awake
from test_placement import no_memory

from mos_cli.bundles.blueprints import find_network
from mos_cli.bundles.bundle import Bundle, write_index
from mos_cli.bundles.shapes import GenerationShape, UnderstandingShape
from mos_cli.bundles.sources import fetch_tower
from mos_cli.config.settings import RunSettings, fitted, smaller
from mos_cli.errors import MemoryLimitError, UsageError
from mos_cli.inference import pipeline as pipeline_module
from mos_cli.planning.candidates import GPU_SIZES, candidates, fastest, parse_quant
from mos_cli.planning.memory import GIB, Setting
from mos_cli.towers.generation import GenerationTower


@pytest.mark.parametrize("name", ["mos-s", "mos-l"])
def test_max_vram_chooses_what_the_plan_says(name: str) -> None:
    size = find_network(name).canvas.native
    for gib in GPU_SIZES:
        best = fastest(candidates(find_network(name), size), gib)
        chosen = fitted(RunSettings(max_vram=gib), find_network(name), size, None)
        assert (
            Setting(*parse_quant(chosen.quant), chosen.offload, chosen.tiled, chosen.batched_guidance) == best.setting
        )


def test_what_was_asked_for_is_kept_and_the_rest_chosen() -> None:
    size = find_network("mos-l").canvas.native
    kept = fitted(RunSettings(max_vram=24, offload="blocks"), find_network("mos-l"), size, "nf4")
    assert (kept.quant, kept.offload) == ("nf4", "blocks")
    with pytest.raises(MemoryLimitError, match="nothing fits 8 GiB"):
        fitted(RunSettings(max_vram=8), find_network("mos-l"), size, "none")
    with pytest.raises(UsageError):
        fitted(RunSettings(max_vram=8), find_network("mos-l"), size, "nf5")


def test_branches_are_computed_together_unless_that_does_not_fit() -> None:
    network = find_network("mos-l")
    size = network.canvas.native
    assert all(fastest(candidates(network, size), card).setting.batched_guidance for card in GPU_SIZES)
    # Large pictures of small towers: what is computed is most of what is needed.
    sizes: dict[str, Any] = {"width": 256, "heads": 2, "hidden": 4096, "depth": 2, "channels": 32, "patch": 1}
    shape = GenerationShape(**sizes, states_layers=37, states_width=4096)
    wide = replace(network, generation=shape, references=0, autoencoder=None, understanding=SMALL)
    found = [c for c in candidates(wide, (1024, 1024), quant=("none", "none")) if c.setting.offload == "none"]
    both, apart = (
        min(c.needs for c in found if c.setting.batched_guidance is batched_guidance)
        for batched_guidance in (True, False)
    )
    assert apart < both
    assert fastest(found, both / GIB).setting.batched_guidance
    assert not fastest(found, (both + apart) / 2 / GIB).setting.batched_guidance
    unguided = replace(wide, defaults=wide.defaults.model_copy(update={"cfg": 1.0}))
    assert all(c.setting.batched_guidance for c in candidates(unguided, (1024, 1024)))


def test_together_weights_are_unpacked_and_fetched_once_a_step() -> None:
    network = find_network("mos-l")
    found = {c.setting: c.seconds for c in candidates(network, network.canvas.native)}
    # Guidance acts on nine tenths of the steps.
    nf4, blocks = Setting(generation="nf4"), Setting(offload="blocks")
    nf4_apart, blocks_apart = (found[replace(setting, batched_guidance=False)] for setting in (nf4, blocks))
    assert nf4_apart["quantised layers"] == pytest.approx(1.9 * found[nf4]["quantised layers"])
    assert blocks_apart["waiting for blocks"] >= 1.9 * found[blocks]["waiting for blocks"]
    assert nf4_apart["drawing"] == found[nf4]["drawing"]
    # Every row is rounded, however many there are.
    int8 = Setting(generation="int8")
    assert found[int8] == found[replace(int8, batched_guidance=False)]


def test_a_run_in_full_precision_is_planned_as_such() -> None:
    size = find_network("mos-l").canvas.native
    half = fitted(RunSettings(max_vram=24), find_network("mos-l"), size, None)
    full = fitted(RunSettings(max_vram=24), find_network("mos-l", precision="fp32"), size, None)
    assert (half.quant, half.offload) != (full.quant, full.offload)
    assert fastest(candidates(find_network("mos-l", precision="fp32"), size), 24).quant == full.quant


def test_what_a_model_is_already_is_not_asked_for(bundle: Bundle, mos, tmp_path: Path) -> None:
    fetch_tower(bundle.index.understanding)
    sizes = {"width": 64, "depth": 2, "heads": 2, "hidden": 64, "router_width": 32, "router_heads": 2}
    tower = awake(GenerationTower(**sizes, states_layers=4, states_width=32))  # type: ignore[arg-type]
    tower.bfloat16().save_pretrained(bundle.folder / "generation")
    kept = ("name", "description", "license", "understanding", "canvas", "defaults")
    write_index(bundle.folder, **{name: getattr(bundle.index, name) for name in kept})
    made = mos("models", "quantize", "tiny", "--quant", "nf4", "--out", bundle.folder.parent / "less")
    assert made.exit_code == 0, made.output
    network = find_network("less")
    found = candidates(network, (32, 32))
    assert {c.setting.generation for c in found} == {"nf4"}
    assert {c.quant for c in found} == {"none", "int8,none", "nf4,none"}
    for text in ("none", "nf4,none"):
        assert fitted(RunSettings(max_vram=8), find_network("less"), (32, 32), text).quant == text
        planned = mos("plan", "less", "--max-vram", 8, "--quant", text)
        assert f"--quant {text} --offload none" in planned.output
    assert mos("generate", "a dog", "-m", "less", "--quant", "none", "-o", tmp_path / "a.png").exit_code == 0
    with pytest.raises(UsageError, match="--quant int8,none"):
        candidates(network, (32, 32), quant=("int8", "nf4"))


def test_where_memory_ran_out_a_setting_is_named_that_needs_clearly_less() -> None:
    network = find_network("mos-l")
    size, now = network.canvas.native, Setting()
    every = {one.setting: one for one in candidates(network, size)}
    for card in (12, 24, None):
        found = smaller(find_network("mos-l"), size, now, card)
        assert found is not None
        assert found.peak < 0.9 * every[now].peak
        if card is not None:
            assert found.needs <= card * GIB
        else:
            assert found.setting.offload == "none"
    least = min(every.values(), key=lambda one: one.peak).setting
    assert smaller(find_network("mos-l"), size, least, 24) is None
    assert smaller(find_network("mos-l"), size, now, 1) is None


def test_out_of_memory_names_the_setting_that_should_fit(
    mos, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_module, "sample", no_memory)
    large = find_network("mos-l")
    monkeypatch.setattr("mos_cli.inference.pipeline.network_of", lambda bundle, **run: large)
    result = mos("generate", "a dog", "-o", tmp_path / "a.png")
    assert result.exit_code == 5
    (line,) = [line for line in result.stderr.splitlines() if "memory" in line]
    assert "--quant " in line
    assert "--size" in line
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    "moment", ["mos_cli.inference.loading.load_generation", "mos_cli.towers.generation.GenerationTower.project_states"]
)
def test_memory_that_runs_out_at_another_moment_is_told_too(
    mos, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    monkeypatch.setattr(moment, no_memory)
    result = mos("generate", "a dog", "-o", tmp_path / "a.png")
    assert result.exit_code == 5
    (line,) = [line for line in result.stderr.splitlines() if "memory" in line]
    assert "take a smaller" in line


SMALL = UnderstandingShape(layers=36, width=4096, hidden=1, linear=1, other=1, vision=0)
REFUSED = {
    "--max-vram on a CPU": (["--max-vram", "8"], 2, "--max-vram auto takes what fits"),
    "--offload on a CPU": (["--offload", "blocks"], 2, "CPU: --offload none"),
    "--offload of something else": (["--offload", "all"], 2, "offload"),
    "--max-vram of nothing": (["--max-vram", "0"], 2, "--max-vram: write GiB as a number above 0, or auto"),
    "--max-vram of something else": (["--max-vram", "all"], 2, "or auto, not all"),
    "--offload beside auto on a CPU": (["--max-vram", "auto", "--offload", "blocks"], 2, "CPU: --offload none"),
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
