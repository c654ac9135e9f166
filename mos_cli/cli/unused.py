"""The table of the files of a folder that are not used for training."""

from collections.abc import Sequence

from mos_cli.cli.output import stderr

SHOWN = 20
"""Files that are shown; a run lists all in its folder."""


def print_unused(files: Sequence[tuple[str, str]]) -> None:
    """Prints the files that are not used, with the reasons; nothing if all are."""
    from rich.table import Table
    from rich.text import Text

    if not files:
        return
    more = [(f"and {len(files) - SHOWN} more", "")] if len(files) > SHOWN else []
    if not stderr.is_terminal:
        # A table would be broken at 80 columns.
        for name, reason in (*files[:SHOWN], *more):
            line = f"not used: {name}: {reason}".removesuffix(": ")
            stderr.print(line, markup=False, highlight=False, soft_wrap=True)
        return
    table = Table("not used", "why")
    for row in (*files[:SHOWN], *more):
        table.add_row(*map(Text, row))
    stderr.print(table)
