"""Faults in the middle of a run: a folder that goes away, a full disk, a clock that is set back. Nothing is lost."""

import datetime
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mos_cli.images.outputs import read_drawing
from mos_cli.inference.pipeline import MoSPipeline

PROMPT = "a red apple"


@pytest.fixture
def meanwhile(monkeypatch) -> Callable[..., None]:
    """Makes something happen while a picture is drawn, by its number."""
    draw, drawn = MoSPipeline.draw, []

    def happens(number: int, what: Callable[[], None]) -> None:
        def drawing(*arguments, **options):
            drawn.append(number)
            if len(drawn) == number:
                what()
            return draw(*arguments, **options)

        monkeypatch.setattr(MoSPipeline, "draw", drawing)

    return happens


def test_the_folder_of_the_pictures_is_removed(mos, bundle, tmp_path, meanwhile) -> None:
    out, manifest = tmp_path / "out", tmp_path / "run.jsonl"
    line = ["generate", PROMPT, "-n", 4, "-s", 1, "-o", out / "{seed}.png", "--manifest", manifest]
    meanwhile(3, lambda: shutil.rmtree(out))
    assert mos(*line).exit_code == 0
    assert sorted(path.name for path in out.glob("*.png")) == ["3.png", "4.png"], "it is made again"
    resumed = mos(*line, "--resume")
    assert (resumed.exit_code, len(resumed.stdout.splitlines())) == (0, 2), resumed.stderr
    assert sorted(path.name for path in out.glob("*.png")) == ["1.png", "2.png", "3.png", "4.png"]


def test_a_file_is_in_the_place_of_the_folder(mos, bundle, tmp_path, meanwhile) -> None:
    out, manifest = tmp_path / "out", tmp_path / "run.jsonl"
    line = ["generate", PROMPT, "-n", 4, "-s", 1, "-o", out / "{seed}.png", "--manifest", manifest]

    def replace() -> None:
        out.rename(tmp_path / "moved")
        out.write_text("the user's")

    meanwhile(3, replace)
    result = mos(*line)
    assert result.exit_code == 7
    assert "2 of 4 pictures failed" in result.stderr
    assert out.read_text() == "the user's"
    out.unlink()
    (tmp_path / "moved").rename(out)
    resumed = mos(*line, "--resume")
    assert [Path(name).name for name in resumed.stdout.splitlines()] == ["3.png", "4.png"]


def test_the_manifest_is_removed(mos, bundle, tmp_path, meanwhile) -> None:
    manifest = tmp_path / "runs" / "run.jsonl"
    manifest.parent.mkdir()
    line = ["generate", PROMPT, "-n", 4, "-s", 1, "-o", tmp_path / "{seed}.png", "--manifest", manifest]
    meanwhile(3, lambda: shutil.rmtree(manifest.parent))
    result = mos(*line)
    assert result.exit_code == 3, "a record that nobody can read is none"
    assert [line for line in result.stderr.splitlines() if "was removed" in line] == [result.stderr.splitlines()[-1]]
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["1.png", "2.png"]
    manifest.parent.mkdir()
    resumed = mos(*line, "--resume", "--skip-existing")
    assert [Path(name).name for name in resumed.stdout.splitlines()] == ["3.png", "4.png"], resumed.stderr


def test_the_disk_is_full(mos, bundle, tmp_path, meanwhile, monkeypatch) -> None:
    line = ["generate", PROMPT, "-n", 4, "-s", 1, "-o", tmp_path / "{seed}.png", "--manifest", tmp_path / "run.jsonl"]

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as filled:
        meanwhile(3, lambda: filled.setattr(os, "fsync", full))
        result = mos(*line)
    assert (result.exit_code, result.stderr.splitlines()[-1].count("No space left on device")) == (3, 1)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["1.png", "2.png"]
    resumed = mos(*line, "--resume")
    assert [Path(name).name for name in resumed.stdout.splitlines()] == ["3.png", "4.png"], resumed.stderr


def test_the_clock_is_set_back(mos, bundle, tmp_path, monkeypatch) -> None:
    class Yesterday(datetime.date):
        @classmethod
        def today(cls) -> datetime.date:
            return datetime.date(2020, 1, 1)

    manifest, template = tmp_path / "run.jsonl", f"{tmp_path}/{{date}}/{{number}}.png"
    line = ["generate", PROMPT, "-n", 3, "-o", template, "--manifest", manifest]
    assert mos(*line).exit_code == 0
    (first, *_) = sorted(tmp_path.glob("*/*.png"))
    seed = read_drawing(first)[1].recipe.seed
    first.unlink()
    first.with_suffix(".json").unlink()
    first.with_suffix(".routing.safetensors").unlink()
    monkeypatch.setattr("mos_cli.images.naming.date", Yesterday)
    resumed = mos(*line, "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    (made,) = map(Path, resumed.stdout.splitlines())
    assert made.parent.name == "2020-01-01"
    assert read_drawing(made)[1].recipe.seed == seed
    assert len(list(tmp_path.glob("*/*.png"))) == 3
    listed = [json.loads(text)["path"] for text in mos("logs", "--json").stdout.splitlines()]
    assert listed[-1] == str(made), "the log is in the order of drawing, whatever the clock says"
