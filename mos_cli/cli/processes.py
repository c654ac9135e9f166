"""One command in several processes of this machine, which PyTorch's environment variables tell of each other."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from types import FrameType

from mos_cli.cli.output import stderr
from mos_cli.errors import UsageError

PATIENCE = 60.0
"""Seconds that the other processes have to end after one has failed."""
POLL = 0.1
"""Seconds between two looks at the processes."""


def is_worker() -> bool:
    """Whether this process is one of several, of `run_in_processes` or of another launcher."""
    return "RANK" in os.environ


def check_processes(count: int) -> None:
    """Raises UsageError on Windows, and for more processes than GPUs; without a GPU they share the CPU."""
    if sys.platform == "win32":
        raise UsageError(f"--processes {count} is not supported on Windows: leave it out")
    import torch

    if torch.cuda.is_available() and count > (gpus := torch.cuda.device_count()):
        raise UsageError(f"--processes {count}: this machine has {gpus} GPUs, and each process needs one")


def run_in_processes(arguments: Sequence[str], count: int) -> int:
    """Runs `mos` with arguments in `count` processes; returns the exit code of the first that failed, or 0.

    Signals are passed on to all of them once, so that each ends as it would alone. The output is that of the first;
    the errors of another are shown where it failed first.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        **{"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)},
    }
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryFile() as errors:

        def pass_on(number: int, _frame: FrameType | None) -> None:
            for process in processes:
                process.send_signal(number)

        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        for number in before:
            signal.signal(number, pass_on)
        try:
            for rank in range(count):
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "mos_cli", *arguments],
                        env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdout=subprocess.DEVNULL if rank else None,
                        stderr=errors if rank else None,
                        # A terminal sends Ctrl-C to this process alone.
                        start_new_session=True,
                    )
                )
            failed = _wait(processes)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            for process in processes:
                process.kill()
        if failed is None:
            return 0
        if failed:
            errors.seek(0)
            stderr.print(errors.read().decode(errors="replace").rstrip(), markup=False, soft_wrap=True)
        code = processes[failed].returncode
        return 128 - code if code < 0 else code


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Waits for all processes; the number of the first that failed. The others have `PATIENCE` to end by SIGTERM."""
    failed, deadline = None, float("inf")
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if failed is None:
            failed = next((rank for rank, process in enumerate(processes) if process.returncode), None)
            if failed is not None:
                deadline = time.monotonic() + PATIENCE
                for process in processes:
                    process.terminate()
        time.sleep(POLL)
    if failed is None:
        failed = next((rank for rank, process in enumerate(processes) if process.returncode), None)
    return failed
