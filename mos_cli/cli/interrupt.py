"""Ctrl-C that loses nothing: the first ends after the step at hand, the second at once."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from mos_cli.cli import console


@contextmanager
def gentle_interrupt() -> Iterator[Callable[[], None]]:
    """Turns the first Ctrl-C into a wish; the yielded function, called between steps, grants it (KeyboardInterrupt)."""
    wished = False
    before = signal.getsignal(signal.SIGINT)

    def wish(_number: int, _frame: FrameType | None) -> None:
        nonlocal wished
        wished = True
        console.err.print("finishing this step; Ctrl-C again to stop at once")
        signal.signal(signal.SIGINT, before)

    def check() -> None:
        if wished:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, wish)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)
