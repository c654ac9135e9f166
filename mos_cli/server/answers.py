"""Answers of the server: errors in the form of OpenAI's interface, and server-sent events."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from mos_cli.errors import DeviceError, InputError, MemoryLimitError, ModelError, MosError, UsageError
from mos_cli.server.drawing import NotServedError
from mos_cli.server.queue import QueueFullError, StoppingError

KEEP_ALIVE = 10.0
"""Seconds after which an empty line is sent where nothing happens: a client knows that the server is there."""
_STATUS: dict[type[Exception], int] = {
    UsageError: 400,
    InputError: 400,
    ModelError: 400,
    NotServedError: 409,
    QueueFullError: 429,
    StoppingError: 503,
    MemoryLimitError: 503,
    DeviceError: 503,
}


def error_answer(
    status: int, message: str, *, kind: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """An error; `kind` is the name of its class, where it is one of this package."""
    group = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(status)
    group = group or ("invalid_request_error" if status < 500 else "server_error")
    error = {"message": message, "type": group, "param": None, "code": kind}
    return JSONResponse({"error": error}, status, headers)


def answer_of(error: Exception) -> JSONResponse:
    """The answer for an error of this package, or for one that should not be."""
    if not isinstance(error, MosError):
        return error_answer(500, f"the server failed: {type(error).__name__}")
    status = _STATUS.get(type(error), 500)
    headers = {"Retry-After": "1"} if status == 429 else None
    return error_answer(status, str(error), kind=type(error).__name__, headers=headers)


class EventStream(StreamingResponse):
    """Server-sent events.

    Args:
        context: entered before the first is sent, left when the last is sent or the client has gone.
    """

    def __init__(self, events: AsyncIterator[dict[str, Any]], context: AbstractContextManager = nullcontext()) -> None:
        super().__init__(_lines(events), media_type="text/event-stream")
        self._context = context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Not in the generator of the lines: it does not run where the client has gone before the first.
        with self._context:
            await super().__call__(scope, receive, send)


async def _lines(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    following = asyncio.ensure_future(anext(events, None))
    try:
        while True:
            done, _ = await asyncio.wait({following}, timeout=KEEP_ALIVE)
            if not done:
                yield ": waiting\n\n"
                continue
            event = following.result()
            if event is None:
                return
            yield f"event: {event['type']}\ndata: {json.dumps(event)}\n\n"
            following = asyncio.ensure_future(anext(events, None))
    finally:
        following.cancel()
