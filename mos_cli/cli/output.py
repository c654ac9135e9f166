"""What a command prints: results on stdout, everything else on stderr, as lines or as JSON."""

import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from mos_cli.errors import OUTPUT_CLOSED, UsageError

# Lines are not broken: a pipe has no width, and a terminal breaks them itself.
stdout = Console(highlight=False, soft_wrap=True)
stderr = Console(stderr=True, highlight=False)
ANY_WIDTH = 10_000
"""Characters in a line that no table reaches."""


class StandardStream(TextIOWrapper):
    """A standard stream that escapes what its encoding does not have, and that names itself where it cannot be written.

    What is written after that is discarded. Where nobody reads the stream any more, as after `| head`, the process ends
    with the exit status OUTPUT_CLOSED.
    """

    def __init__(self, stream: TextIOWrapper, label: str) -> None:
        super().__init__(stream.buffer, stream.encoding, "backslashreplace", line_buffering=stream.line_buffering)
        self.label = label

    def write(self, text: str, /) -> int:
        with self.named():
            return super().write(text)

    def flush(self) -> None:
        with self.named():
            super().flush()

    @contextmanager
    def named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if isinstance(error, BrokenPipeError):
                raise SystemExit(OUTPUT_CLOSED) from None
            error.filename = self.label
            raise


def open_standard_streams() -> None:
    """Makes stdout and stderr of the process `StandardStream`s; one that is closed is None, and stays it."""
    for name, label in {"stdout": "standard output", "stderr": "standard error"}.items():
        if isinstance(stream := getattr(sys, name), TextIOWrapper):
            setattr(sys, name, StandardStream(stream, label))


def print_error(message: str) -> None:
    """Prints one error line to stderr, unwrapped so that it stays one line in a pipe."""
    # The exit status still tells of the error where stderr cannot be written.
    with suppress(OSError):
        stderr.print(f"[bold red]error:[/] {_escaped(message)}", soft_wrap=True)


def print_warning(message: str) -> None:
    """Prints one warning line to stderr."""
    stderr.print(f"[yellow]warning:[/] {_escaped(message)}", soft_wrap=True)


def print_bytes(data: bytes) -> None:
    """Writes bytes to stdout."""
    with sys.stdout.named() if isinstance(sys.stdout, StandardStream) else nullcontext():
        sys.stdout.buffer.write(data)
        sys.stdout.flush()


def print_json(rows: Iterable[dict[str, Any]]) -> None:
    """Prints rows to stdout as newline-delimited JSON, in ASCII: the same bytes in every locale."""
    for row in rows:
        typer.echo(json.dumps(row))


def print_view(view: Any, *, wide: bool = False) -> None:
    """Prints what rich lays out to stdout; where that is no terminal, without spaces at the ends of its lines.

    Args:
        wide: where stdout is no terminal, lines may have any length.
    """
    if stdout.is_terminal:
        stdout.print(view, soft_wrap=False)
        return
    console = Console(highlight=False, width=ANY_WIDTH if wide else None)
    with console.capture() as captured:
        console.print(view)
    for line in captured.get().splitlines():
        typer.echo(line.rstrip())


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table to stdout; the first column is text, the others are numbers."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    print_view(table, wide=True)


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
    lines: dict[str, str] = field(default_factory=dict)
    """What --verbose prints after the seconds."""

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
        """Reports a picture that was written, and the files beside it; nothing for one that went to stdout."""
        if not files:
            return
        names = [str(file) for file in files]
        line = "\n".join([f"{names[0]}  (seed {seed})", *names[1:]])
        self.path("picture", files[0], line, index=index, prompt=prompt, seed=seed, files=names)

    def path(self, kind: str, path: Path, line: str, /, **values: Any) -> None:
        """Reports a picture by an event; with --quiet and into a pipe, its path alone is printed."""
        if self.json or (not self.quiet and sys.stdout.isatty()):
            self.event(kind, line, **values)
        else:
            typer.echo(str(path))

    def times(self) -> None:
        """Prints the seconds of each stage and `lines`, with --verbose."""
        if self.verbose:
            for name, seconds in self.seconds.items():
                stderr.print(f"  {name:<10}{seconds:6.2f} s")
            for name, line in self.lines.items():
                stderr.print(f"  {name:<12}{line}")


def _escaped(text: str) -> str:
    from rich.markup import escape

    # Prompts and names come from files, too, and may hold commands for the terminal.
    return escape(re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda match: f"\\x{ord(match[0]):02x}", " ".join(text.split())))
