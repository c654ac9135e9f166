"""Masks: a picture may change where its mask is white, not where it is black."""

from PIL import Image, ImageChops, ImageFilter, ImageOps, ImageStat

from mos_cli.errors import InputError, UsageError
from mos_cli.images.pictures import Picture, PictureFile, over, read_picture

FAINTEST, CLEAREST = 10, 32
"""Levels of difference between which the threshold of a change lies."""


def read_mask(
    source: PictureFile | Picture, size: tuple[int, int], *, invert: bool = False, feather: float = 0
) -> Image.Image:
    """Reads a mask for a picture of `size`, as L: 255 may change, 0 stays.

    Transparent pixels count as black, before `invert`. A mask of the picture's shape but another size is scaled.
    `feather`, in pixels of the picture, blurs the edge inwards: black pixels stay black.

    Raises:
        InputError: it is not a picture, has another shape than the picture, or is black.
        UsageError: `feather` is negative or longer than the picture.
    """
    if not 0 <= feather <= max(size):
        raise UsageError(f"feather {feather:g} must lie between 0 and the picture's longer side, {max(size)}")
    picture = source if isinstance(source, Picture) else read_picture(source)
    mask = over(picture.image, "black").convert("L")
    if mask.size != size:
        (width, height), (across, down) = mask.size, size
        # A difference of one pixel is rounding.
        if abs(width * down - height * across) > max(width, height, across, down):
            raise InputError(
                f"as a mask, {picture.name} is {width}x{height}, of another shape than the picture, {across}x{down}"
            )
        mask = mask.resize(size, Image.Resampling.BILINEAR)
    if invert:
        mask = ImageOps.invert(mask)
    if feather:
        blurred = mask.filter(ImageFilter.GaussianBlur(feather))
        # A blurred edge has half its height at the edge: the upper half, doubled, begins there and goes inwards.
        mask = ImageChops.darker(mask, blurred.point([max(0, 2 * level - 255) for level in range(256)]))
    if mask.getextrema() == (0, 0):
        cause = "a smaller feather would leave some of it" if feather else "paint white what may change"
        raise InputError(f"as a mask, {picture.name} lets nothing change: {cause}")
    return mask


def composite(before: Image.Image, after: Image.Image, mask: Image.Image) -> Image.Image:
    """`before` where the mask is 0, exactly; `after` where it is 255; blended between them.

    All have one size: `before` is RGB or RGBA, `after` RGB, the mask L. The result is RGBA if some of it is
    transparent, else RGB.
    """
    masked = after.copy()
    masked.putalpha(mask)
    result = Image.alpha_composite(before.convert("RGBA"), masked)
    opaque = result.getchannel("A").getextrema() == (255, 255)
    return result.convert("RGB") if opaque else result


def estimate_mask(before: Image.Image, after: Image.Image) -> Image.Image:
    """A mask of the changes of an edit, L with 0 and 255, from both pictures, RGB, at the size of the canvas.

    At the size of the input the loss of sharpness by scaling would count as a change. Small differences from redrawing
    are left out. `Fit.back` scales the mask to the input.
    """
    difference = ImageChops.difference(before, after).filter(ImageFilter.GaussianBlur(1))
    red, green, blue = difference.split()
    change = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    # Usually at least half of the picture differs only by redrawing; if more has changed, the upper limit applies.
    threshold = min(max(3 * ImageStat.Stat(change).median[0], FAINTEST), CLEAREST)
    mask = change.point([255 * (level > threshold) for level in range(256)])
    # Grown twice as much as shrunk: small holes close, and there is a margin for soft edges and shadows.
    reach = max(1, round(min(mask.size) / 32))
    for step in [ImageFilter.MaxFilter(3)] * 2 * reach + [ImageFilter.MinFilter(3)] * reach:
        mask = mask.filter(step)
    return mask
