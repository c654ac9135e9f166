"""The user's pictures: reading them, and fitting them to the model's canvas and back."""

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError

from mos_cli.bundles.specs import Canvas
from mos_cli.config.recipe import PictureRecord
from mos_cli.errors import InputError, MosError, UsageError
from mos_cli.images.records import read_record

# Colour profiles for print and the notes of other programs are larger than Pillow's limit for one chunk of a PNG; its
# limit for all of them together stays.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
# Pillow's warnings are of no use to a user. Filters belong to the process: threads that read pictures share them.
warnings.filterwarnings("ignore", module=r"PIL\.")

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "TIFF", "BMP")
"""The formats that are read, by content. Pillow supports dozens more, some of which run other programs."""
_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV"}
_DEEP_MODES = {"I;16", "I;16L", "I;16B", "I;16N"}
PictureFile = Path | BytesIO
"""A file with a picture, or its bytes: those of standard input, or of what their `name` says."""
SAME_COLOUR = 2
"""The largest change of a colour, in levels, by a profile that counts as sRGB."""
FILTER = Image.Resampling.BICUBIC
"""Does not shift edges, unlike box and Hamming, and unlike Lanczos leaves no ripples around an enlarged mask."""


def name_of(file: PictureFile) -> str:
    """What messages call a file."""
    return str(file) if isinstance(file, Path) else getattr(file, "name", "standard input")


@dataclass(frozen=True)
class Picture:
    """A picture of the user, upright, with 8 bits per channel, in sRGB.

    `image` is RGBA if any of it is transparent, else RGB. `notes` are lines about what was lost in reading; `name` is
    what messages call it. `record` is that of the file, which need not be valid for these pixels.
    """

    image: Image.Image
    notes: tuple[str, ...] = ()
    name: str = "the picture"
    record: PictureRecord | None = None

    @property
    def rgb(self) -> Image.Image:
        """RGB for the model, with white behind transparent parts."""
        return over(self.image, "white")


def over(image: Image.Image, colour: str) -> Image.Image:
    """The picture as RGB, over a colour where it is transparent."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, colour), image).convert("RGB")


def read_picture(file: PictureFile) -> Picture:
    """Reads a picture of FORMATS and any mode: palette, grey, 16 bits, CMYK, transparent; turned as its EXIF says.

    Of an animated picture the first frame is read.

    Raises:
        InputError: it cannot be read, is not such a picture, is damaged, or has more pixels than Pillow's limit.
    """
    # The transparency is not applied to the result, because its outline would cut off what an edit adds. Only
    # `composite` keeps it, outside the mask.
    with opened_picture(file) as (opened, notes):
        return make_picture(opened, name_of(file), notes, read_record(opened))


@contextmanager
def opened_picture(file: PictureFile) -> Iterator[tuple[Image.Image, list[str]]]:
    """Opens and decodes a picture, whatever its suffix says, with lines about what was lost.

    Raises:
        InputError: as `read_picture`, also for errors of Pillow in the block.
    """
    name, notes = name_of(file), []
    if not isinstance(file, Path):
        file.seek(0)
    try:
        with ExitStack() as stack:
            with _QUIET if _decoder_prints(file) else nullcontext():
                opened = stack.enter_context(Image.open(file, formats=FORMATS))
                # From here to twice as many Pillow only warns.
                if opened.width * opened.height > (Image.MAX_IMAGE_PIXELS or 0):
                    raise Image.DecompressionBombError
                # Further pictures in a phone's JPEG (MPO) are previews and depth maps, not frames.
                if opened.format in FORMATS and getattr(opened, "is_animated", False):
                    notes.append(
                        f"{name} has several pages: only its first is read"
                        if opened.format == "TIFF"
                        else f"{name} is animated: only its first frame is read"
                    )
                # Pillow decodes colours to 8 bits by itself.
                if opened.mode not in _DEEP_MODES and any(";16" in str(tile[3]) for tile in opened.tile):
                    notes.append(_reduced(name))
                opened.load()
            yield opened, notes
    except (MosError, MemoryError):
        raise
    except UnidentifiedImageError:
        kinds = "PNG, JPEG, WebP, AVIF, GIF, TIFF or BMP picture"
        raise InputError(f"{name} is not a {kinds}, the kinds that can be read, or damaged") from None
    except Image.DecompressionBombError:
        most = (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise InputError(f"{name} is too large to be opened: {most} million pixels at most") from None
    except Exception as error:
        if isinstance(error, OSError) and error.strerror:
            raise InputError(f"cannot read {name}: {error.strerror}") from None
        # Pillow's decoders raise many kinds of errors for a damaged file.
        raise InputError(f"{name} is damaged: {error}") from None


def _decoder_prints(file: PictureFile) -> bool:
    """Whether a file begins as TIFF or AVIF do."""
    with file.open("rb") if isinstance(file, Path) else nullcontext(file) as opened:
        head = opened.read(8)
        opened.seek(0)
    return head[:2] in (b"II", b"MM") or head[4:] == b"ftyp"


class _QuietDecoders:
    """Keeps libtiff and libavif from printing their errors to stderr themselves; Pillow raises them too.

    What other threads print meanwhile is lost, so this is for pictures of these kinds alone. The file descriptor is
    that of the whole process: the first of the threads that decode at the same time redirects it, and the last
    restores it. If each did both, one could restore the redirection of another.
    """

    def __init__(self) -> None:
        self._lock, self._decoding = threading.Lock(), 0
        self._kept: int | None = None

    def __enter__(self) -> None:
        with self._lock:
            self._decoding += 1
            if self._decoding > 1:
                return
            try:
                self._kept = os.dup(2)
            except OSError:
                # It is closed.
                return
            with Path(os.devnull).open("wb") as null:
                os.dup2(null.fileno(), 2)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._decoding -= 1
            if self._decoding == 0 and self._kept is not None:
                os.dup2(self._kept, 2)
                os.close(self._kept)
                self._kept = None


_QUIET = _QuietDecoders()


def make_picture(
    image: Image.Image,
    name: str = "the picture",
    notes: Sequence[str] = (),
    record: PictureRecord | None = None,
) -> Picture:
    """A picture from an image, turned as its EXIF says; `name` is what notes call it.

    Raises:
        InputError: its pixels are of a kind whose colours are not known, such as 32-bit numbers.
    """
    if image.mode not in _MODES | _DEEP_MODES:
        raise InputError(f"{name} has pixels of the kind {image.mode}: save it as RGB or grey with 8 or 16 bits")
    found = [*notes, _reduced(name)] if image.mode in _DEEP_MODES else list(notes)
    upright = _or_note(lambda: ImageOps.exif_transpose(image), image, found, f"the EXIF data in {name}")
    return Picture(_eight_bit_srgb(upright, found, name), tuple(found), name, record)


def _reduced(name: str) -> str:
    return f"{name} has 16 bits per channel, of which the upper 8 are used"


def _eight_bit_srgb(image: Image.Image, notes: list[str], name: str) -> Image.Image:
    """RGBA if something is transparent, else RGB; the colours are converted by the picture's profile."""
    profile = image.info.get("icc_profile")
    if image.mode in _DEEP_MODES:
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
    """A 16-bit grey picture as L, or LA with a transparent grey; Pillow would clip the levels."""
    grey_HW = np.asarray(image)
    eight = Image.fromarray(np.rint(grey_HW / 257).astype(np.uint8))
    if (transparent := image.info.get("transparency")) is not None:
        eight.putalpha(Image.fromarray(np.where(grey_HW == transparent, 0, 255).astype(np.uint8)))
    return eight


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """The colours of a picture in sRGB; raises ImageCms' own errors if the profile cannot be used."""
    source, srgb = ImageCms.ImageCmsProfile(BytesIO(profile)), ImageCms.createProfile("sRGB")
    space = source.profile.xcolor_space.strip()  # type: ignore[attr-defined]
    plain = image.convert("RGB")
    # A grey picture often has the RGB profile of the program that wrote it.
    colours = {"RGB": plain, "GRAY": image.convert("L") if image.mode in ("1", "L", "LA") else image}.get(space, image)
    rgb = ImageCms.profileToProfile(colours, source, srgb, outputMode="RGB")
    assert rgb is not None
    moved = max(high for _, high in ImageChops.difference(rgb, plain).getextrema())  # type: ignore[misc]
    # A picture in sRGB is not converted, which would round it.
    return plain if moved <= SAME_COLOUR else rgb


def _or_note(read: Callable[[], Image.Image], otherwise: Image.Image, notes: list[str], what: str) -> Image.Image:
    """The result of `read`; if it fails because of damaged metadata, `otherwise` and a note."""
    try:
        return read()
    except Exception as error:
        notes.append(f"{what} cannot be used and is left aside: {error}")
        return otherwise


@dataclass(frozen=True)
class Fit:
    """Fits a picture of size `source` to the middle of a canvas of size `working`: width and height in pixels.

    Both sides are scaled by the same factor, apart from rounding to whole pixels, so that the picture's borders are
    borders of pixels on the canvas. The space around it repeats the picture's edge.
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
        """The part of a canvas that has the picture, scaled to the size of the source."""
        (left, top), (width, height) = self.corner, self.inner
        return image.crop((left, top, left + width, top + height)).resize(self.source, FILTER)


def working_size(size: tuple[int, int], canvas: Canvas, max_pixels: int | None = None) -> tuple[int, int]:
    """The size of the canvas for a picture of any size: with the largest scale, then the least padding.

    It has at most `max_pixels` pixels, by default those of the native size, which the model draws best.

    Raises:
        UsageError: even the smallest canvas has more than `max_pixels`.
    """
    budget = canvas.native[0] * canvas.native[1] if max_pixels is None else max_pixels
    multiple, smallest = canvas.multiple, -(-canvas.min // canvas.multiple) * canvas.multiple
    if budget < smallest**2:
        raise UsageError(f"--max-pixels {budget} is too few for this model: it takes at least {smallest**2}")

    def needed(across: int) -> int:
        """The height for a picture that is `across` wide, within the canvas and the budget."""
        rows = -(-across * size[1] // (size[0] * multiple)) * multiple
        most = min(canvas.max, budget // across) // multiple * multiple
        return min(max(rows, smallest), most)

    widths = range(smallest, min(canvas.max, budget // smallest) + 1, multiple)
    sizes = [(across, needed(across)) for across in widths]
    return max(sizes, key=lambda wh: (min(wh[0] / size[0], wh[1] / size[1]), -wh[0] * wh[1]))
