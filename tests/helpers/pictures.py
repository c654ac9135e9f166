"""Pictures of noise, and pictures as arrays."""

from pathlib import Path

import numpy as np
from PIL import Image


def noise(width: int = 24, height: int = 17, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """A random picture of a mode; RGBA has random alpha."""
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(levels).convert("RGBA" if mode == "P" else mode).convert(mode)


def array(image: Image.Image) -> np.ndarray:
    """The levels of a picture, which can be subtracted."""
    return np.asarray(image).astype(int)


def pixels(path: Path) -> np.ndarray:
    """The levels of a picture's file, [height, width] or [height, width, channels]."""
    return np.asarray(Image.open(path))
