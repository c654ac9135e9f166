"""Whatever is typed after `mos`, it works or ends in one line with an exit code of the list, and nothing is lost."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from mos_cli.cli.app import app
from tests.helpers.generated import many

EXIT_CODES = {0, 2, 3, 4, 5, 6, 7}
"""Those that the README lists, but for Ctrl-C and a closed output."""

LEFT_OUT = {"bench", "data build", "eval", "models pull", "serve", "train", "train-enlarger", "train-judge"}
"""Commands that start other processes, use the network, work for minutes or until they are stopped."""

BEGINNINGS = {
    "generate": ["a red dog", "--steps", "1"],
    "edit": ["a.png", "a red dog", "--steps", "1"],
    "show": ["a.png"],
    "replay": ["a.png"],
    "inspect-routing": ["a.png"],
    "routing diff": ["a.png", "b.jpg"],
    "routing ablate": ["a.png", "--word", "dog"],
    "models show": ["editor"],
    "models verify": ["editor"],
}
"""Arguments with which a command works, to which others are added."""

FILES = ["a.png", "a.json", "a.png.json", "b.jpg", "photo.png", "cut.png", "text.txt", "list.txt", "folder", "none.png"]
NEW = ["out/", "new.png", "new.jpg", "{seed}.webp", "{prompt}", "x.csv", "x.html", "-", "@list.txt", "@nowhere", "~"]
NUMBERS = ["", "0", "-1", "1", "2", "0.5", "nan", "1e400", "0.2,0.8", "24", "24x16"]
NAMES = ["cpu", "cuda", "auto", "off", "full", "fp32", "nf4", "euler", "fast", "editor", "tiny"]
TEXTS = ["red", "dog", "a red cat", "猫 é", "*=1", "red=0@0.5", "dog!=2 steps 0"]
FITTING = {
    "--attention": ["auto", "sdpa", "native", "xformers"],
    "--cfg": ["1", "2.5"],
    "--cfg-interval": ["0.2,0.8"],
    "--count": ["1", "2"],
    "--feature-cache": ["1", "2"],
    "--mask": ["photo.png", "-"],
    "--reference": ["photo.png", "a.png", "-"],
    "--metadata": ["full", "recipe", "none"],
    "--model": ["tiny", "editor"],
    "--output": ["new.png", "a.png", "out/", "-", "new.jpg"],
    "--precision": ["fp32", "bf16"],
    "--preset": ["fast", "quality"],
    "--preview-steps": ["1"],
    "--route": ["*=1", "dog!=2 steps 0", "red=0@0.5"],
    "--route-from": ["a.png", "a.json"],
    "--server": ["auto", "off"],
    "--solver": ["euler", "ab2"],
    "--seed": ["1", "7"],
    "--size": ["24", "24x16", "3:2"],
    "--steps": ["1", "2"],
    "--trace": ["off", "summary", "full"],
}
"""Values that such options take."""

VALUES = st.sampled_from(FILES + NEW + NUMBERS + NAMES + TEXTS) | st.text(
    # No digits: a large number of steps or of pictures is a valid wish. No slash: a path may lead anywhere.
    st.characters(exclude_categories=["Nd", "Cs"], exclude_characters="/\\"),
    max_size=6,
)


def commands(command: Any, *path: str) -> Iterator[tuple[str, Any]]:
    """All commands with their full names."""
    children = getattr(command, "commands", None)
    if children is None:
        yield " ".join(path), command
        return
    for name, child in children.items():
        yield from commands(child, *path, name)


COMMANDS = {name: command for name, command in commands(typer.main.get_command(app)) if name not in LEFT_OUT}


@st.composite
def typed(draw: st.DrawFn) -> list[str]:
    """A command with arguments and options, most of which exist."""
    name = draw(st.sampled_from(sorted(COMMANDS)) | st.sampled_from(sorted(BEGINNINGS)))
    options = [each for each in COMMANDS[name].params if each.param_type_name == "option" and each.name != "yes"]
    line = [*name.split(), *draw(st.just(BEGINNINGS.get(name, [])) | st.lists(VALUES, max_size=2))]
    for option in draw(st.lists(st.sampled_from(options), max_size=3)) if options else []:
        line.append(draw(st.sampled_from([*option.opts, *option.secondary_opts])))
        if not option.is_flag and not option.count:
            line.append(draw(st.sampled_from(FITTING.get(option.opts[0], NEW)) | VALUES))
    return line


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def own_files(editor, mos: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with files of the user's, among them two pictures of this tool's with their traces."""
    folder = tmp_path / "own"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("a.png", "b.jpg"):
        assert mos("generate", "a red dog", "--steps", 2, "--seed", 1, "--trace", "full", "-o", name).exit_code == 0
    Image.new("RGB", (24, 16), "teal").save("photo.png")
    Path("cut.png").write_bytes(Path("a.png").read_bytes()[:300])
    Path("a.png.json").write_text('{"mine": true}')
    Path("text.txt").write_text("no list\x00")
    Path("list.txt").write_text("a red dog\n# a remark\na cat\n")
    Path("folder").mkdir()
    return folder


@pytest.mark.parametrize("cases", [250, pytest.param(10_000, marks=pytest.mark.stress)])
def test_any_command(cases: int, own_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(own_files)
    place = tmp_path / "around" / "here"
    monkeypatch.setenv("HOME", str(place))

    @many(cases)
    @given(typed(), st.sampled_from([b"", b"a dog\n", before[Path("photo.png")]]))
    def run(line: list[str], standard_input: bytes) -> None:
        shutil.copytree(own_files, place)
        monkeypatch.chdir(place)
        try:
            result = CliRunner().invoke(app, line, input=standard_input)
            assert result.exception is None or isinstance(result.exception, SystemExit), (line, result.exception)
            assert result.exit_code in EXIT_CODES, (line, result.exit_code)
            said = [each for each in result.stderr.splitlines() if each.startswith("error")]
            # 3 is also the exit code of a comparison that fails; of many pictures each may have an error of its own.
            assert len(said) == 1 or result.exit_code in (0, 7) or (result.exit_code == 3 and not said), (line, said)
            after = contents(place)
            changed = {path for path, data in before.items() if after.get(path) != data}
            assert not changed or "--overwrite" in line, (line, changed)
            # With --overwrite only what was named, and what this tool made with it.
            assert changed <= {Path(path) for name in line for path in companions(name)}, (line, changed)
            assert not [path for path in after if path.name.startswith(".")], (line, sorted(after))
            assert [path.name for path in place.parent.iterdir()] == [place.name], line
        finally:
            monkeypatch.chdir(tmp_path)
            shutil.rmtree(place.parent)

    run()


def companions(name: str) -> list[str]:
    """A picture and the files of this tool's beside it."""
    stem = name.removesuffix(".png")
    return [name, f"{stem}.json", f"{stem}.routing.safetensors"]
