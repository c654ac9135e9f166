"""The user's pictures: reading them, and laying any size on the model's canvas and back."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageOps, UnidentifiedImageError

from mos_cli.bundles.specs import Canvas
from mos_cli.errors import InputError, UsageError

FORMATS = ("PNG", "JPEG", "WEBP")
"""What is read. A fixed list: Pillow knows dozens more, some of which run other programs."""
SAME_COLOUR = 2
"""Levels by which a profile may move a colour and still be sRGB under another name."""
FILTER = Image.Resampling.BICUBIC
"""Keeps the place of what is in a picture: box and Hamming move an edge by a part of a pixel, depending on where
it lies. Lanczos keeps it as well, but its second lobe leaves a ripple of ones and twos far outside an enlarged mask."""


@dataclass(frozen=True)
class Picture:
    """A picture of the user's, upright, 8 bits a channel, in sRGB.

    `image` is RGBA if any of it is transparent, else RGB. `notes` say what was lost in reading, a line each.
    """

    image: Image.Image
    notes: tuple[str, ...] = ()

    @property
    def rgb(self) -> Image.Image:
        """What the model sees: RGB, the transparent parts laid on white."""
        return on(self.image, "white")


def on(image: Image.Image, colour: str) -> Image.Image:
    """The picture as RGB, what is transparent in it laid on a colour."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, colour), image).convert("RGB")


def read_picture(path: Path) -> Picture:
    """Reads a PNG, JPEG or WebP of any mode: palette, grey, 16 bits, CMYK, transparent; turned as its EXIF says.

    Of an animated picture the first frame is read.

    Raises:
        InputError: it cannot be read, is no such picture, is damaged, or has more pixels than Pillow's limit.
    """
    # Transparency is kept with the picture and not put back onto the result: the old outline would cut off what the
    # edit adds outside it. So a result is opaque; only `composite`, which knows what was left alone, keeps it there.
    notes: list[str] = []
    try:
        with warnings.catch_warnings():
            # Of too many pixels Pillow warns before it decodes any; its other warnings tell a user nothing.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as opened:
                # The further pictures in a phone's JPEG (MPO) are previews and depths, not frames.
                if opened.format in FORMATS and getattr(opened, "n_frames", 1) > 1:
                    notes.append(f"{path} is animated: only its first frame is read")
                opened.load()
                return make_picture(opened, str(path), notes)
    except UnidentifiedImageError:
        raise InputError(f"{path} is not a PNG, JPEG or WebP picture, the kinds that can be read, or damaged") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        most = (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise InputError(f"{path} is too large to be opened: {most} million pixels at most") from None
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            raise InputError(f"cannot read {path}: {error.strerror}") from None
        # Pillow's decoders raise whatever a damaged file happens to break in them.
        raise InputError(f"{path} is damaged: {error}") from None


def make_picture(image: Image.Image, name: str = "the picture", notes: Sequence[str] = ()) -> Picture:
    """A picture from an image of any mode, turned as its EXIF says; `name` is what notes call it."""
    found = list(notes)
    upright = _or_note(lambda: ImageOps.exif_transpose(image), image, found, f"the EXIF data in {name}")
    return Picture(_eight_bit_srgb(upright, found, name), tuple(found))


def _eight_bit_srgb(image: Image.Image, notes: list[str], name: str) -> Image.Image:
    """RGBA where something is transparent, else RGB; the colours through the picture's own profile."""
    profile = image.info.get("icc_profile")
    if image.mode == "I;16":
        image = _eight_bit_grey(image)
    elif image.mode == "P":
        image = image.convert("RGBA")
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    rgb = image.convert("RGB")
    if profile:
        rgb = _or_note(lambda: _to_srgb(image, profile), rgb, notes, f"the colour profile in {name}")
    if alpha is None or alpha.getextrema() == (255, 255):
        return rgb
    rgb.putalpha(alpha)
    return rgb


def _eight_bit_grey(image: Image.Image) -> Image.Image:
    """A 16-bit grey picture as L, or LA if one of its greys stands for transparent; Pillow itself would clip it."""
    grey_HW = np.asarray(image)
    eight = Image.fromarray(np.rint(grey_HW / 257).astype(np.uint8))
    if (transparent := image.info.get("transparency")) is not None:
        eight.putalpha(Image.fromarray(np.where(grey_HW == transparent, 0, 255).astype(np.uint8)))
    return eight


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """The colours of a picture as RGB in sRGB; raises what ImageCms does if the profile is of no use for them."""
    source, srgb = ImageCms.ImageCmsProfile(BytesIO(profile)), ImageCms.createProfile("sRGB")
    space = source.profile.xcolor_space.strip()  # type: ignore[attr-defined]
    plain = image.convert("RGB")
    # A grey picture often carries the RGB profile of the program that made it.
    colours = {"RGB": plain, "GRAY": image.convert("L") if image.mode in ("1", "L", "LA") else image}.get(space, image)
    rgb = ImageCms.profileToProfile(colours, source, srgb, outputMode="RGB")
    assert rgb is not None
    moved = max(high for _, high in ImageChops.difference(rgb, plain).getextrema())  # type: ignore[misc]
    # Rounding there and back would cost a picture that is in sRGB already its exactness.
    return plain if moved <= SAME_COLOUR else rgb


def _or_note(read: Callable[[], Image.Image], otherwise: Image.Image, notes: list[str], what: str) -> Image.Image:
    """What `read` makes of the picture; if what it needs beside the pixels is damaged, `otherwise` and a note."""
    try:
        return read()
    except Exception as error:
        notes.append(f"{what} cannot be used and is left aside: {error}")
        return otherwise


@dataclass(frozen=True)
class Fit:
    """A picture of size `source` in the middle of the model's canvas of size `working`: width and height in pixels.

    Both sides are scaled by the same factor, but for rounding to whole pixels, so the four borders of the picture are
    borders of pixels on the canvas and nothing shifts or zooms. What is left around it repeats the picture's edge.
    """

    source: tuple[int, int]
    working: tuple[int, int]

    @property
    def inner(self) -> tuple[int, int]:
        """Width and height of the picture on the canvas."""
        (width, height), (across, down) = self.source, self.working
        scale = min(across / width, down / height)
        return min(across, max(1, round(width * scale))), min(down, max(1, round(height * scale)))

    @property
    def corner(self) -> tuple[int, int]:
        """Left and top of the picture on the canvas."""
        return (self.working[0] - self.inner[0]) // 2, (self.working[1] - self.inner[1]) // 2

    def forward(self, image: Image.Image) -> Image.Image:
        """The picture (or its mask) on the canvas, in its mode: RGB or L."""
        (left, top), (width, height), (across, down) = self.corner, self.inner, self.working
        pixels = np.asarray(image.resize(self.inner, FILTER))
        around = ((top, down - top - height), (left, across - left - width), (0, 0))
        return Image.fromarray(np.pad(pixels, around[: pixels.ndim], mode="edge"))

    def back(self, image: Image.Image) -> Image.Image:
        """What the model drew on the canvas, at the size and place of the source."""
        (left, top), (width, height) = self.corner, self.inner
        return image.crop((left, top, left + width, top + height)).resize(self.source, FILTER)


def working_size(size: tuple[int, int], canvas: Canvas, max_pixels: int | None = None) -> tuple[int, int]:
    """The size a model works at for a picture of any size: the largest scale, then the least padding around it.

    The size has at most `max_pixels` pixels; by default as many as the native size, which the model draws best.

    Raises:
        UsageError: even the smallest canvas has more than `max_pixels`.
    """
    budget = canvas.native[0] * canvas.native[1] if max_pixels is None else max_pixels
    multiple, smallest = canvas.multiple, -(-canvas.min // canvas.multiple) * canvas.multiple
    if budget < smallest**2:
        raise UsageError(f"--max-pixels {budget} is too few for this model: it takes at least {smallest**2}")

    def needed(across: int) -> int:
        """The height that holds the picture when it is `across` wide, as far as the canvas and the budget go."""
        rows = -(-across * size[1] // (size[0] * multiple)) * multiple
        most = min(canvas.max, budget // across) // multiple * multiple
        return min(max(rows, smallest), most)

    widths = range(smallest, min(canvas.max, budget // smallest) + 1, multiple)
    sizes = [(across, needed(across)) for across in widths]
    return max(sizes, key=lambda wh: (min(wh[0] / size[0], wh[1] / size[1]), -wh[0] * wh[1]))
