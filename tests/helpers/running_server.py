"""A server in this process: on a real socket, in a thread, with a tiny model or with a function in its place."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from typing import Any
from urllib.parse import urlsplit

import uvicorn

from mos_cli.bundles.bundle import find_bundle
from mos_cli.cli.loading import load_with_progress
from mos_cli.cli.output import Report
from mos_cli.config.settings import make_settings, resolve
from mos_cli.inference.requests import recipe_fields
from mos_cli.server.app import make_app
from mos_cli.server.drawing import Plan, Result, ServedModel
from mos_cli.server.listen import open_socket, url_of
from mos_cli.server.queue import JobQueue, StepLike
from mos_cli.server.state import remove_state, write_state

Draw = Callable[[Plan, Callable[[StepLike], None]], Result]


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
    uvicorn: uvicorn.Server

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

    def stop(self) -> None:
        """As a signal does."""
        self.uvicorn.should_exit = True


@contextmanager
def running_server(
    *, draw: Draw | None = None, limit: int = 16, idle: float | None = None, token: str | None = None
) -> Iterator[RunningServer]:
    """Serves the default model of the tests' settings; `--server auto` finds it."""
    asked = resolve(make_settings(model=None), None)
    import os

    asked = asked.model_copy(update={"model": os.environ["MOS_MODEL"]})
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
    )
    queue = JobQueue(draw or served.draw, served.release, limit=limit, idle=idle)
    listening = open_socket("127.0.0.1", 0)
    app = make_app(served, queue, host="127.0.0.1", token=token)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, ws="none"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
    url = url_of(listening)
    state = write_state(url, token)
    thread.start()
    try:
        until(lambda: server.started)
        yield RunningServer(url, served, queue, server)
    finally:
        server.should_exit = True
        thread.join()
        remove_state(state)


def until(condition: Callable[[], Any]) -> None:
    """Returns when the condition holds; AssertionError if it does not for a minute."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen within a minute")
