"""Rasterising SVG and WebP pictures to square RGBA with premultiplied alpha."""

import io
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

VISIBLE = 0.005
"""A picture with a mean alpha below this is blank."""

# Filters (the inner shadows of Fluent) are not antialiased: pictures with them are drawn larger.
FILTER_OVERSAMPLING = 3


def svg_document(body: str, left: float, top: float, width: float, height: float) -> bytes:
    """An SVG document around `body`, whose view box (user units) is centred in a square."""
    side = max(width, height)
    box = f"{left - (side - width) / 2:g} {top - (side - height) / 2:g} {side:g} {side:g}"
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {names} viewBox="{box}">{body}</svg>'.encode()


def rasterise(picture: bytes, size: int) -> "np.ndarray":
    """Draws one picture, an SVG document or a file Pillow reads: uint8 [size, size, 4], premultiplied RGBA.

    A picture that is not square is centred on a transparent square.
    """
    import numpy as np
    from PIL import Image

    if picture.startswith(b"<svg"):
        picture = _draw_svg(picture, size)
    image = Image.open(io.BytesIO(picture)).convert("RGBA").convert("RGBa")
    side = max(image.size)
    if image.size != (side, side):
        square = Image.new("RGBa", (side, side))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    if side != size:
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    # The ringing of Lanczos can raise a colour above its alpha, which is not valid.
    return np.minimum(pixels, pixels[..., 3:])


def rasterise_all(pictures: Sequence[bytes], size: int) -> Iterator["np.ndarray"]:
    """Draws many pictures on all cores and yields them in order; see `rasterise`."""
    # Spawned, not forked: the caller may have threads (torch), which do not survive a fork.
    # Ctrl-C reaches every process of the terminal; only the caller handles it.
    pool = ProcessPoolExecutor(
        mp_context=multiprocessing.get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )
    try:
        yield from pool.map(partial(rasterise, size=size), pictures, chunksize=8)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _draw_svg(document: bytes, size: int) -> bytes:
    import resvg_py

    if b"<filter" in document:
        size *= FILTER_OVERSAMPLING
    return resvg_py.svg_to_bytes(svg_string=document.decode(), width=size, height=size, skip_system_fonts=True)
