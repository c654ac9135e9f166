"""The interface of the server: OpenAI's for pictures, and ours for jobs, traces, replays and `--server`.

GET  /                            the page
GET  /health                      whether it runs
GET  /v1/models                   as OpenAI's
GET  /v1/server                   the model, its settings, the queue
POST /v1/images/generations       as OpenAI's, with the options of `mos generate`
POST /v1/images/edits             as OpenAI's (a form), with the options of `mos edit`
POST /v1/images/replays           a form: a picture is drawn again
POST /v1/draw                     a recipe that a command has made
GET  /v1/jobs, /v1/jobs/ID        what has become of them; DELETE cancels
GET  /v1/jobs/ID/events           server-sent events
GET  /v1/jobs/ID/picture, trace, routes, routing, report, previews
"""

import asyncio
import base64
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from time import time
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mos_cli import __version__
from mos_cli.errors import InputError, MosError, UsageError
from mos_cli.images.companions import ARRAYS_SUFFIX, PREVIEWS_SUFFIX
from mos_cli.server.answers import EventStream, answer_of, error_answer
from mos_cli.server.bodies import (
    MAX_PICTURES,
    Answering,
    DrawBody,
    EditBody,
    GenerationBody,
    ReplayBody,
    Upload,
    check_drawing,
    check_edit,
    check_generation,
    check_replay,
    presets_of_requests,
    read_body,
    read_fields,
)
from mos_cli.server.drawing import NAME, CheckedRequest, Result, ServedModel
from mos_cli.server.guard import Guard
from mos_cli.server.page import page, page_policy
from mos_cli.server.queue import Job, JobQueue
from mos_cli.server.routing import report, routing

MAX_JSON = 2**20
"""Bytes of a request without pictures."""
MAX_FIELDS = 100
MEDIA = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}


def make_app(served: ServedModel, queue: JobQueue, *, host: str, token: str | None) -> Guard:
    """The application; its queue runs as long as it does.

    Args:
        host: where it listens.
        token: what every request needs; None: nothing.
    """

    @asynccontextmanager
    async def running(_app: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(queue.run())
        yield
        queue.stop()
        await task

    server = _Server(served, queue)
    routes = [
        Route("/", server.page),
        Route("/health", server.health),
        Route("/v1/models", server.models),
        Route("/v1/server", server.about),
        Route("/v1/images/generations", server.generations, methods=["POST"]),
        Route("/v1/images/edits", server.edits, methods=["POST"]),
        Route("/v1/images/replays", server.replays, methods=["POST"]),
        Route("/v1/draw", server.draw, methods=["POST"]),
        Route("/v1/jobs", server.jobs),
        Route("/v1/jobs/{id}", server.job, methods=["GET", "DELETE"]),
        Route("/v1/jobs/{id}/events", server.events),
        *(Route(f"/v1/jobs/{{id}}/{what}", server.part, name=what) for what in PARTS),
    ]
    handlers: Any = {HTTPException: _http_error, MosError: _mos_error, Exception: _mos_error}
    return Guard(Starlette(routes=routes, lifespan=running, exception_handlers=handlers), host, token)


async def _http_error(_request: Request, error: HTTPException) -> Response:
    return error_answer(error.status_code, error.detail, headers=error.headers)


async def _mos_error(_request: Request, error: Exception) -> Response:
    return answer_of(error)


class _Server:
    """The handlers of requests."""

    def __init__(self, served: ServedModel, queue: JobQueue) -> None:
        self.served, self.queue = served, queue

    async def page(self, _request: Request) -> Response:
        return Response(page(), media_type="text/html", headers={"Content-Security-Policy": page_policy()})

    async def health(self, _request: Request) -> Response:
        return JSONResponse({"status": "stopping" if self.queue.stopping else "ok"})

    async def models(self, _request: Request) -> Response:
        index = self.served.bundle.index
        model = {"id": self.served.bundle.ref, "object": "model", "created": 0, "owned_by": "mos"}
        return JSONResponse({"object": "list", "data": [model | {"description": index.description}]})

    async def about(self, _request: Request) -> Response:
        served, bundle = self.served, self.served.bundle
        layers, blocks = served.layers_and_blocks
        canvas, defaults = bundle.index.canvas, bundle.index.defaults
        return JSONResponse(
            {
                "version": __version__,
                "model": bundle.ref,
                "model_hash": bundle.hash,
                "description": bundle.index.description,
                "precision": served.precision,
                "quant": served.quant,
                "settings": served.asked,
                "canvas": canvas.model_dump(mode="json"),
                "steps": defaults.steps,
                "cfg": defaults.cfg,
                "edits": None if bundle.index.edits is None else bundle.index.edits.model_dump(mode="json"),
                "layers": layers,
                "blocks": blocks,
                "presets": await run_in_threadpool(presets_of_requests),
                "loaded": served.pipeline is not None,
                "drawing": self.queue.current is not None,
                "waiting": len(self.queue.waiting),
                "queue": self.queue.limit,
            }
        )

    async def generations(self, request: Request) -> Response:
        body = read_body(GenerationBody, await _json(request, MAX_JSON))
        asked = await run_in_threadpool(check_generation, body, self.served)
        return await self._answer(request, body, asked, "image_generation.completed")

    async def edits(self, request: Request) -> Response:
        async with _form(request) as (fields, files):
            pictures = [*files.pop("image", []), *files.pop("reference", [])]
            masks = files.pop("mask", [])
            if not pictures or len(masks) > 1 or files:
                raise UsageError("an edit has an image, may have further ones, and one mask")
            body = read_fields(EditBody, fields)
        asked = await run_in_threadpool(check_edit, body, pictures, masks[0] if masks else None, self.served)
        return await self._answer(request, body, asked, "image_edit.completed")

    async def replays(self, request: Request) -> Response:
        async with _form(request) as (fields, files):
            pictures, inputs, masks = (files.pop(name, []) for name in ("image", "input", "mask"))
            if len(pictures) != 1 or files:
                raise UsageError("a replay has one image, and may have inputs and masks")
            body = read_fields(ReplayBody, fields)
        asked = await run_in_threadpool(check_replay, body, pictures[0], inputs, masks, self.served)
        return await self._answer(request, body, [asked], "image_generation.completed")

    async def draw(self, request: Request) -> Response:
        data = await _json(request, None)
        body = await run_in_threadpool(read_body, DrawBody, data)
        (job,) = self.queue.add([await run_in_threadpool(check_drawing, body, self.served)])
        return self._stream([job], lambda job: {"type": "drawn", "job": job.id, **_drawn(job)})

    async def jobs(self, _request: Request) -> Response:
        return JSONResponse({"jobs": [job.info() for job in self.queue.jobs.values()]})

    async def job(self, request: Request) -> Response:
        job = self._job(request)
        if request.method == "DELETE":
            self.queue.cancel(job)
        return JSONResponse(job.info())

    async def events(self, request: Request) -> Response:
        return EventStream(self._job(request).follow())

    async def part(self, request: Request) -> Response:
        job = self._job(request)
        if job.result is None:
            raise HTTPException(409, f"the job is {job.status}: its picture is not there")
        what = request.url.path.rpartition("/")[2]
        other = request.query_params.get("with")
        results = [job.result]
        if what == "report" and other is not None:
            second = self.queue.jobs.get(other)
            if second is None or second.result is None:
                raise HTTPException(404, "there is no such job, or its picture is not there")
            results.append(second.result)
        return await run_in_threadpool(PARTS[what], results)

    def _job(self, request: Request) -> Job:
        if (job := self.queue.jobs.get(request.path_params["id"])) is None:
            raise HTTPException(404, "there is no such job; the server keeps the last ones only")
        return job

    async def _answer(
        self, request: Request, body: Answering, asked: Sequence[CheckedRequest], completed: str
    ) -> Response:
        jobs = self.queue.add(asked)
        if body.stream:
            return self._stream(jobs, lambda job: {"type": completed, "created_at": int(time()), **_picture(job)})
        if not body.wait:
            return JSONResponse({"jobs": [job.info() for job in jobs]}, 202)
        await self._wait(request, jobs)
        for job in jobs:
            if job.error is not None:
                return answer_of(job.error) if job.status == "failed" else error_answer(503, str(job.error))
        size = "{width}x{height}".format(**asked[0].recipe.model_dump())
        answer = {"created": int(time()), "output_format": body.output_format, "size": size}
        return JSONResponse(answer | {"data": [_picture(job) for job in jobs]})

    def _stream(self, jobs: Sequence[Job], last: Callable[[Job], dict[str, Any]]) -> Response:
        """The events of jobs, one after the other; what is not finished when the client goes is cancelled."""

        async def events() -> AsyncIterator[dict[str, Any]]:
            for job in jobs:
                async for event in job.follow():
                    if event["type"] != "done":
                        yield event
                if job.result is not None:
                    yield await run_in_threadpool(last, job)

        return EventStream(events(), self.queue.watch(jobs))

    async def _wait(self, request: Request, jobs: Sequence[Job]) -> None:
        """Waits for jobs; they are cancelled if the client goes, and if one fails, those after it."""

        async def all_of_them() -> None:
            for job in jobs:
                await job.wait()
                if job.error is not None:
                    return

        tasks = [asyncio.ensure_future(work) for work in (_gone(request), all_of_them())]
        with self.queue.watch(jobs):
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
        if tasks[0].done() and not tasks[0].cancelled() and any(not job.finished for job in jobs):
            raise HTTPException(499, "the client has gone")


def _picture(job: Job) -> dict[str, Any]:
    assert job.result is not None
    data = next(iter(job.result.files.values()))
    recipe = job.request.recipe
    return {"b64_json": _base64(data), "job": job.id, "seed": recipe.seed, "prompt": recipe.prompt}


def _drawn(job: Job) -> dict[str, Any]:
    """All files of a picture, for the command that asked for it; see `client.py`."""
    assert job.result is not None
    files = {name: _base64(data) for name, data in job.result.files.items() if not name.endswith(PREVIEWS_SUFFIX)}
    return {"files": files, "frames": list(map(_base64, job.result.frames))}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _file(suffixes: Sequence[str], media: str) -> Callable[[Sequence[Result]], Response]:
    def answer(results: Sequence[Result]) -> Response:
        for name, data in results[0].files.items():
            if name.removeprefix(f"{NAME}.jpg").removeprefix(f"{NAME}.webp").removeprefix(NAME) in suffixes:
                return Response(data, media_type=media)
        raise HTTPException(404, "it was drawn without")

    return answer


def _picture_file(results: Sequence[Result]) -> Response:
    name, data = next(iter(results[0].files.items()))
    return Response(data, media_type=MEDIA[name.rpartition(".")[2]])


def _report(results: Sequence[Result]) -> Response:
    # The page of a report runs scripts, and prompts of anyone's may be in it: it gets an origin of its own.
    return Response(
        report(results), media_type="text/html", headers={"Content-Security-Policy": "sandbox allow-scripts"}
    )


PARTS: dict[str, Callable[[Sequence[Result]], Response]] = {
    "picture": _picture_file,
    "trace": _file([".json"], "application/json"),
    "routes": _file([ARRAYS_SUFFIX], "application/octet-stream"),
    "previews": _file([PREVIEWS_SUFFIX], "image/webp"),
    "routing": lambda results: JSONResponse(routing(results[0])),
    "report": _report,
}


async def _json(request: Request, most: int | None) -> bytearray:
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "send JSON, with Content-Type: application/json")
    data = bytearray()
    async for part in request.stream():
        data += part
        if most is not None and len(data) > most:
            raise HTTPException(413, f"the request is too large: {most >> 20} MiB at most without pictures")
    return data


@asynccontextmanager
async def _form(request: Request) -> AsyncIterator[tuple[dict[str, list[str]], dict[str, list[Upload]]]]:
    """The text fields and the files of a form, by their names; `image[]` is `image`."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "multipart/form-data":
        raise HTTPException(415, "send a form, with Content-Type: multipart/form-data")
    fields: dict[str, list[str]] = {}
    files: dict[str, list[Upload]] = {}
    async with request.form(max_files=2 * MAX_PICTURES, max_fields=MAX_FIELDS, max_part_size=MAX_JSON) as form:
        for name, value in form.multi_items():
            name = name.removesuffix("[]")
            if isinstance(value, UploadFile):
                files.setdefault(name, []).append(Upload(await value.read(), name))
            else:
                fields.setdefault(name, []).append(value)
        if sum(map(len, files.values())) > MAX_PICTURES:
            raise InputError(f"{MAX_PICTURES} pictures at most")
        yield fields, files


async def _gone(request: Request) -> None:
    """Returns when the client has closed the connection."""
    with suppress(Exception):
        while (await request.receive())["type"] != "http.disconnect":
            pass
