"""The two streams of the command line: results on stdout, everything else on stderr."""

import json
from collections.abc import Iterable
from typing import Any

import typer
from rich.console import Console

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def print_error(message: str) -> None:
    """Prints one error line to stderr, unwrapped so that it stays one line in a pipe."""
    err.print(f"[bold red]error:[/] {_escaped(message)}", soft_wrap=True)


def print_warning(message: str) -> None:
    """Prints one warning line to stderr."""
    err.print(f"[yellow]warning:[/] {_escaped(message)}", soft_wrap=True)


def print_json(rows: Iterable[dict[str, Any]]) -> None:
    """Prints rows to stdout as newline-delimited JSON."""
    for row in rows:
        typer.echo(json.dumps(row, ensure_ascii=False))


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(" ".join(text.split()))
