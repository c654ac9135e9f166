"""`mos serve`: a server that keeps the model loaded."""

from typing import TYPE_CHECKING, Annotated

import typer

from mos_cli.cli.drawing import log_drawn
from mos_cli.cli.loading import fit_to_memory, load_with_progress
from mos_cli.cli.options import (
    Attention,
    Compile,
    Device,
    Log,
    Lora,
    MaxVram,
    Model,
    Offload,
    Precision,
    Quant,
    Quiet,
    as_text,
)
from mos_cli.cli.output import Report
from mos_cli.errors import UsageError
from mos_cli.utils.extras import require

if TYPE_CHECKING:
    from mos_cli.config.recipe import Recipe
    from mos_cli.inference.pipeline import MoSPipeline

PORT = 8017


def serve(
    model: Model = None,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Where to listen; other than loopback needs --token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")] = PORT,
    token: Annotated[
        str | None,
        typer.Option(
            "--token",
            envvar="MOS_TOKEN",
            metavar="TEXT",
            callback=as_text,
            help="What every request must send, as Authorization: Bearer TEXT.",
            show_default="none",
        ),
    ] = None,
    queue: Annotated[
        int, typer.Option("--queue", min=1, max=10_000, help="Pictures that may wait; more are refused (429).")
    ] = 16,
    idle: Annotated[
        float,
        typer.Option(
            "--idle",
            min=0,
            metavar="SECONDS",
            help="Release the memory of the model after this time without a picture; 0: never.",
        ),
    ] = 900,
    lora: Lora = None,
    device: Device = None,
    precision: Precision = None,
    quant: Quant = None,
    max_vram: MaxVram = None,
    offload: Offload = None,
    attention: Attention = None,
    compiled: Compile = None,
    log: Log = None,
    quiet: Quiet = False,
) -> None:
    """Serve pictures over HTTP, with the model kept loaded. It has a page for a browser and OpenAI's interface.

    `mos generate --server auto` draws with it. Ctrl-C finishes the current picture and stops.
    """
    require("mos serve", "serve", "starlette", "uvicorn", "python_multipart")
    from mos_cli.server.guard import is_loopback

    if not is_loopback(host) and not token:
        raise UsageError(f"--host {host}: others reach the server there, set a --token; or leave --host out")
    if token is not None and (not token.isascii() or not token.isprintable() or " " in token or not token):
        raise UsageError("--token: write printable ASCII characters without spaces")
    from mos_cli.bundles.bundle import find_bundle
    from mos_cli.config.settings import make_settings, resolve
    from mos_cli.inference.requests import recipe_fields
    from mos_cli.server.app import make_app
    from mos_cli.server.drawing import ServedModel
    from mos_cli.server.listen import open_socket, url_of
    from mos_cli.server.listen import serve as listen
    from mos_cli.server.queue import JobQueue
    from mos_cli.server.state import remove_state, write_state

    report = Report(quiet=quiet)
    flags = make_settings(
        model=model,
        device=device,
        precision=precision,
        quant=quant,
        max_vram=max_vram,
        offload=offload,
        attention=attention,
        compile=compiled,
        log=log,
        loras=lora or None,
    )
    asked = resolve(flags, None)
    bundle = find_bundle(asked.model)
    listening = open_socket(host, port)
    references = 0 if bundle.index.edits is None else 1
    settings = fit_to_memory(bundle, asked, bundle.index.canvas.native, report, references=references)
    fields = recipe_fields(settings, bundle, bundle.index.defaults)

    logs = asked.log

    def log_served(recipe: "Recipe") -> None:
        nonlocal logs
        if logs:
            logs = log_drawn(None, recipe)

    def load() -> "MoSPipeline":
        return load_with_progress(bundle, settings, report, precision=fields["precision"], quant=fields["quant"])

    served = ServedModel(
        bundle,
        settings,
        asked,
        precision=fields["precision"],
        quant=fields["quant"],
        loras=fields["loras"],
        load=load,
        log=log_served,
    )
    jobs = JobQueue(served.draw, served.release, limit=queue, idle=idle or None)
    # What is wrong with the model is told before anyone asks for a picture.
    jobs.thread.submit(served.load).result()
    url = url_of(listening)
    state = write_state(url, token)
    try:
        report.event("serving", f"{bundle.ref} is served at {url}/ (Ctrl-C stops)")
        listen(
            make_app(served, jobs, host=host, token=token),
            jobs,
            listening,
            lambda: report.note("stopping", "stopping; Ctrl-C again cancels the current picture"),
        )
    finally:
        remove_state(state)
