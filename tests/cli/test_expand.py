"""Outpainting: the canvas grows, the picture stays, and the recipe says so."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

import mos_cli
from mos_cli.config.recipe import Expansion
from mos_cli.errors import UsageError
from mos_cli.images.expansion import grown, new_area, parse_expansion
from mos_cli.images.outputs import png, read_drawing
from tests.helpers.pictures import pixels

WORDS = "a red apple"


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    image = Image.new("RGB", (33, 25), "orange")
    ImageDraw.Draw(image).rectangle((10, 10, 30, 20), fill="blue")
    image.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_the_picture_stays_and_its_surroundings_are_drawn(mos, editor, photo, tmp_path) -> None:
    line = ["edit", photo, WORDS, "--expand", "left=16,top=3,bottom=8"]
    assert mos(*line, "-s", 4, "-o", tmp_path / "out.png", "--strip", tmp_path / "strip.png").exit_code == 0
    image, record = read_drawing(tmp_path / "out.png")
    assert image.size == (49, 36)
    edit = record.recipe.edit
    assert edit is not None
    assert edit.expand == Expansion(left=16, top=3, bottom=8)
    assert [(source.width, source.height) for source in edit.sources] == [(33, 25)]
    assert np.array_equal(pixels(tmp_path / "out.png")[3:28, 16:], pixels(photo)), "bit for bit"
    repeated = np.asarray(grown(Image.open(photo), edit.expand))
    assert not np.array_equal(pixels(tmp_path / "out.png")[:, :16], repeated[:, :16])
    assert mos(*line, "-s", 5, "-o", tmp_path / "other.png").exit_code == 0
    assert not np.array_equal(pixels(tmp_path / "other.png"), pixels(tmp_path / "out.png"))
    verified = mos("replay", tmp_path / "out.png", "--input", photo, "--verify")
    assert (verified.exit_code, verified.stdout) == (0, "exact\n"), verified.stderr
    assert mos("replay", tmp_path / "out.png", "--verify").exit_code == 3, "the picture is not in the file"
    called = mos_cli.load("editor").edit(photo, WORDS, expand="left=16,top=3,bottom=8", seed=4)
    assert called.record.sha256 == record.sha256


def test_a_chain_through_an_expanded_picture_is_replayed(mos, editor, tmp_path) -> None:
    names = [tmp_path / f"{number}.png" for number in range(4)]
    assert mos("generate", WORDS, "-s", 1, "-o", names[0]).exit_code == 0
    assert mos("edit", names[0], WORDS, "--expand", "right=8", "-s", 1, "-o", names[1]).exit_code == 0
    assert mos("edit", names[1], "a cat", "--expand", "left=8,right=8", "-s", 1, "-o", names[2]).exit_code == 0
    assert mos("edit", names[2], "a dog", "-s", 1, "-o", names[3]).exit_code == 0
    for name in names[1:]:
        assert mos("replay", name, "--verify").stdout == "exact\n", name


def test_transparency_beyond_the_picture_is_gone_and_within_it_stays(mos, editor, tmp_path) -> None:
    Image.new("RGBA", (32, 32), (255, 0, 0, 90)).save(tmp_path / "a.png")
    assert mos("edit", tmp_path / "a.png", WORDS, "--expand", "top=8", "-s", 1, "-o", tmp_path / "b.png").exit_code == 0
    alpha = np.asarray(Image.open(tmp_path / "b.png").getchannel("A"))
    assert (alpha[:8] == 255).all()
    assert (alpha[8:] == 90).all()


def test_jobs_expand_too(mos, editor, photo, tmp_path) -> None:
    jobs = [
        {"prompt": WORDS, "picture": str(photo), "expand": "right=7", "output": str(tmp_path / "a.png")},
        {"prompt": WORDS, "picture": str(photo), "expand": "right", "output": str(tmp_path / "b.png")},
        {"prompt": WORDS, "expand": "right=7"},
    ]
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))
    result = mos("run", tmp_path / "jobs.jsonl", "-s", 1)
    assert result.exit_code == 7
    assert "2 of 3 pictures failed" in result.stderr
    assert read_drawing(tmp_path / "a.png")[0].size == (40, 25)


MISTAKES = {
    "no side": (["--expand", "64"], "left=64,top=32"),
    "unknown side": (["--expand", "lft=64"], "did you mean left"),
    "twice": (["--expand", "left=1,left=2"], "left=64,top=32"),
    "nothing": (["--expand", "left=0"], "at least one side"),
    "negative": (["--expand", "left=-3"], "left=64,top=32"),
    "too many": (["--expand", "left=99999"], "16384"),
    "too large": (["--expand", "left=16000,top=16000"], "too large"),
    "with a mask": (["--expand", "left=8", "--mask", "{photo}"], "leave --mask out"),
    "with a size": (["--expand", "left=8", "--size", "32"], "leave --size out"),
    "with keep-alpha": (["--expand", "left=8", "--keep-alpha"], "leave --keep-alpha out"),
    "with composite": (["--expand", "left=8", "--composite"], "leave --composite out"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_line(mos, editor, photo, tmp_path, mistake: str) -> None:
    options, advice = MISTAKES[mistake]
    refused = mos("edit", photo, WORDS, *(one.format(photo=photo) for one in options), "-o", tmp_path / "a.png")
    assert refused.exit_code in (2, 3)
    assert len(refused.stderr.splitlines()) == 1
    assert advice in refused.stderr


def test_a_model_that_does_not_edit_does_not_expand(mos, editor, photo, tmp_path) -> None:
    refused = mos("edit", photo, WORDS, "-m", "tiny", "--expand", "left=8", "-o", tmp_path / "a.png")
    assert (refused.exit_code, len(refused.stderr.splitlines())) == (4, 1)


@pytest.mark.parametrize(
    "forged",
    [{"expand": {"left": 10**9}}, {"expand": {}}, {"expand": {"left": 17}}, {"composite": False}, {"keep_alpha": True}],
)
def test_forged_recipes_are_refused_in_one_line(mos, editor, photo, tmp_path, forged: dict) -> None:
    assert mos("edit", photo, WORDS, "--expand", "left=16", "-s", 1, "-o", tmp_path / "a.png").exit_code == 0
    image, record = read_drawing(tmp_path / "a.png")
    data = json.loads(record.to_json())
    data["recipe"]["edit"] |= forged
    text = json.dumps(data)
    object.__setattr__(record, "to_json", lambda: text)
    (tmp_path / "forged.png").write_bytes(png(image, record))
    refused = mos("replay", tmp_path / "forged.png", "--input", photo, "--verify")
    assert (refused.exit_code, len(refused.stderr.splitlines())) == (3, 1), refused.stderr


def test_sides_are_parsed_and_grown() -> None:
    assert parse_expansion(" left = 3 , bottom=1") == Expansion(left=3, bottom=1)
    with pytest.raises(UsageError):
        parse_expansion("")
    image = Image.new("RGB", (2, 1), "red")
    assert grown(image, Expansion(left=3, bottom=1)).size == (5, 2)
    assert np.asarray(new_area((2, 1), Expansion(left=3, bottom=1))).tolist() == [[255] * 3 + [0] * 2, [255] * 5]
