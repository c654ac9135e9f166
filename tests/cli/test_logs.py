"""The log of drawn pictures: what is listed, searched and left out, and that it never stops a drawing."""

import json
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from mos_cli.images.log import log_file
from mos_cli.images.outputs import read_drawing

PROMPT = "a red apple"


def listed(mos, *words: object) -> list[dict]:
    result = mos("logs", *words, "--json")
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def draw(mos, *more: object, prompt: str = PROMPT) -> None:
    result = mos("generate", prompt, "-s", 1, "--steps", 1, *more)
    assert result.exit_code == 0, result.stderr


def test_pictures_are_listed_and_searched(mos, bundle, tmp_path) -> None:
    assert mos("logs").stderr.strip() == "the log has no pictures yet"
    draw(mos, "-n", 2, "-o", tmp_path / "{seed}.png")
    draw(mos, "-o", tmp_path / "dog.png", "--negative", "a CÂT", prompt="a (dog:1.5) {a|a}")
    assert mos("replay", tmp_path / "1.png", "-o", tmp_path / "again.png").exit_code == 0
    found = listed(mos)
    assert [Path(one["path"]).name for one in found] == ["1.png", "2.png", "dog.png", "again.png"]
    assert found[2]["prompt"] == "a (dog:1.5) a"
    recipe = read_drawing(tmp_path / "dog.png")[1].recipe
    assert found[2]["recipe"] == json.loads(recipe.model_dump_json(exclude_none=True))
    assert [one["seed"] for one in listed(mos, "RED", "apple", "-n", 2)] == [2, 1], "the last two, the last one last"
    assert len(listed(mos, "dog.png")) == len(listed(mos, "cât")) == 1
    assert listed(mos, "%") == listed(mos, "red", "dog") == []
    assert mos("logs", "nothing").stderr.strip() == "no such picture in the log"
    shown = mos("logs", "dog").stdout
    assert "a (dog:1.5) a" in shown
    assert str(tmp_path / "dog.png") in shown
    assert mos("logs", "dog", "-q").stdout == f"{tmp_path / 'dog.png'}\n"
    assert mos("logs", "-q", "--json").exit_code == 2


def test_pictures_that_are_gone_or_replaced_are_shown_so(mos, bundle, tmp_path) -> None:
    draw(mos, "-o", tmp_path / "a.png")
    draw(mos, "-o", tmp_path / "b.png")
    draw(mos, "-o", tmp_path / "b.png", "--overwrite", prompt="a dog")
    (tmp_path / "a.png").unlink()
    assert [one["state"] for one in listed(mos)] == ["gone", "replaced", "there"]
    assert "a.png  (gone)" in mos("logs").stdout
    assert mos("logs", "-q").stdout == f"{tmp_path / 'b.png'}\n"


def test_what_is_not_to_be_known_is_not_listed(mos, bundle, tmp_path, monkeypatch) -> None:
    draw(mos, "-o", tmp_path / "a.png", "--metadata", "none", "--trace", "off")
    draw(mos, "-o", tmp_path / "b.png", "--no-log")
    (tmp_path / "config.toml").write_text("[generate]\nlog = false\n")
    draw(mos, "-o", tmp_path / "c.png")
    assert mos("replay", tmp_path / "c.png", "-o", tmp_path / "d.png").exit_code == 0
    (tmp_path / "config.toml").write_text("[generate]\n")
    monkeypatch.setenv("MOS_LOG", "0")
    draw(mos, "-o", tmp_path / "e.png")
    monkeypatch.delenv("MOS_LOG")
    assert not log_file().exists()
    draw(mos, "-o", tmp_path / "f.png")
    assert [Path(one["path"]).name for one in listed(mos)] == ["f.png"]
    if os.name == "posix":
        assert stat.S_IMODE(log_file().stat().st_mode) == 0o600, "prompts are the user's alone"


def damage(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"no database, and more than a hundred bytes of it" * 10)


def a_folder(file: Path) -> None:
    file.mkdir(parents=True)


def no_folder(file: Path) -> None:
    file.parent.write_text("a file in the way of the data folder")


def newer(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(file)) as log:
        log.execute("PRAGMA user_version = 7")


@pytest.mark.parametrize("fault", [damage, a_folder, no_folder, newer])
def test_a_log_that_cannot_be_used_stops_nothing(mos, bundle, tmp_path, fault) -> None:
    fault(log_file())
    result = mos("generate", PROMPT, "-n", 3, "-s", 1, "--steps", 1, "-o", tmp_path / "{seed}.png")
    assert result.exit_code == 0
    warnings = [line for line in result.stderr.splitlines() if "log" in line]
    assert len(warnings) == 1
    assert "--no-log" in warnings[0]
    assert len(result.stdout.splitlines()) == 3
    if fault is not no_folder and fault is not a_folder:
        refused = mos("logs")
        assert (refused.exit_code, len(refused.stderr.splitlines())) == (3, 1), refused.stderr
    shutil.rmtree(log_file().parent, ignore_errors=True)


def test_a_log_that_another_process_holds_stops_nothing(mos, bundle, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("mos_cli.images.log.PATIENCE", 0.05)
    draw(mos, "-o", tmp_path / "a.png")
    with closing(sqlite3.connect(log_file(), isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        result = mos("generate", PROMPT, "-n", 2, "-s", 1, "--steps", 1, "-o", f"{tmp_path}/out/")
        assert result.exit_code == 0
        assert len([line for line in result.stderr.splitlines() if "locked" in line]) == 1
        refused = mos("logs")
        assert (refused.exit_code, len(refused.stderr.splitlines())) == (3, 1)
    assert len(listed(mos)) == 1


@pytest.mark.slow
def test_several_processes_write_one_log(mos, bundle, tmp_path) -> None:
    script = (
        "import sys; from pathlib import Path; from mos_cli.config.recipe import make_recipe\n"
        "from mos_cli.images.log import log_picture\n"
        "sizes = dict(width=8, height=8, steps=1, cfg=1, cfg_interval='0,1', precision='fp32')\n"
        "for seed in range(40): log_picture(Path(f'{sys.argv[1]}-{seed}.png'), "
        "make_recipe(prompt='p', model='m', seed=seed, **sizes))"
    )
    running = [subprocess.Popen([sys.executable, "-c", script, name], cwd=tmp_path) for name in "abc"]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert len(listed(mos, "-n", 1000)) == 120
