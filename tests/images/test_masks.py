"""Masks, what they keep of a picture, and the strip that shows an edit; reading of pictures is in test_pictures."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mos_cli.bundles.specs import Canvas
from mos_cli.errors import InputError, UsageError
from mos_cli.images.masks import composite, estimate_mask, read_mask
from mos_cli.images.pictures import Fit, working_size
from mos_cli.images.sheets import CELL, LARGEST_PANE, strip
from tests.helpers.pictures import array, noise


@pytest.fixture
def mask_file(tmp_path):
    def write(image: Image.Image) -> Path:
        image.save(tmp_path / "mask.png")
        return tmp_path / "mask.png"

    return write


def square(size: tuple[int, int] = (60, 40)) -> Image.Image:
    mask = Image.new("L", size, 0)
    mask.paste(255, (size[0] // 4, size[1] // 4, size[0] * 3 // 4, size[1] * 3 // 4))
    return mask


def test_masks_are_read_inverted_and_scaled(mask_file) -> None:
    mask = square()
    assert read_mask(mask_file(mask), (60, 40)).tobytes() == mask.tobytes()
    assert np.array_equal(array(read_mask(mask_file(mask), (60, 40), invert=True)), 255 - array(mask))
    painted = Image.new("RGBA", (60, 40))
    painted.paste("white", mask=mask)
    assert read_mask(mask_file(painted), (60, 40)).tobytes() == mask.tobytes(), "transparent stays"
    for size in ((600, 400), (31, 20), (601, 400)):
        scaled = array(read_mask(mask_file(mask), size))
        assert scaled.shape == size[::-1]
        assert (scaled.max(), scaled.min()) == (255, 0)
        assert scaled.mean() == pytest.approx(255 / 4, rel=0.05)


@pytest.mark.parametrize("feather", [1, 2, 5])
def test_feather_fades_inwards_only(mask_file, feather: float) -> None:
    hard = array(square((200, 100)))
    soft = array(read_mask(mask_file(square((200, 100))), (200, 100), feather=feather))
    assert (soft[hard == 0] == 0).all()
    assert soft[50, 100] == 255
    corner = square((200, 100))
    corner.paste(0, (100, 50, 200, 100))
    soft_corner = array(read_mask(mask_file(corner), (200, 100), feather=feather))
    assert (soft_corner[array(corner) == 0] == 0).all(), "nor into a corner"
    edge = soft[50, 50:100]
    assert (np.diff(edge) >= 0).all()
    assert edge[0] < 160
    assert 0.5 * feather < (255 - edge).sum() / 255 < 2 * feather


MASK_MISTAKES = {
    "another shape": (square((40, 60)), {}, InputError, "another shape"),
    "all black": (Image.new("L", (60, 40)), {}, InputError, "lets nothing change"),
    "all white, inverted": (Image.new("L", (60, 40), 255), {"invert": True}, InputError, "lets nothing change"),
    "feathered away": (square(), {"feather": 60}, InputError, "smaller feather"),
    "negative feather": (square(), {"feather": -1}, UsageError, "feather -1"),
    "no number": (square(), {"feather": float("nan")}, UsageError, "feather nan"),
}


@pytest.mark.parametrize("mistake", MASK_MISTAKES)
def test_masks_that_are_refused(mask_file, mistake: str) -> None:
    mask, options, error, words = MASK_MISTAKES[mistake]
    with pytest.raises(error, match=words):
        read_mask(mask_file(mask), (60, 40), **options)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_composites_are_exact_outside_and_inside(mode: str) -> None:
    before, after = noise(256, 64, mode), noise(256, 64, "RGB", seed=1)
    mask = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (64, 1)))
    out = composite(before, after, mask)
    assert (out.mode, out.size) == (mode, before.size)
    assert np.array_equal(array(out)[:, 0], array(before)[:, 0])
    assert np.array_equal(array(out)[:, 255, :3], array(after)[:, 255])
    weight = array(mask)[..., None] / 255
    if mode == "RGB":
        assert np.abs(array(out) - (array(before) * (1 - weight) + array(after) * weight)).max() <= 1
    else:
        assert (array(out)[:, 255, 3] == 255).all()
        alpha = array(before)[..., 3:]
        assert np.abs(array(out)[..., 3:] - (alpha * (1 - weight) + 255 * weight)).max() <= 1


def edit_pair(kind: str) -> tuple[Image.Image, Image.Image, np.ndarray]:
    """Two scenes of 64 px, the second redrawn at 35 dB, and where they truly differ."""
    before = Image.new("RGB", (64, 64), (230, 240, 250))
    ImageDraw.Draw(before).ellipse((6, 6, 26, 26), fill=(200, 30, 30))
    after = before.copy()
    boxes = {"recolour": (6, 6, 26, 26), "add": (40, 40, 44, 44), "background": (0, 0, 63, 63), "nothing": None}
    if box := boxes[kind]:
        ImageDraw.Draw(after).ellipse(box, fill=(60, 140, 60))
    true = np.abs(array(before) - array(after)).max(-1) > 0
    redrawn = array(after) + np.random.default_rng(0).normal(0, 255 * 10 ** (-35 / 20), (64, 64, 3))
    return before, Image.fromarray(redrawn.clip(0, 255).round().astype(np.uint8)), true


def around(true: np.ndarray, reach: int) -> np.ndarray:
    near = np.zeros_like(true)
    for y, x in np.argwhere(true):
        near[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1] = True
    return near


@pytest.mark.parametrize("kind", ["recolour", "add", "background", "nothing"])
def test_estimated_masks_hold_the_change_and_little_more(kind: str) -> None:
    before, after, true = edit_pair(kind)
    mask = estimate_mask(before, after)
    assert (mask.mode, mask.size) == ("L", before.size)
    found = array(mask)
    assert set(np.unique(found)) <= {0, 255}
    assert (found[true] == 255).all()
    assert (found[around(true, 1)] == 255).all(), "a margin of a pixel at least"
    assert not (found[~around(true, 6)] > 0).any(), "and of six at most"


def test_small_holes_of_a_change_are_filled() -> None:
    before = Image.new("RGB", (64, 64), "white")
    after = before.copy()
    ImageDraw.Draw(after).rectangle((10, 10, 50, 50), fill="red")
    ImageDraw.Draw(after).rectangle((28, 28, 31, 31), fill="white")
    assert (array(estimate_mask(before, after))[10:51, 10:51] == 255).all()


def test_an_estimated_mask_leaves_the_rest_of_a_large_picture_bit_exact() -> None:
    before = noise(301, 199)
    fit = Fit(before.size, working_size(before.size, Canvas(native=(64, 64), multiple=8, min=32, max=128)))
    small = fit.forward(before)
    changed = small.copy()
    ImageDraw.Draw(changed).rectangle((0, 0, 20, 20), fill="red")
    mask = fit.back(estimate_mask(small, changed))
    out = array(composite(before, fit.back(changed), mask))
    assert np.array_equal(out[120:], array(before)[120:])
    assert np.abs(out[:60, :60] - (255, 0, 0)).max() <= 2


@pytest.mark.parametrize("size", [(1, 1), (64, 64), (300, 200), (1, 2000), (600, 100)])
def test_strips_show_before_after_and_difference(size: tuple[int, int]) -> None:
    before, after = Image.new("RGB", size, "red"), Image.new("RGB", size, "blue")
    shown = strip(before, after, "make it blue")
    side = min(max(CELL, *size), LARGEST_PANE)
    width, height = (max(1, round(side * length / max(size))) for length in size)
    assert shown.width == 3 * (width + 8) + 8
    panes = [shown.crop((8 + index * (width + 8), 8, (index + 1) * (width + 8), 8 + height)) for index in range(3)]
    for pane, colour in zip(panes, ((255, 0, 0), (0, 0, 255), (0, 255, 0)), strict=True):
        assert pane.getcolors() == [(width * height, colour)], "a pane has the shape of the picture"
    assert array(shown)[8 + height :].min() < 128, "the instruction stands below"
    same = strip(before, before, "do nothing").crop((2 * (width + 8), 0, shown.width, 8 + height))
    assert same.getcolors() == [((width + 16) * (height + 8), (255,) * 3)]
