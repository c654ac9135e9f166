"""What a command prints: results on stdout, everything else on stderr, as lines or as JSON."""

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from mos_cli.errors import UsageError

stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)


def print_error(message: str) -> None:
    """Prints one error line to stderr, unwrapped so that it stays one line in a pipe."""
    stderr.print(f"[bold red]error:[/] {_escaped(message)}", soft_wrap=True)


def print_warning(message: str) -> None:
    """Prints one warning line to stderr."""
    stderr.print(f"[yellow]warning:[/] {_escaped(message)}", soft_wrap=True)


def print_json(rows: Iterable[dict[str, Any]]) -> None:
    """Prints rows to stdout as newline-delimited JSON."""
    for row in rows:
        typer.echo(json.dumps(row, ensure_ascii=False))


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table to stdout; the first column is text, the others are numbers."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    stdout.print(table)


def size_text(size: int) -> str:
    """A number of bytes in decimal units, such as "84.2 MB"."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} B"


@dataclass
class Report:
    """Reports what a command does while it runs: lines, JSON events, nothing, or lines and times.

    Raises:
        UsageError: more than one of json, quiet and verbose is set.
    """

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.json + self.quiet + self.verbose > 1:
            raise UsageError("--json, --quiet and --verbose exclude each other: choose one")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the seconds that the block takes to those of a stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def event(self, kind: str, line: str | None = None, **values: Any) -> None:
        """Reports one event on stdout: as a JSON line with its values, or as `line` where there is one."""
        if self.json:
            typer.echo(json.dumps({"event": kind, **values}))
        elif line is not None and not self.quiet:
            # A progress bar is drawn on stderr; where both streams are one terminal, its console has to print the line.
            both = stdout.is_terminal and stderr.is_terminal
            (stderr if both else stdout).print(line, soft_wrap=True, markup=False)

    def note(self, kind: str, line: str, **values: Any) -> None:
        """Reports what is no result: a line on stderr, so that a pipe has results only, or a JSON event on stdout."""
        if self.json:
            self.event(kind, **values)
        elif not self.quiet:
            stderr.print(line, soft_wrap=True, markup=False)

    def picture(self, files: Sequence[Path], *, index: int, prompt: str, seed: int) -> None:
        """Reports a picture that was written, and the files beside it.

        With --quiet and into a pipe, only the path of the picture is printed.
        """
        if self.json:
            self.event("picture", index=index, prompt=prompt, seed=seed, files=[str(file) for file in files])
        elif self.quiet or not sys.stdout.isatty():
            typer.echo(str(files[0]))
        else:
            self.event("picture", f"{files[0]}  (seed {seed})")
            for file in files[1:]:
                self.event("file", str(file))

    def times(self) -> None:
        """Prints the seconds of each stage, with --verbose."""
        if self.verbose:
            for name, seconds in self.seconds.items():
                stderr.print(f"  {name:<10}{seconds:6.2f} s")


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(" ".join(text.split()))
