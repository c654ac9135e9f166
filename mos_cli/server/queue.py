"""The queue of a server: pictures are drawn one after another, by one thread, and each is a job that can be followed.

Everything but the drawing happens in the event loop, so that nothing has to be locked.
"""

import asyncio
import secrets
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from time import time
from typing import TYPE_CHECKING, Any, Literal, Protocol

from mos_cli.errors import InputError, MosError
from mos_cli.utils.counts import counted

if TYPE_CHECKING:
    from mos_cli.server.drawing import CheckedRequest, Result

KEPT = 32
"""Finished jobs whose pictures are kept in memory."""
Status = Literal["waiting", "drawing", "done", "failed", "cancelled"]


class JobCancelledError(Exception):
    """A picture is not wanted any more; raised between two steps."""


class QueueFullError(MosError):
    """As many pictures wait as may."""


class StoppingError(MosError):
    """The server is stopping, and takes no jobs."""


class StepLike(Protocol):
    """What a step says of itself: its number, from 0, of how many, and the time after it."""

    @property
    def index(self) -> int: ...
    @property
    def total(self) -> int: ...
    @property
    def t(self) -> float: ...


class Job:
    """A picture that was asked for. `events` is all that has become of it, in order.

    Attributes:
        watched: how many connections wait for it.
    """

    def __init__(self, request: "CheckedRequest") -> None:
        self.id = secrets.token_hex(8)
        self.request, self.created = request, time()
        self.status: Status = "waiting"
        self.result: Result | None = None
        self.error: Exception | None = None
        self.watched = 0
        self.events: list[dict[str, Any]] = []
        self._changed = asyncio.Event()
        self._cancel = threading.Event()

    @property
    def finished(self) -> bool:
        return self.status in ("done", "failed", "cancelled")

    def publish(self, kind: str, /, **values: Any) -> None:
        """Adds an event, and wakes who follows."""
        self.events.append({"type": kind, "job": self.id, **values})
        self._changed.set()
        self._changed = asyncio.Event()

    async def follow(self) -> AsyncIterator[dict[str, Any]]:
        """All events from the first to the last."""
        seen = 0
        while True:
            changed = self._changed
            for event in self.events[seen:]:
                seen += 1
                yield event
            if self.finished and seen == len(self.events):
                return
            if not changed.is_set():
                await changed.wait()

    async def wait(self) -> None:
        """Returns when it is finished."""
        async for _ in self.follow():
            pass

    def end(self, status: Status, /, **values: Any) -> None:
        self.status = status
        self.publish(status, **values)

    def request_cancel(self) -> None:
        self._cancel.set()

    def check(self) -> None:
        """Called by the thread that draws; raises JobCancelledError if the picture is not wanted any more."""
        if self._cancel.is_set():
            raise JobCancelledError

    def info(self) -> dict[str, Any]:
        """What a client is told of it, without the picture."""
        steps = next((event for event in reversed(self.events) if event["type"] == "step"), None)
        return {
            "id": self.id,
            "status": self.status,
            "created": int(self.created),
            # As text, too: JavaScript rounds large numbers.
            "seed": str(self.request.recipe.seed),
            "step": 0 if steps is None else steps["step"],
            "error": None if self.error is None else str(self.error),
            "recipe": self.request.recipe.model_dump(mode="json", exclude_none=True),
        }


class JobQueue:
    """Draws jobs in their order, and releases what it draws with when there have been none for a while.

    Args:
        draw: draws what is planned, in a thread of its own; it calls its second argument after every step.
        release: gives the memory of the model back, in the same thread.
        limit: how many jobs may wait.
        idle: seconds without a job after which `release` is called; None: never.
    """

    def __init__(
        self,
        draw: "Callable[[CheckedRequest, Callable[[StepLike], None]], Result]",
        release: Callable[[], None] = lambda: None,
        *,
        limit: int,
        idle: float | None = None,
    ) -> None:
        self._draw, self._release = draw, release
        self.limit, self.idle = limit, idle
        self.jobs: dict[str, Job] = {}
        self.waiting: deque[Job] = deque()
        self.current: Job | None = None
        self.stopping = False
        self._added = asyncio.Event()
        # Always the same thread: the number of threads of a computation belongs to it.
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="draw")

    def add(self, requests: "Sequence[CheckedRequest]") -> list[Job]:
        """Adds jobs, all or none.

        Raises:
            QueueFullError: too many would wait.
            StoppingError: the server is stopping.
        """
        if self.stopping:
            raise StoppingError("the server is stopping")
        if len(requests) > self.limit:
            raise QueueFullError(f"{len(requests)} pictures at once: the queue holds {self.limit}")
        if len(self.waiting) + len(requests) > self.limit:
            raise QueueFullError(f"{counted(len(self.waiting), 'picture')} already waiting: try again later")
        jobs = [Job(request) for request in requests]
        for job in jobs:
            self.jobs[job.id] = job
            self.waiting.append(job)
            job.publish("queued", position=self.waiting.index(job) + (self.current is not None))
        self._forget_old()
        self._added.set()
        return jobs

    def cancel(self, job: Job, reason: str = "it was cancelled") -> None:
        """Cancels a job: at once if it waits, else after the current step; nothing if it is finished."""
        if job in self.waiting:
            self.waiting.remove(job)
            self._tell_positions()
            job.error = InputError(reason)
            job.end("cancelled", error=reason)
        elif not job.finished:
            job.request_cancel()

    @contextmanager
    def watch(self, jobs: Sequence[Job]) -> Iterator[None]:
        """Counts a connection that waits for jobs within the context; what is not finished at its end is cancelled."""
        for job in jobs:
            job.watched += 1
        try:
            yield
        finally:
            for job in jobs:
                job.watched -= 1
                self.cancel(job)

    def stop(self) -> None:
        """Takes no more jobs, cancels those that wait, and the current one if no client waits for it."""
        self.stopping = True
        for job in list(self.waiting):
            self.cancel(job, "the server is stopping")
        if self.current is not None and not self.current.watched:
            self.current.request_cancel()
        self._added.set()

    async def run(self) -> None:
        """Draws until `stop` is called and the current picture is finished."""
        loop = asyncio.get_running_loop()
        drawn = False
        while True:
            while self.waiting:
                job = self.current = self.waiting.popleft()
                self._tell_positions()
                job.status = "drawing"
                job.publish("drawing", steps=job.request.recipe.steps)
                await self._draw_one(job, loop)
                self.current = None
                drawn = True
            if self.stopping:
                break
            self._added.clear()
            try:
                await asyncio.wait_for(self._added.wait(), self.idle if drawn else None)
            except TimeoutError:
                await loop.run_in_executor(self.thread, self._release)
                drawn = False
        self.thread.shutdown()

    async def _draw_one(self, job: Job, loop: asyncio.AbstractEventLoop) -> None:
        def on_step(step: StepLike) -> None:
            values = {"step": step.index + 1, "steps": step.total, "t": round(step.t, 4)}
            loop.call_soon_threadsafe(lambda: job.publish("step", **values))
            job.check()

        def draw() -> "Result":
            job.check()
            return self._draw(job.request, on_step)

        try:
            job.result = await loop.run_in_executor(self.thread, draw)
        except JobCancelledError:
            job.error = InputError("it was cancelled")
            job.end("cancelled", error=str(job.error))
        except Exception as error:
            # The frames of a traceback hold the model and what was computed, here and in what the error goes back to.
            error.__traceback__ = error.__cause__ = error.__context__ = None
            job.error = error
            job.end("failed", error=str(error), kind=type(error).__name__)
        else:
            job.end("done")

    def _tell_positions(self) -> None:
        for position, job in enumerate(self.waiting, start=1):
            job.publish("queued", position=position)

    def _forget_old(self) -> None:
        finished = [job for job in self.jobs.values() if job.finished and not job.watched]
        for job in finished[: max(0, len(finished) - KEPT)]:
            del self.jobs[job.id]
