"""Listening: the socket, and signals that stop the server between two pictures."""

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn

from mos_cli.errors import UsageError
from mos_cli.server.guard import Guard
from mos_cli.server.queue import JobQueue


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        UsageError: the address is not one of this machine, or in use.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        # create_server adds the address, which the message has already.
        reason = (error.strerror or str(error)).partition(" (while")[0].lower()
        raise UsageError(f"cannot listen at {host} port {port}: {reason}; choose another --host or --port") from None


def url_of(listening: socket.socket) -> str:
    """The address of a listening socket, as this machine reaches it."""
    host, port = map(str, listening.getsockname()[:2])
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app: Guard, queue: JobQueue, listening: socket.socket, stopping: Callable[[], None]) -> None:
    """Answers requests until a signal comes: Ctrl-C, SIGTERM, or SIGHUP of a closed terminal.

    At the first, the current picture is finished if a client waits for it, and what waits in the queue is refused. At
    the second, the current picture is cancelled after its step.

    Args:
        stopping: called at the first.
    """
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="on", ws="none", server_header=False)
    asyncio.run(_Server(config, queue, stopping).serve([listening]))


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, queue: JobQueue, stopping: Callable[[], None]) -> None:
        super().__init__(config)
        self.queue, self.stopping = queue, stopping

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but the process does not end by the signal: it was stopped, and ends with exit code 0."""
        loop = asyncio.get_running_loop()

        def on_signal(_number: int, _frame: FrameType | None) -> None:
            loop.call_soon_threadsafe(self._stop)

        names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        before: dict[Any, Any] = {getattr(signal, name): signal.getsignal(getattr(signal, name)) for name in names}
        before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
        for number in before:
            signal.signal(number, on_signal)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self) -> None:
        if not self.should_exit:
            self.stopping()
            self.queue.stop()
            self.should_exit = True
        elif self.queue.current is not None:
            self.queue.current.request_cancel()
