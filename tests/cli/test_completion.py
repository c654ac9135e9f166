"""What a shell completes, as it asks for it."""

import json
import os
import subprocess
import sys

import pytest

ASK = """
import sys
from mos_cli.__main__ import main
try:
    main()
finally:
    assert not {"torch", "transformers", "diffusers", "numpy"} & sys.modules.keys()
"""


def completed(typed: str, shell: str, folder) -> str:
    words = {"bash": {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split(" ")) - 1)}}
    environment = words.get(shell, {"_TYPER_COMPLETE_ARGS": typed, "_TYPER_COMPLETE_FISH_ACTION": "get-args"})
    environment = os.environ | environment | {"_MOS_COMPLETE": f"complete_{shell}"}
    command = [sys.executable, "-c", ASK]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.stderr == ""
    return done.stdout


def test_names_of_models_presets_recipes_and_traces(bundle, tmp_path) -> None:
    (tmp_path / "pic.jpg").write_text("")
    (tmp_path / "mine.toml").write_text("")
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "run.json").write_text(json.dumps({"schema": "mos-trace/1"}))
    for typed, names in {
        "mos generate x -m t": ["tiny"],
        "mos generate x -p fa": ["faithful", "fast"],
        "mos generate x -p mi": ["mine.toml"],
        "mos generate x --route-from r": ["run.json"],
        "mos inspect-routing run": ["run.json"],
        "mos train train-s": ["train-smoke"],
        "mos plan mos": ["mos-l", "mos-s"],
        "mos generate x --metadata ": ["full", "none", "recipe"],
        "mos generate x --trace t": ["topk"],
        "mos show p": ["pic.jpg"],
    }.items():
        said = completed(typed, "bash", tmp_path)
        assert [name for name in names if name not in said] == [], (typed, said)
        assert "other" not in said
    assert "fast" not in completed("mos train ", "bash", tmp_path)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_answered_too(bundle, tmp_path, shell: str) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"schema": "mos-trace/1"}))
    (tmp_path / "other.json").write_text("{}")
    assert "tiny" in completed("mos generate x -m t", shell, tmp_path)
    said = completed("mos inspect-routing run", shell, tmp_path)
    assert "run.json" in said
    assert "other" not in said
