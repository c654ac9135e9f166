"""The number of CPU threads: recorded, repeated, and adapted to the cores that other programs leave free."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables by which a user sets the number of threads."""

SPIN_VARIABLES = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}
"""How long a waiting OpenMP thread keeps its core busy, about a millisecond: GCC's library, which torch uses on Linux,
counts turns, LLVM's and Intel's count milliseconds. Without other work this is as fast as their defaults, which are
hundreds of times longer."""

INTERVAL = 0.1
"""Least seconds between two measurements of the use of cores: shorter times are not measured well."""

ADD_BELOW, KEEP_BELOW = 0.1, 0.3
"""Use of a core by other programs, as a fraction, below which a thread is added or kept."""


def device_threads(device: "torch.device") -> int | None:
    """The number of CPU threads; None for a GPU."""
    import torch

    return torch.get_num_threads() if device.type == "cpu" else None


class ThreadRecorder:
    """An observer of sampling that records the number of CPU threads of a picture, at its start and where it changes.

    Attributes:
        start: the number at the start; None for a GPU.
        changes: (number of the step, number of threads from it on); after the last step the picture is decoded.
    """

    def __init__(self, device: "torch.device") -> None:
        self._device, self._steps = device, 0
        self.start = self._last = device_threads(device)
        self.changes: list[tuple[int, int]] = []

    def __call__(self, _step: object) -> None:
        """Called after a step and after the observers that may set the number of the next one."""
        self._steps += 1
        threads = device_threads(self._device)
        if threads is not None and threads != self._last:
            self.changes.append((self._steps, threads))
            self._last = threads


@contextmanager
def cpu_threads(count: int | None, changes: Iterable[tuple[int, int]] | None = None) -> Iterator[Callable[[Any], None]]:
    """Sets the number of CPU threads within the context, whatever `OMP_NUM_THREADS` says; None changes nothing.

    Args:
        changes: those of a `ThreadRecorder`, made by the observer of sampling that is yielded.
    """
    import torch

    before, counts = torch.get_num_threads(), dict(changes or ())
    torch.set_num_threads(count or before)

    def follow(step: Any) -> None:
        if step.index + 1 in counts:
            torch.set_num_threads(counts[step.index + 1])

    try:
        yield follow
    finally:
        torch.set_num_threads(before)


def limit_spinning() -> None:
    """Limits how long waiting OpenMP threads spin, unless the user has said; has to be called before torch is imported.

    Threads that spin take the core from the program that they wait for, and a step takes ten times longer.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        for name, value in SPIN_VARIABLES.items():
            os.environ.setdefault(name, value)


class AdaptiveThreads:
    """Sets the number of CPU threads to that of the cores which other programs leave free: at least 1.

    One thread whose core is in use makes all others wait for it. As an observer of sampling it measures after each
    step. If the user has set the number (`THREAD_VARIABLES`), it stays.

    Args:
        interval: least seconds between two measurements. The first covers the time since the object was made.
    """

    def __init__(self, interval: float = INTERVAL) -> None:
        import psutil

        self._interval, self._limit = interval, None
        self._set_by_user = any(name in os.environ for name in THREAD_VARIABLES)
        self._use_of_cores = lambda: psutil.cpu_percent(percpu=True)
        self._use_of_cores()
        self._measured = (time.perf_counter(), time.process_time())

    def __call__(self, _step: object = None) -> None:
        """Measures the use of cores and sets the number for the next step."""
        import torch

        now = (time.perf_counter(), time.process_time())
        seconds, own = (after - before for after, before in zip(now, self._measured, strict=True))
        if self._set_by_user or seconds < (self._interval if self._limit else INTERVAL):
            return
        threads = torch.get_num_threads()
        self._limit = self._limit or threads
        use = self._use_of_cores()
        self._measured = now
        cores = _own_cores(len(use))
        free = len(cores) - sum(use[core] for core in cores) / 100 + own / seconds
        kept = min(max(threads, int(free + ADD_BELOW)), int(free + KEEP_BELOW))
        torch.set_num_threads(max(1, min(kept, self._limit)))


def _own_cores(count: int) -> list[int]:
    """The numbers of the cores that this process may use, of `count`."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(count)
    return [core for core in allowed if core < count]
