"""Growing a picture on its sides, for edits that draw what lies beyond it."""

import numpy as np
from PIL import Image, ImageDraw
from pydantic import ValidationError

from mos_cli.config.recipe import Expansion
from mos_cli.errors import UsageError
from mos_cli.utils.validation import first_problem

ADVICE = "write left=64,top=32 with pixels for left, top, right and bottom"


def parse_expansion(text: str) -> Expansion:
    """The pixels to add on each side, from text such as "left=64,right=64"; raises UsageError."""
    sides: dict[str, str] = {}
    for part in text.split(","):
        side, equals, pixels = (each.strip() for each in part.partition("="))
        if not equals or side in sides or not pixels.isdecimal():
            raise UsageError(f"--expand {text}: {ADVICE}")
        sides[side] = pixels
    try:
        return Expansion.model_validate(sides)
    except ValidationError as error:
        raise UsageError(f"--expand {text}: {first_problem(error, Expansion)}; {ADVICE}") from None


def grown(image: Image.Image, expansion: Expansion) -> Image.Image:
    """The picture on a larger canvas, its edges repeated around it; raises UsageError where that is too large."""
    width, height = expansion.grown(image.size)
    if width * height > (Image.MAX_IMAGE_PIXELS or 0):
        raise UsageError(f"expanded to {width}x{height}, the picture is too large: expand it by less")
    around = ((expansion.top, expansion.bottom), (expansion.left, expansion.right), (0, 0))
    return Image.fromarray(np.pad(np.asarray(image), around, mode="edge"))


def new_area(size: tuple[int, int], expansion: Expansion) -> Image.Image:
    """The mask, L, of what is new around a picture of `size` before it was grown: 255 there, 0 on the picture."""
    mask = Image.new("L", expansion.grown(size), 255)
    left, top = expansion.left, expansion.top
    ImageDraw.Draw(mask).rectangle((left, top, left + size[0] - 1, top + size[1] - 1), fill=0)
    return mask
