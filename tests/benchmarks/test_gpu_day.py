"""The script for a rented GPU: every command of it works here with small networks, and what it promises of limits."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_day
import pytest


def run(out: Path, *arguments: str) -> list[dict[str, Any]]:
    """What results.json says of the parts."""
    subprocess.run([sys.executable, gpu_day.__file__, str(out), "--tiny", *arguments], check=True)
    return json.loads((out / "results.json").read_text())


def test_a_part_is_ended_at_its_limit_and_keeps_what_it_printed(tmp_path: Path) -> None:
    command = [sys.executable, "-u", "-c", "import time; print('{\"a\": 1}'); time.sleep(60)"]
    slow, none = gpu_day.Part("slow", command, 3), gpu_day.Part("none", command, 60)
    slow.run(tmp_path, left=60)
    assert (slow.exit_code, slow.rows) == ("timeout", [{"a": 1}])
    none.run(tmp_path, left=0.1)
    assert none.exit_code == "timeout"


def test_a_training_gets_the_time_that_is_left(tmp_path: Path) -> None:
    training = gpu_day.Part("train", [sys.executable, "-c", "import sys; print(sys.argv[1:])"], 600, takes_time=True)
    training.run(tmp_path, left=400)
    assert (tmp_path / "train.txt").read_text() == "['--time', '310s']\n"


@pytest.mark.slow
def test_the_parts_work_here(tmp_path: Path, bundle) -> None:
    """But for the default recipe, which needs art, and parts of performance.py that a test of their own runs."""
    names = "draw-plain,verify-plain,edit,cap-8"
    parts = {part["name"]: part for part in run(tmp_path / "out", "--parts", names)}
    codes = {name: part["exit_code"] for name, part in parts.items()}
    # The bundle does not edit: a part that fails does not stop the others.
    assert codes.pop("edit") == 4
    assert set(codes.values()) == {0}, codes
    assert parts["cap-8"]["rows"][0]["cap_gib"] == 8
    assert (tmp_path / "out" / "plain.png").exists()
    assert "sampling" in (tmp_path / "out" / "draw-plain.txt").read_text()
