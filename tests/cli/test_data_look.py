"""`mos data look`: a sheet of what a network would see of a folder."""

from pathlib import Path

import pytest
from PIL import Image

from mos_cli.datasets.captioned import Captioned
from mos_cli.images.sheets import CELL, GAP
from mos_cli.training import pictures
from mos_cli.training.recipe import load_recipe
from tests.helpers import tiny_training as tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six discs, and a wide picture."""
    tiny.write_discs(tmp_path / "discs")
    Image.new("RGB", (90, 30), "red").save(tmp_path / "discs" / "wide.png")
    (tmp_path / "discs" / "wide.txt").write_text("a red house zzz")
    return tmp_path / "discs"


def test_a_sheet_of_the_pictures_is_written_and_nothing_replaced(mos, bundle, folder: Path, tmp_path: Path) -> None:
    (folder / "film.mp4").write_bytes(b"")
    command = ("data", "look", folder, "--from", "tiny", "-o", tmp_path / "look.png")
    result = mos(*command)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() == str(tmp_path / "look.png")
    assert "7 examples, 1 of them held out, 1 file left out" in result.stderr
    assert "6 of 32x32, 1 of 48x16" in result.stderr
    assert f"not used: {folder / 'film.mp4'}: not a picture\n" in result.stderr
    assert Image.open(tmp_path / "look.png").width == 7 * (CELL + GAP) + GAP
    assert mos(*command).exit_code == 3
    (folder / "film.mp4").unlink()
    again = mos(*command, "--overwrite", "-n", "2")
    assert again.exit_code == 0
    assert "7 examples, 1 of them held out\n" in again.stderr
    assert Image.open(tmp_path / "look.png").width == 2 * (CELL + GAP) + GAP


def test_cells_are_what_the_network_sees_with_the_captions_as_tokens(
    bundle, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sheets: list[list[tuple[Image.Image, str]]] = []
    monkeypatch.setattr(pictures, "contact_sheet", lambda cells, lines: sheets.append(cells))
    recipe = load_recipe("finetune", start_from="tiny", data=str(folder))
    captioned, shapes, _ = pictures.look(recipe, 32)
    assert isinstance(captioned, Captioned)
    (cells,) = sheets
    by_size = {image.size: tokens for image, tokens in cells}
    wide = next(size for size in by_size if size[0] > size[1])
    assert "[UNK]" in by_size[wide]
    assert shapes.keys() == by_size.keys()
    assert all("[CLS] a " in tokens for _, tokens in cells)
    assert sum(tokens.startswith("held out: ") for _, tokens in cells) == 1


def test_what_cannot_be_looked_at_is_said_in_a_line(mos, bundle, folder: Path, tmp_path: Path) -> None:
    for options, code, words in (
        (("nowhere", "--from", "tiny"), 3, "nowhere is not a folder"),
        ((folder, "--from", "tiny", "-o", "look.jpg"), 2, "is a PNG"),
        ((folder, "--recipe", "train-smoke"), 2, "captioned pictures"),
        ((folder, "--from", "nothing"), 4, "no model named"),
    ):
        result = mos("data", "look", *options)
        assert (result.exit_code, words in result.stderr) == (code, True), result.stderr
        assert len(result.stderr.splitlines()) == 1
