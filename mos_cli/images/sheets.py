"""Contact sheets: pictures with their prompts; grids: pictures by row and column; strips: before and after an edit."""

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

COLUMNS = 8
CELL = 128
"""Side of the square a picture is fitted into, in pixels."""
LARGEST_PANE = 512
"""Largest side of a picture of a strip, in pixels."""
GAP = 8
LINE, LINES, CHARACTERS = 12, 3, 22


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


def grid(pictures: "dict[tuple[str, str], Image]") -> "Image":
    """Lays out pictures by the labels of their row and column, which stand beside and above; a missing one is white."""
    rows, columns = (list(dict.fromkeys(cell[axis] for cell in pictures)) for axis in (0, 1))
    side = CELL + GAP
    left, top = (GAP if rows == [""] else side), (GAP if columns == [""] else LINE * LINES + GAP)
    sheet, draw = _blank(left + len(columns) * side, top + len(rows) * side)
    for index, label in enumerate(columns):
        _write(draw, label, left + index * side, GAP // 2, CHARACTERS)
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
    from PIL import ImageFont

    wrapped = textwrap.wrap(caption, characters, max_lines=lines, placeholder="...")
    draw.text((x, y + 2), "\n".join(wrapped), fill="black", font=ImageFont.load_default(LINE - 2), spacing=2)
