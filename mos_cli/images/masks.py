"""Masks: where a picture may change. White may, black stays as it was."""

from pathlib import Path

from PIL import Image, ImageChops, ImageFilter, ImageOps, ImageStat

from mos_cli.errors import InputError, UsageError
from mos_cli.images.pictures import Picture, on, read_picture

FAINTEST, CLEAREST = 10, 32
"""Levels of difference between which the threshold of a change lies."""


def read_mask(
    source: Path | Picture, size: tuple[int, int], *, invert: bool = False, feather: float = 0
) -> Image.Image:
    """Reads a mask for a picture of `size`, as L: 255 may change, 0 stays.

    What is transparent in it counts as black, before `invert`. A mask of the picture's shape but not its size is
    scaled. `feather`, in pixels of the picture, fades it towards its inside: what was black stays black.

    Raises:
        InputError: it is no picture, has another shape than the picture, or lets nothing change.
        UsageError: `feather` is negative or longer than the picture.
    """
    if not 0 <= feather <= max(size):
        raise UsageError(f"feather {feather:g} must lie between 0 and the picture's longer side, {max(size)}")
    picture, name = (source, "") if isinstance(source, Picture) else (read_picture(source), f" {source}")
    mask = on(picture.image, "black").convert("L")
    if mask.size != size:
        (width, height), (across, down) = mask.size, size
        # One pixel more or less in any side is rounding.
        if abs(width * down - height * across) > max(width, height, across, down):
            raise InputError(f"the mask{name} is {width}x{height}, of another shape than the picture, {across}x{down}")
        mask = mask.resize(size, Image.Resampling.BILINEAR)
    if invert:
        mask = ImageOps.invert(mask)
    if feather:
        blurred = mask.filter(ImageFilter.GaussianBlur(feather))
        # A blurred edge is at half height where the edge was: twice the upper half begins there, and goes inwards.
        mask = ImageChops.darker(mask, blurred.point([max(0, 2 * level - 255) for level in range(256)]))
    if mask.getextrema() == (0, 0):
        cause = "a smaller feather would leave some of it" if feather else "paint white what may change"
        raise InputError(f"the mask{name} lets nothing change: {cause}")
    return mask


def composite(before: Image.Image, after: Image.Image, mask: Image.Image) -> Image.Image:
    """`before` where the mask is 0, bit for bit, `after` where it is 255, between them blended.

    All three of one size: `before` RGB or RGBA, 8 bits; `after` RGB, opaque; the mask L. The result is RGBA if
    some of it is transparent, else RGB.
    """
    over = after.copy()
    over.putalpha(mask)
    result = Image.alpha_composite(before.convert("RGBA"), over)
    opaque = result.getchannel("A").getextrema() == (255, 255)
    return result.convert("RGB") if opaque else result


def estimate_mask(before: Image.Image, after: Image.Image) -> Image.Image:
    """A mask of what an edit changed, as L of 0 and 255, from both pictures, RGB, at the size the model worked at.

    At the input's size the sharpness lost on the way to the model and back would count as change. `Fit.back` brings
    the mask there. It is black where no change stands out from the noise of redrawing.
    """
    difference = ImageChops.difference(before, after).filter(ImageFilter.GaussianBlur(1))
    red, green, blue = difference.split()
    change = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    # Half the picture at least is noise of redrawing, as a rule; where more than that changed, the upper limit holds.
    threshold = min(max(3 * ImageStat.Stat(change).median[0], FAINTEST), CLEAREST)
    mask = change.point([255 * (level > threshold) for level in range(256)])
    # Growing by twice as much as shrinking: small holes close, and a margin is left for soft edges and shadows.
    reach = max(1, round(min(mask.size) / 32))
    for step in [ImageFilter.MaxFilter(3)] * 2 * reach + [ImageFilter.MinFilter(3)] * reach:
        mask = mask.filter(step)
    return mask
