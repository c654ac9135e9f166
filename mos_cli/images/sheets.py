"""Contact sheets: pictures with their prompts; grids: pictures by row and column; strips: before and after an edit.

The PNG of a sheet says that it is one, as its text `Description`.
"""

import textwrap
import warnings
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

SCHEMA = "mos-sheet/1"
COLUMNS = 8
CELL = 128
"""Side of the square a picture is fitted into, in pixels."""
LARGEST_PANE = 512
"""Largest side of a picture of a strip, in pixels."""
GAP = 8
LINE, LINES, CHARACTERS = 12, 3, 22


def sheet_png(sheet: "Image") -> bytes:
    """A sheet as a PNG file, which `is_sheet` tells from pictures."""
    from PIL.PngImagePlugin import PngInfo

    info, file = PngInfo(), BytesIO()
    info.add_text("Description", SCHEMA)
    sheet.save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def is_sheet(path: Path) -> bool:
    """Whether a file is a sheet that `sheet_png` made."""
    from PIL import Image

    try:
        with warnings.catch_warnings(), Image.open(path, formats=["PNG"]) as opened:
            warnings.simplefilter("ignore")
            return opened.info.get("Description") == SCHEMA
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def contact_sheet(pictures: list[tuple["Image", str]], lines: int = LINES) -> "Image":
    """Lays out pictures with their captions of up to `lines` lines, rows first, up to eight in a row."""
    columns = min(COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    across, down = CELL + GAP, CELL + LINE * lines + GAP
    sheet, draw = _blank(columns * across + GAP, rows * down + GAP)
    for index, (picture, caption) in enumerate(pictures):
        x, y = GAP + index % columns * across, GAP + index // columns * down
        _paste(sheet, picture, x, y, CELL)
        _write(draw, caption, x, y + CELL, CHARACTERS, lines)
    return sheet


def grid(pictures: "dict[tuple[str, str], Image]", title: str = "") -> "Image":
    """Lays out pictures by the labels of their row and column, which stand beside and above; a missing one is white.

    Args:
        title: what stands above all, in up to three lines.
    """
    rows, columns = (list(dict.fromkeys(cell[axis] for cell in pictures)) for axis in (0, 1))
    side = CELL + GAP
    left = GAP + max(_width(label, CHARACTERS - 2) for label in rows)
    width = left + len(columns) * side
    above = LINE * len(_wrapped(title, width * CHARACTERS // side))
    top = above + (GAP if columns == [""] else LINE * LINES + GAP)
    sheet, draw = _blank(width, top + len(rows) * side)
    _write(draw, title, GAP, 0, width * CHARACTERS // side)
    for index, label in enumerate(columns):
        _write(draw, label, left + index * side, above + GAP // 2, CHARACTERS)
    for index, label in enumerate(rows):
        _write(draw, label, GAP, top + index * side, CHARACTERS - 2)
    for (row, column), picture in pictures.items():
        _paste(sheet, picture, left + columns.index(column) * side, top + rows.index(row) * side, CELL)
    return sheet


def strip(before: "Image", after: "Image", instruction: str) -> "Image":
    """An edit before and after, and the difference (white where they are equal), with the instruction below.

    Both are RGB and of one size. The panes are as large as the pictures and of their shape, within limits.
    """
    from PIL import ImageChops

    from mos_cli.images.pictures import FILTER, Fit

    side = min(max(CELL, *before.size), LARGEST_PANE)
    width, height = Fit(before.size, (side, side)).inner
    panes = (before, after, ImageChops.invert(ImageChops.difference(before, after)))
    sheet, draw = _blank(len(panes) * (width + GAP) + GAP, GAP + height + LINE * LINES + GAP)
    for index, pane in enumerate(panes):
        sheet.paste(pane.resize((width, height), FILTER), (GAP + index * (width + GAP), GAP))
    _write(draw, instruction, GAP, GAP + height, sheet.width * CHARACTERS // CELL)
    return sheet


def _blank(width: int, height: int) -> tuple["Image", "ImageDraw"]:
    from PIL import Image, ImageDraw

    sheet = Image.new("RGB", (width, height), "white")
    return sheet, ImageDraw.Draw(sheet)


def _paste(sheet: "Image", picture: "Image", x: int, y: int, side: int) -> None:
    from mos_cli.images.pictures import FILTER, Fit

    fit = Fit(picture.size, (side, side))
    sheet.paste(picture.resize(fit.inner, FILTER), (x + fit.corner[0], y + fit.corner[1]))


def _write(draw: "ImageDraw", caption: str, x: int, y: int, characters: int, lines: int = LINES) -> None:
    text = "\n".join(_wrapped(caption, characters, lines))
    draw.text((x, y + 2), text, fill="black", font=_font(), spacing=2)


def _wrapped(caption: str, characters: int, lines: int = LINES) -> list[str]:
    return textwrap.wrap(caption, characters, max_lines=lines, placeholder="...")


def _width(caption: str, characters: int) -> int:
    """Pixels that a caption and the gap after it take; none for an empty one."""
    return max((round(_font().getlength(line)) + GAP for line in _wrapped(caption, characters)), default=0)


def _font() -> "FreeTypeFont | ImageFont":
    from PIL import ImageFont

    return ImageFont.load_default(LINE - 2)
