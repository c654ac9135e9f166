"""`mos generate`: from words to pictures and routing traces."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mos_cli.cli.drawing import Job, Report, draw_jobs, load_pipeline
from mos_cli.cli.options import Device, Json, Output, Overwrite, Quiet, Trace, Verbose
from mos_cli.errors import InputError, UsageError

if TYPE_CHECKING:
    from mos_cli.runtime.bundles import Bundle
    from mos_cli.runtime.outputs import Naming
    from mos_cli.runtime.settings import RunSettings


def generate(
    prompt: Annotated[
        str, typer.Argument(help="What to draw; - reads prompts from stdin, @FILE from a file, a line each.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            envvar="MOS_MODEL",
            help="Bundle: name, path or hub id.",
            show_default="emoji-nano",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option("--preset", "-p", envvar="MOS_PRESET", help="Named settings; see `mos presets ls`."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", "-s", envvar="MOS_SEED", help="Seed of the first picture.", show_default="random"),
    ] = None,
    count: Annotated[
        int, typer.Option("--count", "-n", min=1, max=10_000, help="Pictures per prompt; seeds count up.")
    ] = 1,
    steps: Annotated[
        int | None, typer.Option(envvar="MOS_STEPS", help="Denoising steps.", show_default="the model's")
    ] = None,
    cfg: Annotated[
        float | None,
        typer.Option(envvar="MOS_CFG", help="Guidance scale; 1 turns it off.", show_default="the model's"),
    ] = None,
    cfg_interval: Annotated[
        str | None,
        typer.Option(
            envvar="MOS_CFG_INTERVAL",
            metavar="LOW,HIGH",
            help="Times at which guidance acts; 1 is noise, 0 the picture.",
            show_default="the model's",
        ),
    ] = None,
    negative: Annotated[
        str | None, typer.Option(envvar="MOS_NEGATIVE", metavar="TEXT", help="What guidance leads away from.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(envvar="MOS_SIZE", metavar="SIZE", help="64, 96x64 or 3:2.", show_default="the model's"),
    ] = None,
    output: Output = None,
    overwrite: Overwrite = False,
    trace: Trace = None,
    device: Device = None,
    precision: Annotated[
        str | None,
        typer.Option(envvar="MOS_PRECISION", help="auto, bf16 or fp32.", show_default="auto", metavar="PRECISION"),
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Also write one sheet of all pictures with their prompts.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be drawn and where; load no weights, write nothing.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Draw pictures from a prompt, each with its recipe inside and its routing trace beside it."""
    from mos_cli.runtime.bundles import find_bundle
    from mos_cli.runtime.outputs import naming
    from mos_cli.runtime.settings import make_settings, resolve

    report = Report(json=json, quiet=quiet, verbose=verbose)
    prompts = _prompts(prompt)
    flags = make_settings(
        model=model,
        steps=steps,
        cfg=cfg,
        cfg_interval=cfg_interval,
        negative=negative,
        size=size,
        output=output,
        trace=trace,
        device=device,
        precision=precision,
    )
    settings = resolve(flags, preset)
    names = naming(settings.output, overwrite=overwrite)
    bundle = find_bundle(settings.model)
    first_seed = int.from_bytes(os.urandom(4)) if seed is None else seed
    jobs: list[Job] = []
    with report.stage("libraries"):
        common = shared_fields(settings, bundle)
    from mos_cli.runtime.recipe import check_guidance, make_recipe

    check_guidance(common["cfg"], {"--negative": settings.negative, "--cfg-interval": flags.cfg_interval})
    for text in prompts:
        for index in range(count):
            recipe = make_recipe(prompt=text, seed=first_seed + index, **common)
            jobs.append(Job(recipe, names.path(recipe)))
    if sheet is not None:
        _check_sheet(sheet, names)

    if dry_run:
        for job in jobs:
            report.event(
                "would draw",
                f"{job.path}  {job.recipe!r}",
                path=str(job.path),
                recipe=job.recipe.model_dump(),
            )
        report.times()
        return
    pipeline = load_pipeline(bundle, device=settings.device, precision=common["precision"], report=report)
    draw_jobs(pipeline, jobs, trace=settings.trace, overwrite=overwrite, report=report, sheet=sheet)


def _check_sheet(sheet: Path, names: "Naming") -> None:
    """Raises UsageError or InputError if the sheet cannot be written under its name; better now than at the end."""
    from mos_cli.runtime.files import refuse_existing

    if sheet.suffix.lower() != ".png" or sheet in names.given:
        raise UsageError(f"--sheet {sheet}: name a .png of its own")
    refuse_existing(sheet, names.overwrite)


def _prompts(argument: str) -> list[str]:
    """The prompts asked for: one, or the non-empty lines of stdin or a file."""
    if argument == "-":
        lines = _lines(sys.stdin.buffer.read(), "stdin")
    elif argument.startswith("@"):
        lines = _lines(Path(argument[1:]).read_bytes(), argument[1:])
    else:
        lines = [argument]
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError('the prompt is empty: say what to draw, for example: mos generate "a red apple"')
    return prompts


def _lines(data: bytes, source: str) -> list[str]:
    try:
        return data.decode("utf-8").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"the prompts from {source} are not UTF-8 text") from None


def shared_fields(settings: "RunSettings", bundle: "Bundle") -> dict[str, Any]:
    """The settings all pictures of a run share; what nobody set comes from the bundle."""
    from mos_cli.runtime.devices import choose_device, choose_precision
    from mos_cli.runtime.settings import parse_size

    defaults = bundle.index.defaults
    width, height = parse_size(settings.size, bundle.index.canvas)
    precision = settings.precision
    if precision == "auto":
        precision = choose_precision(choose_device(settings.device))
    return {
        "model": bundle.ref,
        "negative": settings.negative,
        "steps": settings.steps or defaults.steps,
        "cfg": defaults.cfg if settings.cfg is None else settings.cfg,
        "cfg_interval": settings.cfg_interval or defaults.cfg_interval,
        "width": width,
        "height": height,
        "precision": precision,
    }
