"""Contact sheets: many pictures in one, each with its prompt below."""

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

COLUMNS = 8
CELL = 128
"""Side of the square a picture is fitted into, in pixels."""
GAP = 8
LINE, LINES, CHARACTERS = 12, 3, 22


def contact_sheet(pictures: list[tuple["Image", str]]) -> "Image":
    """Lays out pictures with their captions, rows first, up to eight in a row."""
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    columns = min(COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    across, down = CELL + GAP, CELL + LINE * LINES + GAP
    sheet = Image.new("RGB", (columns * across + GAP, rows * down + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(LINE - 2)
    for index, (picture, caption) in enumerate(pictures):
        x, y = GAP + index % columns * across, GAP + index // columns * down
        fitted = ImageOps.contain(picture, (CELL, CELL), Image.Resampling.BICUBIC)
        sheet.paste(fitted, (x + (CELL - fitted.width) // 2, y + (CELL - fitted.height) // 2))
        lines = textwrap.wrap(caption, CHARACTERS, max_lines=LINES, placeholder="...")
        draw.text((x, y + CELL + 2), "\n".join(lines), fill="black", font=font, spacing=2)
    return sheet
