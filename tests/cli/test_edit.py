"""`mos edit` as a user types it, with random weights: what is kept, what is said, and that it can be done again."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from mos_cli.config.recipe import EarlierPicture, make_recipe
from mos_cli.images.outputs import png, read_drawing
from tests.helpers.pictures import pixels

WORDS = "a red apple"


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture that mos did not make, of an odd size."""
    image = Image.new("RGB", (61, 45), "orange")
    ImageDraw.Draw(image).rectangle((10, 10, 30, 30), fill="blue")
    image.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def left_half(tmp_path: Path) -> Path:
    mask = Image.new("L", (61, 45))
    mask.paste(255, (0, 0, 30, 45))
    mask.save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


def test_the_result_is_as_large_as_the_picture_and_says_what_it_was_made_from(mos, editor, photo, tmp_path) -> None:
    result = mos("edit", photo, WORDS, "-s", 4, "-o", tmp_path / "out.png")
    assert result.exit_code == 0, result.stderr
    image, record = read_drawing(tmp_path / "out.png")
    assert image.size == (61, 45)
    edit = record.recipe.edit
    assert edit is not None
    assert edit.canvas == (40, 24)
    assert [(source.width, source.height) for source in edit.sources] == [(61, 45)]
    assert record.earlier == ()
    assert mos("edit", photo, WORDS, "-s", 4, "-o", tmp_path / "again.png").exit_code == 0
    assert np.array_equal(pixels(tmp_path / "out.png"), pixels(tmp_path / "again.png"))


def test_the_picture_matters(mos, editor, photo, tmp_path) -> None:
    other = tmp_path / "other.png"
    Image.open(photo).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(other)
    for name, options in {"a": [photo], "b": [other], "c": [photo, "--reference", other]}.items():
        picture, *more = options
        assert mos("edit", picture, WORDS, *more, "-s", 4, "-o", tmp_path / f"{name}.png").exit_code == 0
    drawn = [pixels(tmp_path / f"{name}.png") for name in "abc"]
    assert all(not np.array_equal(drawn[i], drawn[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_outside_the_mask_nothing_changes(mos, editor, photo, left_half, tmp_path) -> None:
    before = pixels(photo)
    assert mos("edit", photo, WORDS, "--mask", left_half, "-o", tmp_path / "left.png").exit_code == 0
    left = pixels(tmp_path / "left.png")
    assert np.array_equal(left[:, 30:], before[:, 30:])
    assert not np.array_equal(left[:, :30], before[:, :30])
    options = ["--mask", left_half, "--invert-mask", "--feather", "4"]
    assert mos("edit", photo, WORDS, *options, "-s", 1, "-o", tmp_path / "right.png").exit_code == 0
    assert np.array_equal(pixels(tmp_path / "right.png")[:, :30], before[:, :30])
    replayed = mos("replay", tmp_path / "right.png", "--verify", "--input", photo, "--mask", left_half)
    assert replayed.stdout.strip() == "exact", replayed.stderr


def test_a_missing_mask_of_a_chain_is_told_before_anything_is_drawn(mos, editor, tmp_path, monkeypatch) -> None:
    first, second, third = (tmp_path / f"{name}.png" for name in "abc")
    assert mos("generate", WORDS, "--size", "64", "-o", first).exit_code == 0
    Image.new("L", (64, 64), 255).save(tmp_path / "all.png")
    assert mos("edit", first, WORDS, "--mask", tmp_path / "all.png", "-o", second).exit_code == 0
    assert mos("edit", second, WORDS, "-o", third).exit_code == 0
    monkeypatch.setattr("mos_cli.cli.redrawing.load_with_progress", None)
    result = mos("replay", third, "-o", tmp_path / "d.png")
    assert (result.exit_code, result.stderr.count("give it with --mask FILE")) == (3, 1)


def test_transparency_outlasts_a_composite_of_any_size(mos, editor, left_half, tmp_path) -> None:
    for size in ((32, 32), (61, 45)):
        picture, mask = Image.new("RGBA", size, (255, 0, 0, 90)), tmp_path / "m.png"
        picture.save(tmp_path / "clear.png")
        Image.new("L", size).save(mask)
        with Image.open(mask) as opened:
            opened.putpixel((0, 0), 255)
            opened.save(mask)
        options = ["--mask", mask, "-o", tmp_path / "out.png", "--overwrite"]
        assert mos("edit", tmp_path / "clear.png", WORDS, *options).exit_code == 0
        assert np.array_equal(pixels(tmp_path / "out.png")[1:], np.asarray(picture)[1:])


def test_no_strength_to_speak_of_changes_next_to_nothing(mos, editor, photo, tmp_path) -> None:
    for strength in (1.0, 0.001):
        out = tmp_path / f"{strength}.png"
        assert mos("edit", photo, WORDS, "--strength", strength, "--steps", 1, "--size", 32, "-o", out).exit_code == 0
    # At time 0.001 the latent is the picture's, whatever is predicted, and one step leaves what is predicted.
    trace = json.loads((tmp_path / "0.001.json").read_text())
    assert trace["times"] == pytest.approx([0.001])


def test_image_tokens_are_in_the_trace_and_can_be_looked_at(mos, editor, photo, tmp_path) -> None:
    options = ["--image-cfg", "1.5", "-o", tmp_path / "out.png"]
    assert mos("edit", photo, WORDS, "--reference", photo, *options).exit_code == 0
    trace = json.loads((tmp_path / "out.json").read_text())
    assert set(trace["branches"]) == {"positive", "negative", "unseen"}
    patches = [token["patch"] for token in trace["branches"]["positive"]["tokens"] if "patch" in token]
    assert patches == [[picture, row, column] for picture in range(2) for row in range(4) for column in range(4)]
    assert not any("patch" in token for token in trace["branches"]["unseen"]["tokens"])
    shown = mos("inspect-routing", tmp_path / "out.json", "--word", "picture 2", "--json")
    (word,) = json.loads(shown.stdout)["words"]
    assert len(word["tokens"]) == 16


def test_a_chain_is_kept_and_drawn_again(mos, editor, tmp_path) -> None:
    first, second, third = (tmp_path / f"{name}.png" for name in ("first", "second", "third"))
    assert mos("generate", WORDS, "-s", 1, "-o", first).exit_code == 0
    assert mos("edit", first, "a green apple", "-s", 2, "-o", second).exit_code == 0
    assert mos("edit", second, "a dog", "-s", 3, "--composite", "-o", third).exit_code == 0
    record = read_drawing(third)[1]
    assert [earlier.recipe.prompt for earlier in record.earlier] == [WORDS, "a green apple"]
    for path in (first, second):
        path.unlink()
    assert mos("replay", third, "--verify").stdout.strip() == "exact"


def test_a_chain_may_be_long_and_go_through_several_models(mos, editor, left_half, photo, tmp_path) -> None:
    """A record is as deep after twenty edits as after one; each mask is known by its pixels."""
    assert mos("generate", WORDS, "-m", "tiny", "-s", 1, "-o", tmp_path / "0.png").exit_code == 0
    options = ["--steps", "1", "--cfg", "1", "--trace", "off", "-q"]
    for step in range(20):
        result = mos("edit", tmp_path / f"{step}.png", WORDS, "-s", step, "-o", tmp_path / f"{step + 1}.png", *options)
        assert result.exit_code == 0, result.stderr
    record = read_drawing(tmp_path / "20.png")[1]
    assert len(record.earlier) == 20
    assert record.earlier[0].recipe.model == "tiny"
    assert mos("replay", tmp_path / "3.png", "--verify").stdout.strip() == "exact"

    right_half = tmp_path / "right.png"
    Image.open(left_half).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(right_half)
    a, b = tmp_path / "a.png", tmp_path / "b.png"
    assert mos("edit", photo, WORDS, "--mask", left_half, "-s", 1, "-o", a).exit_code == 0
    assert mos("edit", a, WORDS, "--mask", right_half, "--feather", "2", "-s", 2, "-o", b).exit_code == 0
    given = ["--input", photo, "--mask", right_half, "--mask", left_half]
    replayed = mos("replay", b, "--verify", *given)
    assert replayed.stdout.strip() == "exact", replayed.stderr


def test_a_made_up_record_cannot_go_in_circles_or_ask_for_too_much(mos, editor, photo, tmp_path) -> None:
    out = tmp_path / "out.png"
    assert mos("edit", photo, WORDS, "-s", 1, "-o", out).exit_code == 0
    image, record = read_drawing(out)
    edit = record.recipe.edit
    assert edit is not None
    source = edit.sources[0].sha256
    huge = make_recipe(**record.recipe.model_dump(exclude={"edit"}) | {"width": 10**9, "height": 10**9})
    for recipe, code in ((record.recipe, 3), (huge, 2)):
        circle = EarlierPicture(sha256=source, recipe=recipe, made=record.made)
        out.write_bytes(png(image, record.model_copy(update={"earlier": (circle,)})))
        refused = mos("replay", out, "--verify")
        assert (refused.exit_code, len(refused.stderr.splitlines())) == (code, 1), refused.stderr


def test_a_picture_that_is_used_twice_is_drawn_once(mos, editor, tmp_path) -> None:
    """Else a chain of sixteen would take two to the sixteenth drawings."""
    assert mos("generate", WORDS, "-s", 0, "-o", tmp_path / "0.png").exit_code == 0
    options = ["--steps", "1", "--cfg", "1", "--trace", "off", "-q"]
    for step in range(16):
        picture = tmp_path / f"{step}.png"
        made = mos("edit", picture, WORDS, "-r", picture, "-s", step, "-o", tmp_path / f"{step + 1}.png", *options)
        assert made.exit_code == 0, made.stderr
    assert mos("replay", tmp_path / "16.png", "--verify").stdout.strip() == "exact"


def test_what_others_changed_has_no_history(mos, editor, tmp_path) -> None:
    assert mos("generate", WORDS, "-s", 1, "-o", tmp_path / "ours.png").exit_code == 0
    with Image.open(tmp_path / "ours.png") as opened:
        kept = PngInfo()
        kept.add_itxt("mos", opened.info["mos"])
        opened.putpixel((0, 0), (1, 2, 3))
        opened.save(tmp_path / "changed.png", pnginfo=kept)
    assert mos("edit", tmp_path / "changed.png", WORDS, "-o", tmp_path / "out.png").exit_code == 0
    assert read_drawing(tmp_path / "out.png")[1].earlier == ()


def test_replay_varies_what_an_edit_is_made_with(mos, editor, photo, tmp_path) -> None:
    out = tmp_path / "out.png"
    assert mos("edit", photo, WORDS, "-s", 1, "-o", out).exit_code == 0
    varied = ["--input", photo, "--set", "image_cfg=2", "--set", "strength=0.5", "-o", tmp_path / "varied.png"]
    assert mos("replay", out, *varied).exit_code == 0
    edit = read_drawing(tmp_path / "varied.png")[1].recipe.edit
    assert edit is not None
    assert (edit.image_cfg, edit.strength) == (2.0, 0.5)
    drawing_only = mos("replay", out, "--input", photo, "--set", "model=tiny", "-o", tmp_path / "tiny.png")
    assert (drawing_only.exit_code, len(drawing_only.stderr.splitlines())) == (4, 1)


def test_what_was_not_ours_is_asked_for(mos, editor, photo, tmp_path) -> None:
    out = tmp_path / "out.png"
    assert mos("edit", photo, WORDS, "-o", out).exit_code == 0
    refused = mos("replay", out, "--verify")
    assert refused.exit_code == 3
    assert "give it with --input FILE" in refused.stderr
    strange = mos("replay", out, "--verify", "--input", photo, "--input", out)
    assert (strange.exit_code, len(strange.stderr.splitlines())) == (3, 1)
    assert mos("replay", out, "--verify", "--input", photo).stdout.strip() == "exact"
    assert mos("replay", out, "--input", photo, "--set", "seed=9", "-o", tmp_path / "nine.png").exit_code == 0
    assert read_drawing(tmp_path / "nine.png")[1].recipe.seed == 9


def test_a_strip_shows_before_and_after(mos, editor, photo, tmp_path) -> None:
    result = mos("edit", photo, WORDS, "-o", tmp_path / "out.png", "--strip", tmp_path / "strip.png", "--json")
    assert result.exit_code == 0
    assert [json.loads(line)["event"] for line in result.stdout.splitlines()][-2:] == ["picture", "strip"]
    width, height = Image.open(tmp_path / "strip.png").size
    assert width > 3 * height / 2


MISTAKES = {
    "a model that only draws": (["-m", "tiny"], 4, "only draws"),
    "two sizes": (["--size", "32", "--max-pixels", "1024"], 2, "choose one"),
    "too few pixels": (["--max-pixels", "9"], 2, "256"),
    "feather without a mask": (["--feather", "3"], 2, "--mask"),
    "composite with a mask": (["--mask", "{tmp}/mask.png", "--composite"], 2, "without a mask"),
    "mask of another shape": (["--mask", "{tmp}/square.png"], 3, "another shape"),
    "mask that is none": (["--mask", "{tmp}/nothing.png"], 3, "nothing.png"),
    "no strength": (["--strength", "0"], 2, "strength"),
    "too much strength": (["--strength", "1.5"], 2, "strength"),
    "image guidance out of range": (["--image-cfg", "-1"], 2, "image-cfg"),
    "a strip that is the picture": (["--strip", "{tmp}/out.png"], 2, "of its own"),
    "a strip that is the sheet": (["--strip", "{tmp}/s.png", "--sheet", "{tmp}/s.png"], 2, "of its own"),
    "an interval without guidance": (["--cfg", "1", "--cfg-interval", "0.1,0.9"], 2, "no effect"),
    "a strip of several": (["-n", "2", "--strip", "{tmp}/s.png"], 2, "one"),
    "reference that is no picture": (["--reference", "{tmp}/text.png"], 3, "text.png"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line(mos, editor, photo, left_half, tmp_path, mistake: str) -> None:
    Image.new("L", (40, 40), 255).save(tmp_path / "square.png")
    (tmp_path / "text.png").write_text("not a picture")
    options, code, words = MISTAKES[mistake]
    there = set(tmp_path.iterdir())
    result = mos("edit", photo, WORDS, "-o", tmp_path / "out.png", *(part.format(tmp=tmp_path) for part in options))
    assert (result.exit_code, len(result.stderr.splitlines())) == (code, 1), result.stderr
    assert words in result.stderr
    assert set(tmp_path.iterdir()) - there <= {tmp_path / "cache"}
