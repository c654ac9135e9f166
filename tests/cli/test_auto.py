"""What `auto` promises: it looks at the machine, takes what fits it, and says so in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from typer.testing import Result

from mos_cli.bundles.blueprints import find_network
from mos_cli.bundles.bundle import Bundle
from mos_cli.cli.loading import fit_to_memory
from mos_cli.cli.output import Report
from mos_cli.config.settings import RunSettings, make_settings, resolve
from mos_cli.errors import MemoryLimitError
from mos_cli.images.outputs import read_drawing
from mos_cli.planning.candidates import candidates, fastest, fastest_on_cpu
from mos_cli.planning.memory import GIB

Mos = Callable[..., Result]


def has(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    """Main memory with so many GiB free."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=gib * GIB))


def test_every_command_that_draws_takes_it_without_a_gpu(mos: Mos, editor: Bundle, tmp_path: Path) -> None:
    made, cpu = tmp_path / "a.png", ("--device", "cpu")
    commands = (
        ("generate", "a dog", "-p", "auto", "-o", made),
        ("edit", made, "a cat", "-p", "auto", "-o", tmp_path / "b.png"),
        ("replay", made, "--max-vram", "auto", "-o", tmp_path / "c.png"),
    )
    for command in commands:
        result = mos(*command, *cpu)
        assert result.exit_code == 0, result.output
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("auto:")]
        assert "no GPU" in line
        assert f"{torch.get_num_threads()} CPU thread" in line
        assert "--quant none" in line
    assert made.read_bytes() == (tmp_path / "c.png").read_bytes()


def test_the_event_says_the_same(mos: Mos, bundle: Bundle, tmp_path: Path) -> None:
    arguments = ("generate", "a dog", "--device", "cpu", "-o", tmp_path / "a.png", "--json")
    lines = mos(*arguments, "-p", "auto", "--precision", "fp32").stdout.splitlines()
    (event,) = [row for row in map(json.loads, lines) if row["event"] == "setting"]
    assert event["gib"] > 0
    facts = {name: event[name] for name in ("device", "precision", "quant", "offload", "tiled", "batched_guidance")}
    assert facts == {
        **{"device": "cpu", "precision": "fp32", "quant": "none"},
        **{"offload": "none", "tiled": False, "batched_guidance": True},
    }


def test_what_is_drawn_is_what_would_be_drawn_without_it(mos: Mos, bundle: Bundle, tmp_path: Path) -> None:
    for name, more in (("plain", ()), ("auto", ("-p", "auto"))):
        result = mos("generate", "a dog", "-s", 1, "--device", "cpu", "-o", tmp_path / f"{name}.png", *more)
        assert result.exit_code == 0, result.output
    first, second = (read_drawing(tmp_path / f"{name}.png")[1] for name in ("plain", "auto"))
    assert first == second


@pytest.mark.slow
def test_bench_takes_it(mos: Mos, bundle: Bundle) -> None:
    result = mos("bench", "-p", "auto", "--steps", 1, "--rounds", 1)
    assert result.exit_code == 0, result.output
    assert "pictures a minute" in result.stdout


def test_presets_list_it(mos: Mos, bundle: Bundle) -> None:
    assert "auto" in mos("presets", "ls").stdout
    (row,) = [
        row for row in map(json.loads, mos("presets", "ls", "--json").stdout.splitlines()) if row["name"] == "auto"
    ]
    assert row["max_vram"] == "auto"


def test_main_memory_decides_what_is_quantised() -> None:
    """Nothing where all fits; then the tower that reads, which is not felt; never what is slower and larger."""
    large = find_network("mos-l", references=1)
    found = candidates(large, large.canvas.native)
    chosen = [fastest_on_cpu(found, gib).setting for gib in (40, 23, 13)]
    assert [(s.understanding, s.generation) for s in chosen] == [("none", "none"), ("int8", "none"), ("nf4", "nf4")]
    assert {(s.offload, s.batched_guidance) for s in chosen} == {("none", True)}
    with pytest.raises(MemoryLimitError, match="nothing fits 6 GiB"):
        fastest_on_cpu(found, 6)


def on_cpu(bundle: Bundle, gib: float, monkeypatch: pytest.MonkeyPatch, **asked: Any) -> RunSettings:
    """What is drawn with on a CPU with so much free memory, where "tiny" is as large as MoS-L."""
    has(monkeypatch, gib)
    network = find_network("mos-l", references=1)
    monkeypatch.setattr("mos_cli.inference.requests.network_of", lambda bundle, **run: network)
    settings = RunSettings(model="tiny", device="cpu", max_vram="auto", **asked)
    return fit_to_memory(bundle, settings, (1024, 1024), Report(quiet=True), fetch=False)


def test_what_was_asked_for_is_kept(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_cpu(bundle, 40, monkeypatch).quant == "none"
    less = on_cpu(bundle, 23, monkeypatch)
    assert (less.quant, less.offload, less.max_vram) == ("int8,none", "none", None)
    assert on_cpu(bundle, 40, monkeypatch, quant="nf4").quant == "nf4"
    with pytest.raises(MemoryLimitError):
        on_cpu(bundle, 22, monkeypatch, quant="none")


def test_too_little_memory_is_one_line(
    mos: Mos, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    has(monkeypatch, 0.5)
    result = mos("generate", "a dog", "-p", "auto", "--device", "cpu", "-o", tmp_path / "a.png")
    assert result.exit_code == MemoryLimitError.exit_code
    assert "nothing fits 0.5 GiB" in result.stderr.splitlines()[-1]


def test_a_card_is_taken_as_it_is(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of the card, in place of a number; the rest is that of any --max-vram."""
    network = find_network("mos-l", references=1)
    monkeypatch.setattr("mos_cli.inference.requests.network_of", lambda bundle, **run: network)
    monkeypatch.setattr("mos_cli.inference.requests.choose_device", lambda asked: torch.device("cuda"))
    monkeypatch.setattr("mos_cli.utils.devices.device_name", lambda device: "A card")
    card = SimpleNamespace(total_memory=int(11.6 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    said: list[str] = []
    monkeypatch.setattr(Report, "note", lambda self, kind, line, **values: said.append(line))
    settings = resolve(make_settings(model="tiny", precision="bf16"), "auto")
    chosen = fit_to_memory(bundle, settings, (1024, 1024), Report(), fetch=False)
    best = fastest(candidates(network, (1024, 1024)), 11.6)
    assert chosen.max_vram == pytest.approx(11.6)
    assert (chosen.quant, chosen.offload) == (best.quant, best.setting.offload)
    assert said == [f"auto: A card, 11.6 GiB, bf16: {best.options}"]
