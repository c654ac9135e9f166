"""Choosing the device, its precision and the number of threads."""

import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mos_cli.errors import DeviceError

if TYPE_CHECKING:
    import torch

Precision = Literal["bf16", "fp32"]

CPUINFO = Path("/proc/cpuinfo")
"""Where Linux describes the CPU."""

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""By these the user sets the number of threads."""

SPIN_VARIABLES = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}
"""How long a waiting OpenMP thread keeps its core busy, about a millisecond: GCC's library, which torch uses on Linux,
counts turns, LLVM's and Intel's count milliseconds. Without other work this is as fast as their defaults, which are
hundreds of times longer."""

PATIENCE = 0.1
"""Seconds between two looks at what other programs use: shorter times are not measured well."""

TAKES, LEAVES = 0.1, 0.3
"""So much of a core may be in use for a thread to be added to it, and so much for a thread to stay."""


def choose_device(requested: str) -> "torch.device":
    """Resolves "auto", "cuda", "cuda:1" or "cpu". "auto" is the CPU where the GPU is an unsupported one.

    Raises:
        DeviceError: the requested device does not exist.
    """
    import torch

    unsupported = unsupported_gpu()
    if requested == "auto":
        return torch.device("cuda" if torch.cuda.is_available() and unsupported is None else "cpu")
    try:
        device = torch.device(requested)
    except RuntimeError:
        raise DeviceError(f"unknown device '{requested}': use auto, cpu or cuda") from None
    if unsupported is not None and device.type in ("mps", "cuda"):
        raise DeviceError(f"{unsupported} is not supported: use --device cpu")
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"device '{requested}' is not supported: use auto, cpu or cuda")
    # device_count includes GPUs whose driver is too old.
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise DeviceError(f"no GPU for device '{requested}': use --device cpu, or see `mos doctor`")
    return device


def unsupported_gpu() -> str | None:
    """The kind of GPU that PyTorch was built for, if it is one on which nothing was ever tested."""
    import torch

    if torch.version.hip is not None:
        return "an AMD GPU (ROCm)"
    return "an Apple GPU (MPS)" if torch.backends.mps.is_available() else None


def choose_precision(device: "torch.device") -> Precision:
    """The precision in which the device computes matrix products fastest."""
    import torch

    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if torch.cpu._is_amx_tile_supported():
        return "bf16"
    # Products in AVX512-BF16 take four times less time than in fp32 on AMD, and 1.8 times more on Intel (docs/LOG.md).
    return "bf16" if torch.cpu._is_avx512_bf16_supported() and not _is_intel() else "fp32"


def _is_intel() -> bool:
    return "GenuineIntel" in (CPUINFO.read_text() if CPUINFO.exists() else platform.processor())


def device_name(device: "torch.device") -> str:
    """The name of the device for the record of a picture."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


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


class FreeThreads:
    """Sets the number of CPU threads to that of the cores which other programs leave free: at least 1.

    One thread whose core is in use makes all others wait for it. As an observer of sampling it looks after every step.
    If the user has set the number (`THREAD_VARIABLES`), it stays.

    Args:
        patience: the least seconds between two looks. The first covers the time since the object was made.
    """

    def __init__(self, patience: float = PATIENCE) -> None:
        import psutil

        self._patience, self._limit = patience, None
        self._chosen_by_user = any(name in os.environ for name in THREAD_VARIABLES)
        self._use_of_cores = lambda: psutil.cpu_percent(percpu=True)
        self._use_of_cores()
        self._looked = (time.perf_counter(), time.process_time())

    def __call__(self, _step: object = None) -> None:
        """Looks, and sets the number for the next step."""
        import torch

        now = (time.perf_counter(), time.process_time())
        seconds, own = (after - before for after, before in zip(now, self._looked, strict=True))
        if self._chosen_by_user or seconds < (self._patience if self._limit else PATIENCE):
            return
        threads = torch.get_num_threads()
        self._limit = self._limit or threads
        use = self._use_of_cores()
        self._looked = now
        cores = _own_cores(len(use))
        free = len(cores) - sum(use[core] for core in cores) / 100 + own / seconds
        kept = min(max(threads, int(free + TAKES)), int(free + LEAVES))
        torch.set_num_threads(max(1, min(kept, self._limit)))


def _own_cores(count: int) -> list[int]:
    """The numbers of the cores that this process may use, of `count`."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(count)
    return [core for core in allowed if core < count]
