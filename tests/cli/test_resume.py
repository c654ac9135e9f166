"""Runs that go on where they stopped: the manifest, --resume, --skip-existing, and kills."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mos_cli.images.outputs import read_drawing
from mos_cli.utils.files import sha256_of

PROMPT = "a red apple"


def read(manifest: Path) -> list[dict]:
    return [json.loads(line) for line in manifest.read_text().splitlines()]


def test_the_manifest_says_what_became_of_every_job(mos, bundle, tmp_path) -> None:
    manifest = tmp_path / "run.jsonl"
    text = f"a dog\n{'apple ' * 40}\na {{cat\na cat\n"
    line = ["generate", "-", "-s", 1, "-o", f"{tmp_path}/out/", "--manifest", manifest]
    assert mos(*line, input=text).exit_code == 7
    head, *lines = read(manifest)
    assert head == {"schema": "mos-manifest/1", "seed": 1}
    assert [(one["index"], one["status"]) for one in lines] == [
        (1, "writing"),
        (1, "done"),
        (2, "failed"),
        (3, "failed"),
        (4, "writing"),
        (4, "done"),
    ]
    assert "shorten it" in lines[2]["error"]
    assert "not closed" in lines[3]["error"]
    for one in lines[1], lines[5]:
        assert one["seconds"] >= 0
        files = [tmp_path / name for name in one["files"]]
        assert [path.name[:4] for path in files] == [files[0].name[:4]] * 3
        assert [sha256_of(path) for path in files] == list(one["files"].values())


def test_a_run_goes_on_with_its_seeds_and_makes_what_is_missing(mos, bundle, tmp_path) -> None:
    manifest, out = tmp_path / "run.jsonl", tmp_path / "out"
    line = ["generate", PROMPT, "-n", 4, "-o", f"{out}/", "--manifest", manifest, "--trace", "off"]
    assert mos(*line).exit_code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    again = mos(*line, "--resume", "--sheet", tmp_path / "sheet.png")
    assert (again.exit_code, again.stdout) == (0, ""), "nothing is missing"
    assert "already there: 4 of 4 pictures" in again.stderr
    assert (tmp_path / "sheet.png").exists()
    lost = sorted(out.iterdir())[2]
    lost.unlink()
    dry = mos(*line, "--resume", "--dry-run")
    assert dry.stderr.splitlines()[-1] == "1 picture would be drawn, 3 are there"
    resumed = mos(*line, "--resume")
    assert resumed.exit_code == 0
    (made,) = map(Path, resumed.stdout.splitlines())
    assert made.read_bytes() == before[lost.name]
    assert mos(*line).exit_code == 3


def test_failed_jobs_are_tried_again(mos, bundle, tmp_path) -> None:
    manifest, prompts = tmp_path / "run.jsonl", tmp_path / "p.txt"
    line = ["generate", f"@{prompts}", "-o", f"{tmp_path}/out/", "--manifest", manifest, "--resume", "-s", 1]
    prompts.write_text(f"a dog\n{'apple ' * 40}\n")
    assert mos(*line).exit_code == 7
    prompts.write_text("a dog\na cat\na dog\n")
    result = mos(*line)
    assert result.exit_code == 0, result.stderr
    assert [read_drawing(Path(name))[1].recipe.prompt for name in result.stdout.splitlines()] == ["a cat", "a dog"]


def test_names_that_are_there_are_skipped(mos, bundle, tmp_path) -> None:
    line = ["generate", PROMPT, "-n", 3, "-s", 1, "-o", tmp_path / "{seed}.png", "--skip-existing"]
    assert mos("generate", PROMPT, "-s", 2, "-o", tmp_path / "2.png").exit_code == 0
    before = (tmp_path / "2.png").stat().st_mtime_ns
    result = mos(*line)
    assert result.exit_code == 0
    assert [Path(name).name for name in result.stdout.splitlines()] == ["1.png", "3.png"]
    assert (tmp_path / "2.png").stat().st_mtime_ns == before
    assert mos(*line).stdout == ""


def test_a_kill_between_the_files_of_a_picture_is_mended(mos, bundle, tmp_path) -> None:
    """The trace is there, the picture is not; or the picture is, and is not recorded; or a line was cut off."""
    manifest = tmp_path / "run.jsonl"
    line = ["generate", PROMPT, "-n", 2, "-s", 1, "-o", tmp_path / "{seed}.png", "--manifest", manifest]
    assert mos(*line).exit_code == 0
    pictures = {name: (tmp_path / name).read_bytes() for name in ("1.png", "2.png")}
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(lines[:2]) + lines[3] + lines[4][:50])
    (tmp_path / "2.png").unlink()
    result = mos(*line, "--resume")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / '2.png'}\n"), result.stderr
    assert {name: (tmp_path / name).read_bytes() for name in pictures} == pictures
    assert all(one["status"] == "done" for one in _last_valid(manifest).values())
    (tmp_path / "1.png").unlink()
    manifest.write_text("".join(lines[:2]))
    (tmp_path / "1.json").write_text("the user's")
    refused = mos(*line, "--resume")
    assert refused.exit_code == 3, "a file of the user's stays"
    assert (tmp_path / "1.json").read_text() == "the user's"


def _last_valid(manifest: Path) -> dict[str, dict]:
    found = {}
    for text in manifest.read_text().splitlines()[1:]:
        try:
            one = json.loads(text)
        except ValueError:
            continue
        found[one["job"]] = one
    return found


def test_only_one_run_writes_a_manifest(mos, bundle, tmp_path) -> None:
    fcntl = pytest.importorskip("fcntl")
    manifest = tmp_path / "run.jsonl"
    line = ["generate", PROMPT, "-s", 1, "-o", tmp_path / "a.png", "--manifest", manifest]
    with manifest.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        refused = mos(*line)
    assert (refused.exit_code, len(refused.stderr.splitlines())) == (3, 1)
    assert "another run" in refused.stderr
    assert mos(*line).exit_code == 0


def test_a_picture_that_changes_while_others_are_edited_is_refused(mos, editor, tmp_path, monkeypatch) -> None:
    from PIL import Image

    from mos_cli.inference.pipeline import MoSPipeline

    for name in ("a.png", "b.png"):
        Image.new("RGB", (32, 32), "red").save(tmp_path / name)
    draw = MoSPipeline.draw

    def change(*arguments, **options):
        Image.new("RGB", (32, 32), "blue").save(tmp_path / "b.png")
        return draw(*arguments, **options)

    monkeypatch.setattr(MoSPipeline, "draw", change)
    result = mos("edit", tmp_path / "a.png", tmp_path / "b.png", PROMPT, "--steps", 1, "-o", f"{tmp_path}/out/")
    assert result.exit_code == 7
    assert "b.png was changed" in result.stderr


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_loses_nothing(mos, bundle, tmp_path) -> None:
    manifest, out = tmp_path / "run.jsonl", tmp_path / "out"
    options = [PROMPT, "-n", "30", "-s", "1", "-o", str(out / "{seed}.png"), "--manifest", str(manifest), "--resume"]
    command = [sys.executable, "-c", "from mos_cli.__main__ import main; main()", "generate", *options]
    chance = random.Random(1)
    for kill in range(3):
        process = subprocess.Popen(command, env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        goal = 5 * kill + 1
        deadline = time.monotonic() + 60
        while len(list(out.glob("[0-9]*.png"))) < goal and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(chance.random() / 20)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    result = mos("generate", *options)
    assert result.exit_code == 0, result.stderr
    assert sorted(path.name for path in out.glob("[0-9]*.png")) == sorted(f"{seed}.png" for seed in range(1, 31))
    for path in out.glob("[0-9]*.png"):
        assert read_drawing(path)[1].recipe.seed == int(path.stem)
        assert path.with_suffix(".json").exists()
    assert [one["status"] for one in _last_valid(manifest).values()] == ["done"] * 30
