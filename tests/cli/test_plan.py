"""What `mos plan` promises: what it chooses fits, it says so at a glance, and it is quick."""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from mos_cli.bundles import blueprints
from mos_cli.bundles.blueprints import find_network
from mos_cli.bundles.bundle import Bundle
from mos_cli.bundles.shapes import UnderstandingShape, read_config
from mos_cli.bundles.sources import fetch_tower
from mos_cli.cli.loading import fit_to_memory
from mos_cli.cli.output import Report
from mos_cli.config.settings import RunSettings
from mos_cli.errors import MemoryLimitError, ModelError, UsageError
from mos_cli.planning import memory
from mos_cli.planning.candidates import GPU_SIZES, candidates, fastest
from mos_cli.planning.memory import GIB, Setting, stages, weights
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.vision_language import load_understanding
from tests.helpers import vlm_towers


def test_the_table_names_the_command_for_every_card(mos, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = mos("plan", "mos-l")
    assert result.exit_code == 0, result.output
    for card in GPU_SIZES:
        assert f"mos generate PROMPT -m DIR --max-vram {card} --quant " in result.output
    for stage in ("encode", "bank", "sample", "decode"):
        assert stage in result.output
    assert "estimate" in result.output
    others = ("mos ", "No weights", "Time is", "about ")
    tables = [line for line in result.output.splitlines() if not line.strip().startswith(others)]
    assert max(len(line) for line in tables) <= 80


def test_json_holds_every_part(mos) -> None:
    result = mos("plan", "mos-l", "--json")
    rows = [json.loads(line) for line in result.output.splitlines()]
    assert [row["card"] for row in rows] == list(GPU_SIZES)
    for row in rows:
        assert row["setting"]["batched_guidance"]
        assert row["peak"] == max(stage["peak"] for stage in row["stages"].values())
        assert all(sum(stage["parts"].values()) == stage["peak"] for stage in row["stages"].values())


def test_where_nothing_fits_one_line_says_what_is_missing(mos) -> None:
    result = mos("plan", "mos-l", "--max-vram", "8", "--understanding", "internvl3-14b")
    assert result.exit_code == MemoryLimitError.exit_code
    (line,) = [line for line in result.output.splitlines() if "nothing fits" in line]
    assert "--quant nf4 --offload" in line
    assert "more" in line
    everywhere = mos("plan", "mos-l", "--understanding", "internvl3-14b")
    assert everywhere.exit_code == 0
    assert "nothing fits 8 GiB" in everywhere.output
    assert "--max-vram 24" in everywhere.output
    as_json = mos("plan", "mos-l", "--understanding", "internvl3-14b", "--max-vram", "8", "--json")
    assert as_json.exit_code == MemoryLimitError.exit_code
    assert json.loads(as_json.output)["setting"] is None


def test_real_bundles_are_planned_too(mos, editor: Bundle) -> None:
    with pytest.raises(ModelError, match="mos models pull"):
        find_network("editor")
    fetch_tower(editor.index.understanding)
    numbers = find_network("editor", references=1)
    tower = GenerationTower.from_pretrained(editor.folder / "generation")
    assert numbers.generation.parameters == tower.num_parameters()
    assert numbers.understanding.states == tower.states_shape
    assert numbers.references == 1
    assert numbers.image_encoder_parameters > 0
    assert mos("plan", "editor", "--max-vram", 8).exit_code == 0


def test_pictures_that_are_shown_are_counted(mos, bundle: Bundle) -> None:
    """The tokens that are made of them, what sees them, and what the blocks remember."""
    size = (1024, 512)
    words, one, two = (find_network("mos-l", references=count) for count in (0, 1, 2))
    assert find_network("mos-l") == words
    tokens = [memory.context_tokens(network, size) for network in (words, one, two)]
    assert [count - memory.TOKENS for count in tokens] == [0, 32 * 16, 2 * 32 * 16]
    for tower in ("internvl3-14b", "perception-lm-8b"):
        # They scale every picture to the same square.
        assert memory.context_tokens(find_network("mos-l", tower, references=1), size) == memory.TOKENS + 256
    seen = weights(one, Setting()).understanding - weights(words, Setting()).understanding
    assert seen == 2 * one.understanding.vision
    reads, _, draws, _ = zip(*(stages(network, Setting(), size) for network in (words, one, two)), strict=True)
    for stage in (reads, draws):
        assert stage[0].peak < stage[1].peak < stage[2].peak
    result = mos("plan", "mos-l", "--max-vram", 8, "--understanding", "perception-lm-8b", "--references", 0)
    assert result.exit_code == 0, result.output
    fetch_tower(bundle.index.understanding)
    refused = mos("plan", "tiny", "--references", 1)
    assert (refused.exit_code, "does not edit" in refused.output) == (UsageError.exit_code, True)


@pytest.mark.parametrize("kind", ["qwen3_vl", "internvl", "perception_lm"])
def test_image_tokens_are_those_that_the_tower_makes(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = getattr(vlm_towers, kind)(tmp_path)
    # The stand-in of the tests has patches of its own.
    monkeypatch.setattr(blueprints, "_PERCEPTION_PATCH", 7)
    cell, seen = blueprints._image_token_size(folder, read_config(folder))
    shape = UnderstandingShape(
        layers=1, width=1, hidden=1, linear=1, other=1, vision=1, image_token_size=cell, image_size=seen
    )
    size = (96, 128)
    tower = load_understanding(folder)
    (span,) = tower.encode(["paint it"], [[torch.zeros(3, size[1], size[0])]]).image_spans[0]
    assert shape.image_tokens(size) == span.rows * span.columns


def test_what_fits_every_card_is_shown_once(mos, bundle: Bundle) -> None:
    fetch_tower(bundle.index.understanding)
    result = mos("plan", "tiny")
    assert result.output.count("understanding tower") == 1
    assert "fits all of them" in result.output
    assert "less than 0.1 s a picture" in result.output
    # No limit is asked for: the command is right on a CPU, too.
    assert "mos generate PROMPT -m tiny\n" in result.output
    assert "--max-vram" not in result.output
    assert "--max-vram 8 " in mos("plan", "tiny", "--max-vram", 8).output


@pytest.mark.parametrize(("gib", "quant"), [(20, "int8,none"), (40, "none")])
def test_auto_plans_what_generate_takes_here(
    mos, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, gib: int, quant: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=gib * GIB))
    result = mos("plan", "mos-l", "--max-vram", "auto", "--precision", "bf16")
    assert f"{gib} GiB free" in result.output
    assert f"mos generate PROMPT -m DIR --max-vram auto --quant {quant}\n" in result.output
    # What is known of time is that of a card.
    assert "s a picture" not in result.output
    large = find_network("mos-l")
    monkeypatch.setattr("mos_cli.inference.requests.network_of", lambda bundle, **run: large)
    settings = RunSettings(model="tiny", device="cpu", max_vram="auto", precision="bf16")
    assert fit_to_memory(bundle, settings, (1024, 1024), Report(quiet=True), fetch=False).quant == quant


def test_the_environment_limits_the_plan_too(mos, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOS_MAX_VRAM", "12")
    assert [json.loads(line)["card"] for line in mos("plan", "mos-l", "--json").output.splitlines()] == [12]


def test_a_blueprint_says_how_it_gets_weights_that_can_be_drawn_with(mos) -> None:
    result = mos("plan", "mos-l", "--understanding", "internvl3-14b", "--max-vram", 24)
    assert "mos models init mos-l --out DIR --understanding internvl3-14b --tower FOLDER\n" in result.output
    assert "Untrained, it draws grey" in result.output


def test_mistakes_are_one_line(mos, bundle: Bundle) -> None:
    for arguments, exit_code, words in (
        (("no-such",), 4, "mos-l"),
        (("mos-l", "--quant", "nf5"), 2, "nf4,none"),
        (("mos-l", "--quant", "nf4,nf4,nf4"), 2, "--quant"),
        (("mos-l", "--understanding", "gpt"), 2, "qwen3-vl-8b"),
        (("mos-l", "--max-vram", "0"), 2, "--max-vram: write GiB as a number above 0"),
        (("mos-l", "--size", "100"), 2, "multiples of 32"),
        (("tiny", "--understanding", "qwen3-vl-8b"), 2, "blueprint"),
    ):
        result = mos("plan", *arguments)
        assert result.exit_code == exit_code, result.output
        assert words in result.output


def test_planning_imports_nothing_heavy() -> None:
    code = (
        "import sys; from mos_cli.cli.plan import plan; "
        "plan('mos-l', None, None, None, 'fp32', 1, None, False); "
        "heavy = {'torch', 'transformers', 'diffusers', 'numpy', 'safetensors'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr


def hardware_rows(name: str, references: int) -> list[str]:
    """The rows of docs/hardware.md about a blueprint."""
    numbers = find_network(name, references=references)
    found = candidates(numbers, numbers.canvas.native)
    rows = []
    for card in GPU_SIZES:
        best = fastest(found, card)
        options = f"--max-vram {card} {best.options}"
        tiles = "yes" if best.setting.tiled else "no"
        sizes = f"{best.needs / GIB:.1f} | {best.host / GIB:.1f}" if best.host else f"{best.needs / GIB:.1f} | -"
        task = "edit" if references else "generate"
        rows.append(f"| {name} {task} | {card} GB | `{options}` | {sizes} | {tiles} | {best.total_seconds:.0f} |")
    return rows


def test_the_document_says_what_the_command_says() -> None:
    page = (Path(__file__).parents[2] / "docs" / "hardware.md").read_text(encoding="utf-8")
    for name, references in product(("mos-s", "mos-l"), (0, 1)):
        for row in hardware_rows(name, references):
            assert row in page
