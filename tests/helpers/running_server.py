"""A server in this process: on a real socket, in a thread, with a tiny model or with a function in its place."""

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.client import HTTPConnection, HTTPResponse
from io import BytesIO
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import uvicorn
from PIL import Image

from mos_cli.bundles.bundle import find_bundle
from mos_cli.cli.drawing import log_drawn
from mos_cli.cli.loading import load_with_progress
from mos_cli.cli.output import Report
from mos_cli.config.settings import make_settings, resolve
from mos_cli.inference.requests import recipe_fields
from mos_cli.server.app import make_app
from mos_cli.server.drawing import CheckedRequest, Result, ServedModel
from mos_cli.server.listen import open_socket, url_of
from mos_cli.server.queue import JobQueue, StepLike
from mos_cli.server.state import remove_state, write_state

Draw = Callable[[CheckedRequest, Callable[[StepLike], None]], Result]


@dataclass
class Answer:
    """What a server answered."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def message(self) -> str:
        return self.json["error"]["message"]

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line[6:]) for line in self.body.decode().splitlines() if line.startswith("data: ")]


@dataclass
class RunningServer:
    """A server, and requests to it."""

    url: str
    served: ServedModel
    queue: JobQueue
    loop: asyncio.AbstractEventLoop

    def open(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] = {}
    ) -> tuple[HTTPConnection, HTTPResponse]:
        """Sends a request, JSON unless its body is bytes; the answer is not read yet."""
        address = urlsplit(self.url)
        connection = HTTPConnection(str(address.hostname), address.port or 0, timeout=30)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        own = {} if body is None else {"Content-Type": "application/json"}
        connection.request(method, path, data, own | dict(headers))
        return connection, connection.getresponse()

    def ask(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] = {}) -> Answer:
        connection, answer = self.open(method, path, body, headers)
        try:
            return Answer(answer.status, answer.headers, answer.read())
        finally:
            connection.close()

    def form(self, path: str, *parts: tuple[str, Any]) -> Answer:
        """Sends a form: bytes are files."""
        body = b""
        for name, value in parts:
            disposition = f'Content-Disposition: form-data; name="{name}"'
            if isinstance(value, bytes):
                head = f'{disposition}; filename="../../a.png"\r\nContent-Type: application/octet-stream'
            else:
                head, value = disposition, str(value).encode()
            body += b"--x7x\r\n" + head.encode() + b"\r\n\r\n" + value + b"\r\n"
        headers = {"Content-Type": "multipart/form-data; boundary=x7x"}
        return self.ask("POST", path, body + b"--x7x--\r\n", headers)

    def call(self, function: Callable[[], None]) -> None:
        """Calls a function in the server's event loop."""
        self.loop.call_soon_threadsafe(function)


@contextmanager
def running_server(
    *, draw: Draw | None = None, limit: int = 16, idle: float | None = None, token: str | None = None
) -> Iterator[RunningServer]:
    """Serves the default model of the tests' settings; `--server auto` finds it."""
    asked = resolve(make_settings(model=os.environ["MOS_MODEL"]), None)
    bundle = find_bundle(asked.model)
    fields = recipe_fields(asked, bundle, bundle.index.defaults)
    how: dict[str, Any] = {name: fields[name] for name in ("precision", "quant")}
    served = ServedModel(
        bundle,
        asked,
        asked,
        **how,
        loras=None,
        load=lambda: load_with_progress(bundle, asked, Report(quiet=True), **how),
        log=partial(log_drawn, None),
    )
    queue = JobQueue(draw or served.draw, served.release, limit=limit, idle=idle)
    listening = open_socket("127.0.0.1", 0)
    app = make_app(served, queue, host="127.0.0.1", token=token)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, ws="none"))
    loop = asyncio.new_event_loop()

    def run() -> None:
        loop.run_until_complete(server.serve([listening]))
        loop.close()

    thread = threading.Thread(target=run)
    url = url_of(listening)
    state = write_state(url, token)
    thread.start()
    try:
        until(lambda: server.started)
        yield RunningServer(url, served, queue, loop)
    finally:
        server.should_exit = True
        thread.join()
        remove_state(state)


class Step(NamedTuple):
    index: int
    total: int
    t: float


class Gate:
    """Stands for a model: a picture of three steps is drawn when `open` is set.

    Attributes:
        drawn: the prompts of the pictures that were finished.
    """

    def __init__(self) -> None:
        self.open = threading.Event()
        self.drawn: list[str] = []
        self.begun = 0

    def __call__(self, request: CheckedRequest, on_step) -> Result:
        self.begun += 1
        for index in range(3):
            on_step(Step(index, 3, 1 - index / 3))
            if index == 0:
                while not self.open.wait(0.01):
                    on_step(Step(index, 3, 1.0))
        self.drawn.append(request.recipe.prompt)
        file = BytesIO()
        Image.new("RGB", (32, 32), "teal").save(file, format="PNG")
        return Result({"picture.png": file.getvalue()}, ())


def until(condition: Callable[[], Any]) -> None:
    """Returns when the condition holds; AssertionError if it does not for a minute."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen within a minute")
