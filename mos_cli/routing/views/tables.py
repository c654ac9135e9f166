"""Tables for a terminal: numbers on colours, readable without colour, not wider than the console."""

from collections.abc import Iterable, Sequence

from rich.color import Color
from rich.style import Style
from rich.table import Table
from rich.text import Text

CELL = 5
WORD_WIDTH = 18
# Five colours of Viridis, whose brightness grows evenly.
SCALE = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def printable(text: str) -> str:
    """Text of a trace, which is not trusted, without control characters."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def plain_table(show_header: bool = False) -> Table:
    """A table without lines."""
    return Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), show_header=show_header, header_style="dim")


def facts_table(facts: dict[str, str]) -> Table:
    """A table of names and texts."""
    table = plain_table()
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in facts.items():
        table.add_row(name, Text(printable(text)))
    return table


def number_tables(
    label: str, columns: Sequence[int], rows: Sequence[tuple[Text, list[Text]]], width: int, label_width: int
) -> Iterable[Table]:
    """Rows of cells under numbered columns, in as many tables as the columns need to fit."""
    fit = max(1, (width - label_width - 1) // CELL)
    for first in range(0, len(columns), fit):
        table = plain_table(show_header=True)
        table.add_column(label, min_width=label_width, max_width=label_width, overflow="fold")
        for column in columns[first : first + fit]:
            table.add_column(str(column), justify="right", no_wrap=True, min_width=CELL - 1)
        for name, cells in rows:
            table.add_row(name, *cells[first : first + fit])
        yield table


def share_cells(shares: Sequence[float], most: float) -> list[Text]:
    """Shares in percent, brighter the nearer they are to `most`; '-' for 0."""
    return [shaded(f"{100 * share:.0f}", share / most) if share else Text("-") for share in shares]


def heading(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def shaded(text: str, fraction: float) -> Text:
    """A number on a background from dark (0) to bright (1), in black or white."""
    place = fraction * (len(SCALE) - 1)
    below = min(int(place), len(SCALE) - 2)
    colours = zip(SCALE[below], SCALE[below + 1], strict=True)
    red, green, blue = (low + (place - below) * (high - low) for low, high in colours)
    ink = "#000000" if fraction > 0.4 else "#ffffff"
    return Text(text.rjust(CELL - 1), style=Style(color=ink, bgcolor=Color.from_rgb(red, green, blue)))
