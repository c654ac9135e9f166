"""Progress bars on stderr, and Ctrl-C that stops long work between two of its steps."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mos_cli.cli.output import Report, size_text, stderr

if TYPE_CHECKING:
    from mos_cli.bundles.specs import TowerSpec


@contextmanager
def stop_between_steps() -> Iterator[Callable[[], None]]:
    """Defers the first Ctrl-C to the end of the current step; a second one stops at once.

    So are SIGTERM, by which clusters end what has run too long, and SIGHUP, which a closed terminal sends, unless they
    are ignored as `nohup` sets it. The yielded function is called between steps, and raises KeyboardInterrupt if one
    came.
    """
    pressed = False
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in (getattr(signal, name) for name in names)}
    before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        # It may interrupt a write to stderr, which cannot be written to then.
        with suppress(RuntimeError, OSError):
            stderr.print("finishing this step; Ctrl-C again to stop at once")
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def check() -> None:
        if pressed:
            raise KeyboardInterrupt

    for number in before:
        signal.signal(number, on_signal)
    try:
        yield check
    finally:
        restore()


def sampling_bars(report: Report) -> Progress:
    """A bar per picture, which counts its steps and is removed when they are done; none with --json or --quiet."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeRemainingColumn(),
        console=stderr,
        transient=True,
        disable=report.quiet or report.json or not stderr.is_terminal,
    )


@contextmanager
def stage_bars(*columns: str, after: Callable[[], None] = lambda: None) -> Iterator[Callable[..., None]]:
    """A bar per stage of long work; `after` is called after, and Ctrl-C stops after, every picture or step."""
    with (
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            *columns,
            TimeRemainingColumn(),
            console=stderr,
        ) as bars,
        stop_between_steps() as check_interrupt,
    ):
        tasks = {}

        def advance(stage: str, done: int, total: int, loss: float = 0.0) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, loss=loss)
            bars.update(tasks[stage], completed=done, loss=loss)
            check_interrupt()
            after()

        yield advance


def fetch_with_progress(spec: "TowerSpec", *, quiet: bool = False) -> Path:
    """Fetches an understanding tower as `fetch_tower` does; if it is not in the cache yet, with a bar or a line."""
    from mos_cli.bundles.sources import fetch_tower, tower_folder

    if tower_folder(spec).is_dir() or quiet:
        return fetch_tower(spec)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(24),
        TextColumn("{task.fields[size]}"),
        TimeRemainingColumn(),
    )
    terminal = stderr.is_terminal
    if not terminal:
        stderr.print(f"fetching {spec.name} ({size_text(spec.size)} on disk)")
    with Progress(*columns, console=stderr, transient=True, disable=not terminal) as bars:

        def show(source: str, done: int, total: int) -> None:
            size = f"{size_text(done)} of {size_text(total)}" if total else ""
            if bars.tasks and bars.tasks[0].description == source:
                bars.update(bars.tasks[0].id, completed=done, size=size)
                return
            for task in bars.tasks:
                bars.remove_task(task.id)
            bars.add_task(source, completed=done, total=total or None, size=size)

        return fetch_tower(spec, show)
