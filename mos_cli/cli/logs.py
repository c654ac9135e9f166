"""`mos logs`: pictures that were drawn before, and where they are."""

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from mos_cli.cli.options import Json, as_text
from mos_cli.cli.output import print_json, print_view, stderr

if TYPE_CHECKING:
    from mos_cli.images.log import LoggedPicture


def logs(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            callback=as_text,
            help="Only pictures in whose prompts, path or model all of these occur.",
            metavar="WORD...",
        ),
    ] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many, the last ones.")] = 20,
    json: Json = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print nothing but the paths of pictures that are there.")
    ] = False,
) -> None:
    """List pictures that were drawn before, or search them; the last stands last.

    The log is a file in the user's data folder. --no-log, MOS_LOG=0 or log = false in the config file leaves pictures
    out of it, and so does --metadata none.
    """
    from mos_cli.errors import UsageError
    from mos_cli.images.log import logged_pictures

    if json and quiet:
        raise UsageError("--json and --quiet exclude each other: choose one")
    pictures = logged_pictures(words or (), count)
    if json:
        print_json(
            {
                "time": one.time,
                "path": None if one.path is None else str(one.path),
                "state": one.state,
                "prompt": one.prompt,
                "negative": one.negative,
                "model": one.model,
                "seed": one.seed,
                "recipe": one.recipe,
            }
            for one in pictures
        )
    elif quiet:
        for path in dict.fromkeys(one.path for one in pictures if one.state == "there"):
            typer.echo(str(path))
    elif pictures:
        _print(pictures)
    else:
        stderr.print("no such picture in the log" if words else "the log has no pictures yet")


def _print(pictures: "list[LoggedPicture]") -> None:
    from rich.table import Table
    from rich.text import Text

    from mos_cli.routing.views.tables import printable

    table = Table(box=None, pad_edge=False)
    table.add_column("time", no_wrap=True)
    table.add_column("model", no_wrap=True)
    table.add_column("seed", justify="right", no_wrap=True)
    table.add_column("prompt", overflow="fold")
    table.add_column("picture", overflow="fold")
    for one in pictures:
        picture = "" if one.path is None else f"{one.path}  "
        picture = str(one.path) if one.state == "there" else f"{picture}({one.state})"
        time = datetime.fromisoformat(one.time).astimezone().strftime("%Y-%m-%d %H:%M")
        cells = (time, one.model, str(one.seed), one.prompt, picture)
        table.add_row(*(Text(printable(cell)) for cell in cells), style="" if one.state == "there" else "dim")
    print_view(table, wide=True)
