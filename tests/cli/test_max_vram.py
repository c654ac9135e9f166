"""`--max-vram` and `--offload`: what is refused, and what is told where memory runs out."""

from pathlib import Path

import pytest

from mos_cli.bundles.blueprints import find_network
from mos_cli.bundles.bundle import Bundle, write_index
from mos_cli.bundles.sources import fetch_tower
from mos_cli.config.settings import RunSettings, fitted
from mos_cli.errors import UsageError
from mos_cli.planning.candidates import candidates
from mos_cli.towers.generation import GenerationTower
from tests.helpers.memory import no_memory
from tests.helpers.tiny_bundle import randomised


def test_what_a_model_is_already_is_not_asked_for(bundle: Bundle, mos, tmp_path: Path) -> None:
    fetch_tower(bundle.index.understanding)
    sizes = {"width": 64, "depth": 2, "heads": 2, "hidden": 64, "router_width": 32, "router_heads": 2}
    tower = randomised(GenerationTower(**sizes, states_layers=4, states_width=32))  # type: ignore[arg-type]
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


def test_out_of_memory_names_the_setting_that_should_fit(
    mos, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mos_cli.inference.latents.sample_batch", no_memory)
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


def test_to_offload_nothing_is_what_a_cpu_does(mos, bundle: Bundle, tmp_path: Path) -> None:
    fetch_tower(bundle.index.understanding)
    for name, options in (("a", ()), ("b", ("--offload", "none"))):
        drawn = mos("generate", "a dog", "-s", 1, "-o", tmp_path / f"{name}.png", "-q", "--device", "cpu", *options)
        assert (drawn.exit_code, drawn.stderr) == (0, ""), drawn.output
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
