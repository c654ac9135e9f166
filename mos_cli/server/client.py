"""A pipeline whose pictures a running server draws: `draw` takes and gives what that of `MoSPipeline` does.

The command makes the recipe, and writes the files: a server only draws. Imports no torch, and of HTTP the standard
library alone, since a command with a server should start at once.
"""

import base64
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException, HTTPResponse
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from mos_cli import errors
from mos_cli.config.recipe import Recipe, ThreadChanges
from mos_cli.config.settings import OF_LOADED, RunSettings
from mos_cli.errors import InputError, ModelError, MosError, UsageError
from mos_cli.images.companions import companions
from mos_cli.images.inputs import Inputs
from mos_cli.images.outputs import png, read_drawing
from mos_cli.inference.drawing import Drawing
from mos_cli.routing.trace import Recording, RecordOptions, Trace, read_routes, trace_files
from mos_cli.server.state import read_state
from mos_cli.utils.threads import THREAD_VARIABLES

if TYPE_CHECKING:
    from mos_cli.bundles.bundle import Bundle
    from mos_cli.config.recipe import LoraRecipe

QUIET = 60.0
"""Seconds without a word of the server after which it counts as gone; it sends an empty line every ten."""
PICTURE = "picture.png"
"""The name of the picture in an answer."""
ANSWER = 5.0
"""Seconds in which it says what it draws with."""


class RemoteStep(NamedTuple):
    """What is told of a step."""

    index: int
    total: int
    t: float


def find_server(
    server: str,
    settings: RunSettings,
    bundle: "Bundle",
    loras: "tuple[LoraRecipe, ...] | None",
    recipe: Recipe | None = None,
) -> "tuple[RemotePipeline | None, str | None]":
    """The server that a run draws with, and a note on why that which runs is not taken.

    Args:
        server: "off", "auto" (one of this user's that runs, with this model and these settings), or a URL.
        recipe: that of a picture which is drawn again, in the precision and the quantisation that it has.

    Raises:
        UsageError: it is none of these; or the server that is named draws with other settings or another model.
        ModelError: the server that is named cannot be reached.
    """
    if server == "off":
        return None, None
    state = read_state()
    if server == "auto":
        if state is None:
            return None, None
        try:
            pipeline = RemotePipeline(state.url, state.token)
        except ModelError:
            return None, None
        different = pipeline.difference(settings, bundle, loras, recipe)
        return (None, f"the server at {state.url} has {different}: drawn without it") if different else (pipeline, None)
    if not server.startswith("http://"):
        raise UsageError(f"--server {server}: write auto, off or http://ADDRESS:PORT")
    url = server.rstrip("/")
    token = state.token if state is not None and state.url == url else os.environ.get("MOS_TOKEN")
    pipeline = RemotePipeline(url, token)
    if different := pipeline.difference(settings, bundle, loras, recipe):
        raise UsageError(f"the server at {url} has {different}: start it with the options of this run, or --server off")
    return pipeline, None


class RemotePipeline:
    """A server's pipeline.

    Raises:
        ModelError: it cannot be reached, or does not answer as a server of mos.
        UsageError: the token is missing or another.
    """

    compiled = False
    graphs = None

    def __init__(self, url: str, token: str | None) -> None:
        self.url = url
        self._threads: tuple[int | None, ThreadChanges | None] = _threads(), None
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        with_answer = self._request("GET", "/v1/server", None, ANSWER)
        try:
            self.about = json.loads(with_answer.read())
            self.precision, self.quant = self.about["precision"], self.about["quant"]
        except (ValueError, KeyError, TypeError, OSError, HTTPException):
            raise ModelError(f"what answers at {url} is no server of mos: give another --server") from None

    def difference(
        self,
        settings: RunSettings,
        bundle: "Bundle",
        loras: "tuple[LoraRecipe, ...] | None",
        recipe: Recipe | None = None,
    ) -> str | None:
        """What the server draws with that a run would not; None if their pictures are the same."""
        from mos_cli import __version__

        if settings.batch_size != 1:
            return "no batches"
        if self.about["version"] != __version__:
            return f"version {self.about['version']} of mos, and this is {__version__}"
        if self.about["model_hash"] != bundle.hash:
            return f"the model {self.about['model']}, and this run {bundle.ref} or another version"
        wanted = settings.model_dump(mode="json", include=set(OF_LOADED) - {"loras"})
        wanted["loras"] = [lora.model_dump(mode="json") for lora in loras or ()]
        has = dict(self.about["settings"])
        if recipe is not None:
            wanted |= {"precision": recipe.precision, "quant": recipe.quant}
            has |= {"precision": self.precision, "quant": self.quant}
        other = [name for name, value in wanted.items() if has.get(name) != value]
        return f"another {other[0]}" if other else None

    def adopt(self, settings: RunSettings) -> RunSettings:
        """The settings with those that the server has chosen: the precision, and the quantisation that fits."""
        return settings.model_copy(update={"precision": self.precision, "quant": self.quant or "none"})

    @contextmanager
    def cpu_threads(self, count: int | None, changes: ThreadChanges | None) -> Iterator[Callable[[Any], None]]:
        """As `mos_cli.utils.threads.cpu_threads`, for what the server draws."""
        before, self._threads = self._threads, (count or self._threads[0], changes)
        try:
            yield lambda step: None
        finally:
            self._threads = before

    def encode_ahead(self, recipes: Sequence[Recipe]) -> None:
        """Does nothing: the server encodes a prompt when it draws."""

    def draw(
        self,
        recipe: Recipe,
        observers: Sequence[Any] = (),
        inputs: Inputs | None = None,
        *,
        record_options: RecordOptions = RecordOptions(),
        route_from: Recording | None = None,
    ) -> Drawing:
        """Draws one picture. Where the connection is closed before its end, the server stops after its step.

        Raises:
            MosError: as `MoSPipeline.draw` does.
            ModelError: the server is gone.
        """
        # What a picture is expanded by is in the recipe, and is the mask.
        mask = None if inputs is None or inputs.before is not None else inputs.mask
        body = {
            "recipe": recipe.model_dump(mode="json", exclude_none=True),
            "model_hash": self.about["model_hash"],
            **vars(record_options),
            "threads": self._threads[0],
            "thread_changes": self._threads[1],
            "pictures": [_base64(png(image, None)) for image in (() if inputs is None else inputs.sources)],
            "mask": None if mask is None else _base64(png(mask, None)),
            "earlier": [one.model_dump(mode="json", exclude_none=True) for one in (inputs.earlier if inputs else ())],
            "route_from": None if route_from is None else _trace_body(route_from),
        }
        answer = self._request("POST", "/v1/draw", json.dumps(body).encode(), QUIET)
        try:
            for event in _events(answer):
                kind = event["type"]
                if kind == "step":
                    step = RemoteStep(event["step"] - 1, event["steps"], event["t"])
                    for observe in observers:
                        observe(step)
                elif kind == "drawn":
                    return self._drawing(event)
                elif kind in ("failed", "cancelled"):
                    raise _error(event.get("kind"), event["error"])
        except (OSError, ValueError, KeyError, HTTPException):
            pass
        finally:
            answer.close()
        raise self._gone()

    def _drawing(self, event: dict[str, Any]) -> Drawing:
        """The picture of an event; raises ModelError if it is none."""
        try:
            return read_answer(event)
        except InputError:
            raise ModelError(f"what the server at {self.url} answers is damaged: restart it") from None

    def _request(self, method: str, path: str, body: bytes | None, timeout: float) -> HTTPResponse:
        """The answer to a request; one that is refused because the queue is full is sent again."""
        headers = self._headers | ({} if body is None else {"Content-Type": "application/json"})
        while True:
            try:
                address = urlsplit(self.url)
                connection = HTTPConnection(address.hostname or "", address.port or 80, timeout=timeout)
                # One connection for an answer: closing it says that the picture is not wanted any more.
                connection.request(method, path, body, headers | {"Connection": "close"})
                answer = connection.getresponse()
                if answer.status == 200:
                    return answer
                told = answer.read(2**20)
            except (OSError, ValueError, HTTPException):
                raise self._gone() from None
            if answer.status == 429:
                time.sleep(1)
                continue
            if answer.status == 401:
                raise UsageError(f"the server at {self.url} needs its token: set MOS_TOKEN")
            try:
                error = json.loads(told)["error"]
                raise _error(error["code"], error["message"])
            except (ValueError, KeyError, TypeError):
                raise ModelError(f"what answers at {self.url} is no server of mos: give another --server") from None

    def _gone(self) -> ModelError:
        return ModelError(f"the server at {self.url} does not answer: start mos serve, or pass --server off")


def _events(answer: HTTPResponse) -> Iterator[dict[str, Any]]:
    """The data of server-sent events."""
    while line := answer.readline():
        if line.startswith(b"data: "):
            yield json.loads(line[6:])


def read_answer(event: dict[str, Any]) -> Drawing:
    """The picture of an answer, as it was before it was written to the files that the answer has.

    Raises:
        InputError, ValueError, KeyError: it is damaged.
    """
    from PIL import Image

    files = {name: base64.b64decode(data) for name, data in event["files"].items()}
    beside = companions(Path(PICTURE))
    image, record = read_drawing(BytesIO(files[PICTURE]))
    trace = Trace.model_validate_json(files[beside.head.name])
    routes = read_routes(trace, files[beside.arrays.name], "the answer", "its trace")
    frames: list[Image.Image] = []
    for frame in event["frames"]:
        with Image.open(BytesIO(base64.b64decode(frame)), formats=["PNG"]) as opened:
            opened.load()
            frames.append(opened)
    return Drawing(image, record, trace.model_copy(update={"arrays": None}), routes, tuple(frames))


def _error(kind: str | None, message: str) -> MosError:
    """The error that the server has told of."""
    found = getattr(errors, kind or "", None)
    return found(message) if isinstance(found, type) and issubclass(found, MosError) else ModelError(message)


def _trace_body(recording: Recording) -> dict[str, Any]:
    files = trace_files(recording.trace.model_copy(update={"arrays": None}), recording.routes, Path("other.png"))
    head, arrays = files.values()
    return {"head": json.loads(head), "arrays": _base64(arrays)}


def _threads() -> int | None:
    """The number of CPU threads that the user has set; without one the server takes as many as are free."""
    given = next((os.environ[name] for name in THREAD_VARIABLES if name in os.environ), "")
    return int(given) if given.isdecimal() and int(given) > 0 else None


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
