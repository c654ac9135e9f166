"""What a device without memory does, and how much memory a function takes."""

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from mos_cli.utils.threads import cpu_threads


def no_memory(*_: object, **__: object) -> None:
    """Stands in for a function that runs out of GPU memory."""
    raise torch.OutOfMemoryError("CUDA out of memory")


def peak(run: Callable[[], object]) -> int:
    """The most bytes that tensors made within `run` took at once, with the attention that pictures are drawn with."""
    # Training, which other tests do, takes another kernel for the whole process.
    fused = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
    # On a CPU each thread takes room of its own, which a GPU has no like of.
    with fused, cpu_threads(1), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()  # type: ignore[attr-defined]
        most = max(most, live)
    return most
