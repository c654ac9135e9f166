"""Training data in files: folders, an index, shards; and what is said of those that cannot be used."""

import json
import re
import shutil
import tarfile
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from mos_cli.datasets.captioned import load_captioned, to_device
from mos_cli.datasets.tables import CaptionedTable
from mos_cli.errors import InputError
from mos_cli.training.recipe import load_recipe
from tests.helpers.tiny_training import write_discs


@pytest.fixture
def discs(tmp_path: Path) -> Path:
    write_discs(tmp_path / "discs")
    return tmp_path / "discs"


def as_index(discs: Path, folder: Path) -> Path:
    folder.mkdir()
    lines = []
    for path in sorted(discs.glob("*.png")):
        path.rename(folder / path.name)
        if path.stem.endswith(".before"):
            continue
        before = path.with_suffix(".before.png").name
        edit = {"before": before} if (discs / before).exists() or (folder / before).exists() else {}
        lines.append(json.dumps({"file_name": path.name, "text": path.with_suffix(".txt").read_text(), **edit}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def as_shards(discs: Path, folder: Path) -> Path:
    folder.mkdir()
    paths = sorted(discs.iterdir())
    for number, part in enumerate((paths[:4], paths[4:])):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as shard:
            for path in part:
                shard.add(path, path.name)
    return folder


def test_edits_are_told_from_pictures_in_every_layout(discs: Path, tmp_path: Path) -> None:
    Image.new("RGB", (24, 20), "black").save(discs / "red.before.png")
    plain, kept = load_captioned(discs), tmp_path / "kept"
    shutil.copytree(discs, kept)
    shards, index = (
        load_captioned(as_shards(kept, tmp_path / "shards")),
        load_captioned(as_index(discs, tmp_path / "i")),
    )
    shutil.copytree(kept, discs, dirs_exist_ok=True)
    for captioned in (plain, index, shards):
        assert len(captioned.pictures.examples) == 5
        (edit,) = captioned.edits.examples
        pair, caption = captioned.edits.pick(Random(0), 16)
        assert caption == "a red apple"
        assert pair.shape == (2, 16, 16, 3)
        assert not pair[1].any()
        before = to_device([pair], torch.device("cpu"), which=1)
        assert torch.equal(before, torch.full((1, 3, 16, 16), -1.0))
        assert edit.before is not None


def picked(folder: Path) -> list[tuple[np.ndarray, str]]:
    captioned = load_captioned(folder)
    return [captioned.pick(Random(f"0/0/{index}"), 16) for index in range(12)]


def test_all_layouts_hold_the_same(discs: Path, tmp_path: Path) -> None:
    beside = picked(discs)
    assert {caption for _, caption in beside} >= {"a black apple", "a blue apple", "a pink apple"}
    for layout in (as_shards(discs, tmp_path / "shards"), as_index(discs, tmp_path / "index")):
        for (picture, caption), (same_picture, same_caption) in zip(beside, picked(layout), strict=True):
            assert caption == same_caption
            assert np.array_equal(picture, same_picture)


def test_pictures_fill_the_canvas_undistorted(tmp_path: Path) -> None:
    """A red square in the middle of a wide grey picture stays a square in the middle."""
    pixels = np.full((40, 100, 3), 128, np.uint8)
    pixels[10:30, 40:60] = (255, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    (tmp_path / "wide.txt").write_text("a square")
    picture, _ = load_captioned(tmp_path).pick(Random(0), 40)
    assert np.array_equal(picture, pixels[None, :, 30:70])
    batch = to_device([picture, picture], torch.device("cpu"))
    assert batch.shape == (2, 3, 40, 40)
    assert batch[0, :, 20, 20].tolist() == [1, -1, -1]


def test_what_cannot_be_used_is_named(discs: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere is not a folder"):
        load_captioned(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no pictures in"):
        load_captioned(tmp_path / "empty")
    (discs / "black.png").write_bytes((discs / "black.png").read_bytes()[:60])
    with pytest.raises(InputError, match=r"cannot read the picture .*black\.png"):
        picked(discs)
    (discs / "blue.txt").unlink()
    with pytest.raises(InputError, match=r"blue\.png has no caption"):
        load_captioned(discs)
    shards = as_shards(discs, tmp_path / "shards")
    with pytest.raises(InputError, match=r"blue\.png in .*00000\.tar has no caption"):
        load_captioned(shards)
    (shards / "00000.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(InputError, match=r"cannot read the shard .*00000\.tar"):
        load_captioned(shards)
    (discs / "metadata.jsonl").write_text('{"file_name": "red.png", "text": "x"}\n{"file_name": "red.png"}\n')
    with pytest.raises(InputError, match="line 2"):
        load_captioned(discs)
    (discs / "metadata.jsonl").write_text('{"file_name": "none.png", "text": "x"}\n')
    with pytest.raises(InputError, match=r"there is no .*none\.png"):
        load_captioned(discs)


def test_a_shipped_recipe_is_shown_whole_and_makes_a_start(mos, tmp_path: Path) -> None:
    """What docs/training.md does: print a recipe, put one's own pictures in."""
    result = mos("train", "train-smoke", "--show")
    assert result.exit_code == 0
    mine = tmp_path / "mine.toml"
    mine.write_text(result.stdout)
    assert load_recipe(str(mine)) == load_recipe("train-smoke")
    own = re.sub(r"\[data\].*?\n\n", '[data]\nkind = "captioned"\npath = "cats"\n\n', result.stdout, flags=re.DOTALL)
    mine.write_text(own)
    assert load_recipe(str(mine)).data == CaptionedTable(kind="captioned", path="cats")
