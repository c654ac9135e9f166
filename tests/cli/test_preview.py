"""`--preview`: pictures in terminals that can show them, and nowhere else."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.terminals import in_terminal

NOTE = "--preview shows nothing: "


@pytest.fixture
def drawn(mos, editor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A picture of 32 x 24 pixels in the current folder."""
    monkeypatch.chdir(tmp_path)
    assert mos("generate", "a dog", "-s", 1, "--steps", 1, "--size", "32x24", "-o", "dog.png").exit_code == 0
    return Path("dog.png")


@pytest.fixture
def library() -> None:
    """Skips what needs the extra, or a system without pseudo terminals."""
    pytest.importorskip("textual_image")
    pytest.importorskip("termios")


@pytest.mark.usefixtures("library")
class TestInTerminals:
    def test_kitty_gets_the_picture(self, drawn: Path) -> None:
        done = in_terminal(["show", drawn, "--preview"], "kitty")
        (picture,) = done.kitty
        # Half of the 40 rows of 20 pixels.
        assert (done.code, picture.size) == (0, (530, 400))
        assert "seed           1" in done.text

    def test_others_get_sixels(self, drawn: Path) -> None:
        done = in_terminal(["show", drawn, "--preview"], "sixel", size=(24, 20))
        # As wide as the terminal.
        assert (done.code, done.sixels) == (0, [(200, 160)])

    def test_the_colours_that_kitty_reads_are_not_changed(self, drawn: Path) -> None:
        plain = {"NO_COLOR": "1", "COLORTERM": "", "TERM": "xterm"}
        done = in_terminal(["show", drawn, "--preview"], "kitty", environment=plain)
        assert b"\x1b[38;2;" in done.output

    def test_a_terminal_without_them_says_so_in_one_line(self, drawn: Path) -> None:
        done = in_terminal(["show", drawn, "--preview"])
        assert done.code == 0
        assert done.text.splitlines()[-1].startswith("files")
        assert done.text.count(NOTE) == 1
        assert not done.kitty
        assert not done.sixels

    def test_a_terminal_that_says_no_size(self, drawn: Path) -> None:
        done = in_terminal(["show", drawn, "--preview"], "sixel", size=(0, 0))
        assert (done.code, f"{NOTE}the terminal has no size" in done.text) == (0, True)

    def test_a_picture_that_is_too_narrow(self, drawn: Path, mos) -> None:
        Image.new("RGB", (2000, 8), "teal").save("line.png")
        result = mos("edit", "line.png", "a dog", "-s", 1, "--steps", 1, "-o", "narrow.png")
        assert result.exit_code == 0, result.output
        done = in_terminal(["show", "narrow.png", "--preview"], "sixel")
        # textual-image draws it since 0.13.
        assert (done.code, len(done.sixels) + done.text.count("as narrow as this")) == (0, 1)

    def test_what_is_no_terminal_gets_nothing(self, drawn: Path) -> None:
        with Path("out.txt").open("wb") as file:
            done = in_terminal(["show", drawn, "--preview"], "sixel", stdout=file)
        assert b"\x1b" not in Path("out.txt").read_bytes() + done.output
        assert (done.code, done.text.count(NOTE)) == (0, 1)
        done = in_terminal(["show", drawn, "--preview"], "sixel", stdin=subprocess.DEVNULL)
        assert (done.code, done.text.count(NOTE), done.sixels) == (0, 1, [])

    def test_a_command_in_the_background_is_not_stopped(self, drawn: Path) -> None:
        shell = f"set -m; {sys.executable} -m mos_cli show {drawn} --preview & wait %1"
        done = in_terminal(shell, "sixel")
        assert (done.code, done.text.count(f"{NOTE}the command runs in the background")) == (0, 1)

    @pytest.mark.slow
    def test_pictures_of_a_run_with_bars(self, drawn: Path) -> None:
        line = ["generate", "a dog", "-n", 2, "-s", 1, "--steps", 2, "-o", "{seed}.png", "--trace", "off"]
        done = in_terminal([*line, "--sheet", "sheet.png"], "sixel", environment={"MOS_PREVIEW": "1"})
        assert (done.code, done.sixels) == (0, [(400, 400)] * 2), done.text
        # What stands before the names are bars that were erased.
        names = [line.rpartition("--:--")[2].strip() for line in done.text.splitlines() if ".png" in line]
        assert names == ["1.png  (seed 1)", "2.png  (seed 2)", "sheet.png"]


def test_every_command_that_draws_takes_it(drawn: Path, mos, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mos_cli.utils.extras.find_spec", lambda name: True)
    Path("jobs.jsonl").write_text('{"prompt": "a dog"}\n')
    options = ("--steps", 1, "-s", 1, "-o", "new/{seed}.png", "--overwrite", "--preview")
    for line in (
        ("generate", "a dog", *options),
        ("edit", drawn, "a cat", *options),
        ("run", "jobs.jsonl", *options),
        ("replay", drawn, "-o", "again.png", "--preview"),
        ("show", drawn, "--preview"),
    ):
        result = mos(*line)
        assert (result.exit_code, result.stderr.count(NOTE)) == (0, 1), result.output


def test_where_nothing_is_shown_nothing_is_said(drawn: Path, mos, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOS_PREVIEW", "1")
    monkeypatch.setitem(sys.modules, "textual_image", None)
    line = ("generate", "a dog", "--steps", 1, "-s", 1, "--overwrite", "-o", "a.png")
    for options in (("-q",), ("--json",), ("--no-preview",), ("-q", "--dry-run")):
        result = mos(*line, *options)
        assert (result.exit_code, result.stderr) == (0, ""), result.output
    assert mos("show", drawn, "--json").exit_code == 0
    assert mos("replay", drawn, "--verify").exit_code == 0


def test_without_the_extra_nothing_is_drawn(drawn: Path, mos, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "textual_image", None)
    (tmp_path / "config.toml").write_text("[generate]\npreview = true\n")
    for line in (("generate", "a dog", "-o", "a.png"), ("replay", drawn, "-o", "a.png"), ("show", drawn)):
        result = mos(*line)
        assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
        assert "pip install 'mos-cli[terminal]'" in result.stderr
    assert not Path("a.png").exists()
    result = mos("replay", drawn, "--verify", "--preview")
    assert (result.exit_code, "--verify" in result.stderr) == (2, True)
