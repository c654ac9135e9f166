"""Every command, where no extra is installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "helpers" / "every_command.py"
EXTRAS = ("inflect", "matplotlib", "resvg_py", "tensorboard", "gguf", "pyarrow", "xformers", "uvicorn", "textual_image")
HIDE = f"import runpy, sys; sys.modules.update(dict.fromkeys({EXTRAS}))"
RUN = f"{HIDE}; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"


@pytest.mark.slow
def test_every_command_works_without_extras_or_names_the_extra() -> None:
    """With the shipped model; CI runs the script itself in an environment that has the wheel alone."""
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.parametrize(
    "line",
    [
        "train train-smoke --run {x}",
        "train train-smoke --run runs/a --export {x}",
        "train-judge -o {x}",
        "train-enlarger -o {x}",
        "eval -o {x}",
    ],
)
def test_where_the_result_of_long_work_goes_is_checked_first(mos, tmp_path: Path, line: str, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    result = mos(*(part.format(x="file/below") for part in line.split()))
    assert result.exit_code == 3
    assert len(result.stderr.splitlines()) == 1
    assert "file is not a folder" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"file", "config.toml"}


def test_art_is_not_fetched_before_its_place_is_checked(mos, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = mos("data", "build", "-o", tmp_path / "file" / "art", "--set", "noto")
    assert (result.exit_code, "file is not a folder" in result.stderr) == (3, True)
