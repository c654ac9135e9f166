"""`mos loras`: what was trained or drawn with is listed; only what mos trained is removed."""

import json
from pathlib import Path

import pytest
import torch

from mos_cli.bundles.bundle import Bundle
from mos_cli.towers.lora import add_lora, save_lora
from mos_cli.towers.quantized import load_generation
from mos_cli.utils.files import sha256_of


def write(path: Path, bundle: Bundle, seed: int, **metadata: str) -> Path:
    """A random LoRA for a bundle."""
    tower = load_generation(bundle.folder / "generation", device=torch.device("cpu"), dtype=torch.float32)
    add_lora(tower, 2, 2.0)
    torch.manual_seed(seed)
    weights = {name: torch.randn(w.shape) for name, w in tower.named_parameters() if ".lora_" in name}
    save_lora(path, weights, 2, 2.0, **metadata)
    return path


@pytest.fixture
def loras(mos, bundle: Bundle, tmp_path: Path) -> dict[str, Path]:
    """A LoRA of our own and one of another program, both drawn with."""
    own = write(tmp_path / "own.safetensors", bundle, 1, model="tiny", bundle_hash=bundle.hash)
    other = write(tmp_path / "other.safetensors", bundle, 2)
    options = [option for path in (own, other) for option in ("--lora", path)]
    assert mos("generate", "a dog", "-o", tmp_path / "p.png", *options).exit_code == 0
    return {"own": own, "other": other}


def listed(mos) -> list[dict]:
    return [json.loads(line) for line in mos("loras", "ls", "--json").stdout.splitlines()]


def test_files_that_were_drawn_with_are_listed(mos, loras: dict[str, Path]) -> None:
    rows = listed(mos)
    assert [(row["name"], row["model"], row["there"]) for row in rows] == [
        ("other.safetensors", None, True),
        ("own.safetensors", "tiny", True),
    ]
    assert rows[1]["sha256"] == sha256_of(loras["own"])
    loras["other"].unlink()
    table = mos("loras", "ls").stdout
    assert "gone" in table
    assert str(loras["own"]) in table


def test_only_what_was_trained_here_is_removed(mos, loras: dict[str, Path], tmp_path: Path) -> None:
    assert mos("loras", "rm", "own.safetensors").exit_code == 2
    assert loras["own"].exists()
    result = mos("loras", "rm", "own.safetensors", "--yes")
    assert (result.exit_code, result.stdout) == (0, f"removed {loras['own']}\n")
    assert not loras["own"].exists()
    result = mos("loras", "rm", loras["other"])
    assert result.exit_code == 0
    assert "stays" in result.stdout
    assert loras["other"].exists()
    assert listed(mos) == []
    for name in ("own.safetensors", tmp_path / "p.png", "../p.png"):
        assert mos("loras", "rm", name, "--yes").exit_code == 3
    assert (tmp_path / "p.png").exists()


def test_of_several_files_of_one_name_none_is_removed(mos, bundle: Bundle, loras, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    second = write(tmp_path / "b" / "own.safetensors", bundle, 3, model="tiny")
    assert mos("generate", "a dog", "-o", tmp_path / "q.png", "--lora", second).exit_code == 0
    result = mos("loras", "rm", "own.safetensors", "--yes")
    assert (result.exit_code, "several" in result.stderr) == (2, True)
    assert mos("loras", "rm", second, "--yes").exit_code == 0
    assert loras["own"].exists()
    assert not second.exists()
