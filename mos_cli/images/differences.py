"""How far two pictures are from each other."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image


def mean_difference(first: "Image", second: "Image") -> float:
    """The mean absolute difference of two 8-bit pictures of one size and mode, in levels (0 to 255)."""
    return float(np.abs(_error(first, second)).mean())


def psnr(first: "Image", second: "Image") -> float:
    """The peak signal-to-noise ratio of two 8-bit pictures of one size and mode, in dB; infinite for equal ones."""
    squared = np.square(_error(first, second)).mean()
    return float("inf") if squared == 0 else float(10 * np.log10(255**2 / squared))


def _error(first: "Image", second: "Image") -> np.ndarray:
    return np.asarray(first, np.float64) - np.asarray(second, np.float64)
