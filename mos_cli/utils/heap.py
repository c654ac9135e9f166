"""The heap of the process: freed memory is kept for the next use."""

import ctypes
import os
from contextlib import suppress

MMAP_THRESHOLD = 32 * 2**20
"""Bytes from which an allocation has pages of its own; the largest value that glibc takes."""
TRIM_THRESHOLD = 256 * 2**20
"""Free bytes at the end of the heap from which they go back to the operating system."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_SET_BY_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """Makes glibc keep up to `TRIM_THRESHOLD` bytes that were freed, unless the user has set it; see mallopt(3).

    On a CPU the activations of every layer are allocated and freed. By default glibc returns them to the operating
    system each time, which then has to clear their pages again (6,000 to 46,000 in a step of the default model). Other
    C libraries are left as they are.
    """
    if any(name in os.environ for name in _SET_BY_USER):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):
        return
    mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD)
    mallopt(_M_TRIM_THRESHOLD, TRIM_THRESHOLD)


def return_freed_memory() -> None:
    """Gives what glibc keeps of freed memory back to the operating system; see malloc_trim(3)."""
    with suppress(AttributeError, TypeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
