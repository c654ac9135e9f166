"""Differences of two pictures, in levels and in decibels."""

import numpy as np
import pytest
from PIL import Image

from mos_cli.images.differences import mean_difference, psnr


def test_differences_are_in_levels_and_decibels() -> None:
    black, grey = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), (51, 51, 51))
    assert (mean_difference(black, grey), psnr(black, grey)) == (51, pytest.approx(20 * np.log10(5)))
    assert (mean_difference(black, black), psnr(black, black)) == (0, float("inf"))
