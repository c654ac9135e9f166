"""What `mos plan` promises: what it chooses fits, it says so at a glance, and it is quick."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from mos_cli.cli.app import MosGroup
from mos_cli.cli.init import init
from mos_cli.cli.plan import plan
from mos_cli.errors import MemoryLimitError, ModelError, UsageError
from mos_cli.runtime import memory
from mos_cli.runtime.blueprints import find_network
from mos_cli.runtime.bundles import Bundle
from mos_cli.runtime.fitting import CARDS, candidates, fastest, parse_quant
from mos_cli.runtime.memory import GIB, Setting, stages, weights
from mos_cli.runtime.sources import fetch_tower
from mos_cli.towers.generation import GenerationTower


def command(*arguments: object) -> Result:
    app = typer.Typer(cls=MosGroup)
    app.command()(plan)
    app.command()(init)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("name", ["mos-s", "mos-l"])
def test_what_is_chosen_fits_and_a_larger_card_is_no_slower(name: str) -> None:
    numbers = find_network(name)
    found = candidates(numbers, numbers.canvas.native)
    best = [fastest(found, card) for card in CARDS]
    assert all(c.needs <= card * GIB for c, card in zip(best, CARDS, strict=True))
    seconds = [c.total_seconds for c in best]
    assert all(later <= 1.08 * earlier for earlier, later in pairwise(seconds))
    assert [c.total_seconds for c in found] == sorted(c.total_seconds for c in found)


def test_what_is_spared_is_spared() -> None:
    """Quantising, offloading and tiles need less where they act, at the price that is named."""
    numbers = find_network("mos-l")

    def peaks(setting: Setting) -> dict[str, int]:
        return {stage.name: stage.peak for stage in stages(numbers, setting, (1024, 1024))}

    plain = peaks(Setting("none", "none", "none", False))
    evicted = peaks(Setting("none", "none", "understanding", False))
    blocks = peaks(Setting("none", "none", "blocks", False))
    tiled = peaks(Setting("none", "none", "none", True))
    tower = weights(numbers, Setting("none", "none", "none", False)).understanding
    assert plain["draw"] - evicted["draw"] == tower
    assert blocks["draw"] < evicted["draw"] / 4
    assert tiled["decode"] < plain["decode"]
    assert tiled["draw"] == plain["draw"]
    for quant in ("int8", "nf4"):
        assert peaks(Setting(quant, quant, "none", False))["read"] < plain["read"]  # type: ignore[arg-type]
    assert memory.host_bytes(numbers, Setting("none", "none", "none", False)) == 0
    assert memory.host_bytes(numbers, Setting("none", "none", "understanding", False)) > tower


def test_the_table_names_the_command_for_every_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = command("plan", "mos-l")
    assert result.exit_code == 0, result.output
    for card in CARDS:
        assert f"mos generate PROMPT -m DIR --max-vram {card} --quant " in result.output
    for stage in ("read", "bank", "draw", "decode"):
        assert stage in result.output
    assert "estimate" in result.output
    tables = [line for line in result.output.splitlines() if not line.strip().startswith(("mos ", "No weights"))]
    assert max(len(line) for line in tables) <= 80


def test_json_holds_every_part() -> None:
    result = command("plan", "mos-l", "--json")
    rows = [json.loads(line) for line in result.output.splitlines()]
    assert [row["card"] for row in rows] == list(CARDS)
    for row in rows:
        assert row["peak"] == max(stage["peak"] for stage in row["stages"].values())
        assert all(sum(stage["parts"].values()) == stage["peak"] for stage in row["stages"].values())


def test_where_nothing_fits_one_line_says_what_is_missing() -> None:
    result = command("plan", "mos-l", "--max-vram", "8", "--understanding", "internvl3-14b")
    assert result.exit_code == MemoryLimitError.exit_code
    (line,) = [line for line in result.output.splitlines() if "nothing fits" in line]
    assert "--quant nf4 --offload" in line
    assert "more" in line
    everywhere = command("plan", "mos-l", "--understanding", "internvl3-14b")
    assert everywhere.exit_code == 0
    assert "nothing fits 8 GiB" in everywhere.output
    assert "--max-vram 24" in everywhere.output
    as_json = command("plan", "mos-l", "--understanding", "internvl3-14b", "--max-vram", "8", "--json")
    assert as_json.exit_code == MemoryLimitError.exit_code
    assert json.loads(as_json.output)["setting"] is None


def test_real_bundles_are_planned_too(editor: Bundle) -> None:
    with pytest.raises(ModelError, match="mos models pull"):
        find_network("editor")
    fetch_tower(editor.index.understanding)
    numbers = find_network("editor")
    tower = GenerationTower.from_pretrained(editor.folder / "generation")
    assert numbers.generation.parameters == tower.num_parameters()
    assert numbers.understanding.states == tower.states_shape
    assert numbers.references == 1
    assert numbers.eyes > 0
    assert command("plan", "editor", "--max-vram", 8).exit_code == 0


def test_mistakes_are_one_line(bundle: Bundle) -> None:
    for arguments, exit_code, words in (
        (("no-such",), 4, "mos-l"),
        (("mos-l", "--quant", "nf5"), 2, "nf4,none"),
        (("mos-l", "--quant", "nf4,nf4,nf4"), 2, "--quant"),
        (("mos-l", "--understanding", "gpt"), 2, "qwen3-vl-8b"),
        (("mos-l", "--size", "100"), 2, "multiples of 32"),
        (("tiny", "--understanding", "qwen3-vl-8b"), 2, "blueprint"),
    ):
        result = command("plan", *arguments)
        assert result.exit_code == exit_code, result.output
        assert words in result.output


def test_quant_is_for_both_or_for_each() -> None:
    assert parse_quant("nf4") == ("nf4", "nf4")
    assert parse_quant("int8,none") == ("int8", "none")
    with pytest.raises(UsageError):
        parse_quant("")
    numbers = find_network("mos-l")
    only = candidates(numbers, (1024, 1024), quant=("nf4", "none"))
    assert {(c.setting.understanding, c.setting.generation) for c in only} == {("nf4", "none")}


def test_planning_imports_nothing_heavy() -> None:
    code = (
        "import sys; from mos_cli.cli.plan import plan; "
        "plan('mos-l', None, None, None, None, False); "
        "heavy = {'torch', 'transformers', 'diffusers', 'numpy', 'safetensors'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr


def hardware_rows(name: str) -> list[str]:
    """The rows of docs/hardware.md about a blueprint."""
    numbers = find_network(name)
    found = candidates(numbers, numbers.canvas.native)
    rows = []
    for card in CARDS:
        best = fastest(found, card)
        options = f"--max-vram {card} {best.options}"
        tiles = "yes" if best.setting.tiled else "no"
        sizes = f"{best.needs / GIB:.1f} | {best.host / GIB:.1f}" if best.host else f"{best.needs / GIB:.1f} | -"
        rows.append(f"| {name} | {card} GB | `{options}` | {sizes} | {tiles} | {best.total_seconds:.0f} |")
    return rows


def test_the_document_says_what_the_command_says() -> None:
    page = (Path(__file__).parents[1] / "docs" / "hardware.md").read_text(encoding="utf-8")
    for name in ("mos-s", "mos-l"):
        for row in hardware_rows(name):
            assert row in page
