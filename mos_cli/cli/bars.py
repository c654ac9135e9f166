"""Progress bars of work that goes through stages."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mos_cli.cli import console
from mos_cli.cli.interrupt import gentle_interrupt


@contextmanager
def stage_bars(*columns: str) -> Iterator[Callable[..., None]]:
    """A progress bar per stage; Ctrl-C ends after the picture or the step at hand."""
    with (
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            *columns,
            TimeRemainingColumn(),
            console=console.err,
        ) as bars,
        gentle_interrupt() as check_interrupt,
    ):
        tasks = {}

        def advance(stage: str, done: int, total: int, loss: float = 0.0) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, loss=loss)
            bars.update(tasks[stage], completed=done, loss=loss)
            check_interrupt()

        yield advance
