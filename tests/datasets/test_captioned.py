"""Training data in files: folders, an index, shards; and what is said of those that cannot be used."""

import json
import re
import shutil
import tarfile
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from mos_cli.datasets import captioned_folders
from mos_cli.datasets.captioned import bucket_shape, collate, to_device
from mos_cli.datasets.captioned_folders import load_captioned
from mos_cli.datasets.tables import CaptionedTable
from mos_cli.errors import InputError
from mos_cli.training.recipe import load_recipe
from tests.helpers.tiny_training import write_discs


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered of pictures is the test's own."""
    monkeypatch.setenv("MOS_CACHE", str(tmp_path_factory.mktemp("cache")))


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
        before = to_device(collate([pair]), torch.device("cpu"), which=1)
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
    batch = to_device(collate([picture, picture]), torch.device("cpu"))
    assert batch.shape == (2, 3, 40, 40)
    assert batch[0, :, 20, 20].tolist() == [1, -1, -1]


def reasons(folder: Path, **options) -> dict[str, str]:
    """Why files are not used, by the ends of their names."""
    return {one.name.rpartition("/")[2]: one.reason for one in load_captioned(folder, **options).unused}


def test_what_cannot_be_used_at_all_is_refused(discs: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere is not a folder"):
        load_captioned(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no pictures in"):
        load_captioned(tmp_path / "empty")
    shards = as_shards(discs, tmp_path / "shards")
    (shards / "00000.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(InputError, match=r"cannot read the shard .*00000\.tar"):
        load_captioned(shards)
    (discs / "metadata.jsonl").write_text('{"file_name": "red.png", "text": "x"}\n\n{"file_name": "red.png"}\n')
    with pytest.raises(InputError, match="line 3"):
        load_captioned(discs)
    (discs / "metadata.jsonl").write_text('{"file_name": "../red.png", "text": "x"}\n')
    with pytest.raises(InputError, match=r"line 1: \.\./red\.png is outside"):
        load_captioned(discs)


def test_every_file_that_is_not_used_has_a_reason(discs: Path, tmp_path: Path) -> None:
    (discs / "black.png").write_bytes((discs / "black.png").read_bytes()[:60])
    (discs / "blue.txt").unlink()
    (discs / "brown.txt").write_text(" \n")
    (discs / "green.txt").write_bytes("a caf\u00e9".encode("latin-1"))
    Image.new("RGB", (3, 40)).save(discs / "pink.png")
    Image.new("RGB", (9, 9)).save(discs / "old.tga")
    (discs / "film.mp4").write_bytes(b"film")
    (discs / "._red.png").write_bytes(b"macOS")
    (discs / "alone.txt").write_text("a caption")
    (discs / ".ipynb_checkpoints").mkdir()
    (discs / "linked").symlink_to(tmp_path)
    Image.new("RGB", (24, 20)).save(discs / "gone.before.png")
    found = reasons(discs, smallest=8)
    expected = {
        **{"black.png": "damaged", "blue.png": "no caption", "brown.png": "caption is empty", "green.png": "line 1"},
        **{"pink.png": "too small: 3x40", "old.tga": ".tga are not read", "film.mp4": "not a picture"},
        **{"._red.png": "macOS", "alone.txt": "without a picture", ".ipynb_checkpoints": "hidden"},
        **{"linked": "linked folder", "gone.before.png": "no picture after it"},
    }
    for name, words in expected.items():
        assert words in found.pop(name), name
    assert found == {"blue.txt": found.get("blue.txt")} or not found
    assert [Path(example.picture.name).name for example in load_captioned(discs, smallest=8).examples] == ["red.png"]


def test_shards_name_what_they_do_not_use(discs: Path, tmp_path: Path) -> None:
    (discs / "blue.txt").unlink()
    (discs / "red.png").rename(discs / "red.apple.png")
    with tarfile.open(tmp_path / "0.tar", "w") as shard:
        for path in sorted(discs.iterdir()):
            shard.add(path, path.name)
    unused = load_captioned(tmp_path).unused
    assert {"red.apple.png", "blue.png", "red.txt"} == {one.name.partition(" in ")[0] for one in unused}
    assert "first dot" in next(one.reason for one in unused if one.name.startswith("red.apple.png"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_captions_are_read_in_the_encodings_of_windows(tmp_path: Path, encoding: str) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "a.JPG")
    (tmp_path / "a.TXT").write_bytes("\r\nein M\u00e4rchen \u2013 caf\u00e9\r\n".encode(encoding))
    (example,) = load_captioned(tmp_path).examples
    assert example.caption == "ein M\u00e4rchen \u2013 caf\u00e9"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_indexes_are_read_as_the_field_writes_them(tmp_path: Path, encoding: str) -> None:
    for name in ("a", "b", "c"):
        Image.new("RGB", (20, 20)).save(tmp_path / f"{name}.png")
    text = 'file_name,text\r\na.png,"one, two"\r\nb.png,three\r\nnone.png,four\r\n'
    (tmp_path / "metadata.csv").write_bytes(text.encode(encoding))
    captioned = load_captioned(tmp_path)
    assert [example.caption for example in captioned.examples] == ["one, two", "three"]
    assert reasons(tmp_path).keys() == {"none.png", "c.png"}
    lines = ['{"input_image": "a.png", "edit_prompt": "make it red", "edited_image": "b.png"}', ""]
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "metadata.jsonl").write_bytes("\n".join(lines).encode(encoding))
    (edit,) = load_captioned(tmp_path).edits.examples
    assert (edit.caption, Path(edit.picture.name).name) == ("make it red", "b.png")
    assert edit.before is not None
    assert Path(edit.before.name).name == "a.png"


def test_pictures_without_captions_take_the_given_one(tmp_path: Path) -> None:
    (tmp_path / "Minka").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "Minka" / "1.png")
    Image.new("RGB", (20, 20)).save(tmp_path / "Minka" / "2.png")
    (tmp_path / "Minka" / "2.txt").write_text("asleep")
    captioned = load_captioned(tmp_path, caption="a photo of {folder}, {name}")
    assert [example.caption for example in captioned.examples] == ["a photo of Minka, 1", "asleep"]


def test_pictures_are_what_they_look_like(tmp_path: Path) -> None:
    """Transparency is over a colour, 16 bits are scaled, EXIF is followed, half are mirrored where that is asked."""
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    ramp = np.tile(np.linspace(0, 65535, 16).astype(np.uint16), (16, 1))
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    turned = Image.new("RGB", (16, 16), "white")
    turned.paste("black", (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 3
    turned.save(tmp_path / "turned.png", exif=exif)
    seen = {
        colour: {
            Path(example.picture.name).stem: captioned.load(example, (16, 16))[0][0] for example in captioned.examples
        }
        for colour in ("white", "#ff0000")
        for captioned in [load_captioned(tmp_path, caption="x", background=colour)]
    }
    assert seen["white"]["clear"].min() == 255
    assert seen["#ff0000"]["clear"][0, 0].tolist() == [255, 0, 0]
    assert np.abs(seen["white"]["deep"][0, :, 0].astype(int) - np.linspace(0, 255, 16)).max() <= 1
    assert seen["white"]["turned"][0, 0, 0] == 255
    assert seen["white"]["turned"][15, 0, 0] == 0
    both = load_captioned(tmp_path, caption="x", flip=True)
    rows = {tuple(both.pick(Random(seed), 16)[0][0, 0, :, 0]) for seed in range(40)}
    assert tuple(seen["white"]["deep"][0, :, 0]) in rows
    assert tuple(seen["white"]["deep"][0, ::-1, 0]) in rows


def test_what_was_checked_is_remembered_until_it_changes(discs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, opened = load_captioned(discs), []
    real = captioned_folders.open_blob
    monkeypatch.setattr(captioned_folders, "open_blob", lambda blob, _: opened.append(blob.name) or real(blob, "white"))
    assert load_captioned(discs).examples == first.examples
    assert not opened
    (discs / "red.png").write_bytes(b"damaged since")
    assert "damaged" in reasons(discs)["red.png"]
    assert [Path(name).name for name in opened] == ["red.png"]


def test_a_picture_that_vanishes_during_a_run_is_passed_over_and_said_once(discs: Path, caplog) -> None:
    captioned = load_captioned(discs)
    (discs / "red.png").unlink()
    (discs / "blue.png").write_bytes(b"changed")
    captions = {captioned.pick(Random(seed), 16)[1] for seed in range(60)}
    assert captions == {f"a {name} apple" for name in ("green", "black", "pink", "brown")}
    assert len(caplog.records) == 2
    shutil.rmtree(discs)
    with pytest.raises(InputError):
        captioned.pick(Random(0), 16)


def test_progress_counts_to_the_end(discs: Path) -> None:
    counts: list[tuple[int, int]] = []
    load_captioned(discs, progress=lambda done, total: counts.append((done, total)))
    assert counts == [(done, 6) for done in range(1, 7)]


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


def test_pictures_get_sizes_near_their_own_shape(tmp_path: Path) -> None:
    """As many pixels as the canvas at most, in steps of the model's multiple; a square stays the canvas itself."""
    shape = partial(bucket_shape, canvas=64, multiple=8, smallest=32, largest=128)
    assert shape((500, 500)) == (64, 64)
    assert shape((300, 200)) == (80, 48)
    assert shape((200, 300)) == (48, 80)
    assert shape((900, 100)) == (128, 32)
    for size in ((640, 480), (1920, 1080), (1080, 1920), (101, 100)):
        width, height = shape(size)
        assert width * height <= 64 * 64
        assert abs(width / height / (size[0] / size[1]) - 1) < 0.2
    for number, size in enumerate(((40, 40), (80, 40), (81, 40), (40, 90))):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
    buckets = load_captioned(tmp_path, caption="x").buckets(shape)
    assert [(bucket.shape, len(bucket.examples)) for bucket in buckets] == [((40, 88), 1), ((64, 64), 1), ((88, 40), 2)]
    assert buckets[0].pick(Random(0), 64)[0].shape == (1, 88, 40, 3)


def test_a_folder_that_is_repeated_has_to_be_there(tmp_path: Path) -> None:
    (tmp_path / "zog").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "zog" / "1.png")
    with pytest.raises(InputError, match=r"repeats names cat, and .* has pictures in zog"):
        load_captioned(tmp_path, caption="x", repeats={"cat": 2})
