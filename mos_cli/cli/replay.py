"""`mos replay`: the same picture again, from its file alone."""

from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mos_cli.cli.drawing import JobDrawer
from mos_cli.cli.jobs import Job, check_format, group_jobs, make_record_options
from mos_cli.cli.loading import load_route_source
from mos_cli.cli.options import (
    Attention,
    Compile,
    Device,
    EditedPictures,
    Json,
    Log,
    Loras,
    MaxVram,
    Models,
    Offload,
    Output,
    Overwrite,
    Preview,
    PreviewSteps,
    Quiet,
    Regions,
    RouteSource,
    Server,
    Trace,
    Verbose,
    as_text,
)
from mos_cli.cli.output import Report
from mos_cli.cli.redrawing import Redrawer, threads_of
from mos_cli.cli.standard_files import check_one_input, check_output, picture_file
from mos_cli.cli.terminal_pictures import picture_printer
from mos_cli.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

    from mos_cli.config.recipe import PictureRecord

CLOSE_PSNR = 40.0
"""Decibels above which two pictures look the same; bf16 against fp32 lies beyond it, another seed far below."""


def replay(
    context: typer.Context,
    picture: Annotated[Path, typer.Argument(help="A picture made by mos: PNG, JPEG or WebP; - reads it from stdin.")],
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", callback=as_text, help="Change the recipe: seed=7, cfg=4, ..."),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Write nothing; say whether the picture comes out exact, close or different."),
    ] = False,
    source_files: EditedPictures = None,
    mask: Annotated[
        list[Path] | None, typer.Option("--mask", metavar="FILE", help="A mask that an edit was made with; repeatable.")
    ] = None,
    models: Models = None,
    lora: Loras = None,
    route_from: RouteSource = None,
    output: Output = None,
    overwrite: Overwrite = False,
    trace: Trace = None,
    log: Log = None,
    preview: Preview = None,
    regions: Regions = False,
    preview_steps: PreviewSteps = False,
    device: Device = None,
    max_vram: MaxVram = None,
    offload: Offload = None,
    attention: Attention = None,
    compiled: Compile = None,
    server: Server = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make a picture again from the recipe inside it, or a variation of it.

    With --verify the exit code is 0 for exact and close, 1 for different. What an edit was made from is drawn again
    too, if mos made it; other pictures are to be given with --input.
    """
    from mos_cli.bundles.bundle import edit_defaults, find_bundle, find_recorded
    from mos_cli.config.recipe import check_guidance
    from mos_cli.config.settings import check_size, make_settings, resolve
    from mos_cli.images.inputs import Finder
    from mos_cli.images.manifest import Manifest
    from mos_cli.images.naming import naming
    from mos_cli.images.outputs import read_drawing
    from mos_cli.inference.requests import check_recipe, vary_recipe, with_loras

    report = Report(json=json, quiet=quiet, verbose=verbose)
    sources = [
        context.get_parameter_source(name)
        for name in ("output", "trace", "changes", "overwrite", "regions", "preview_steps", "preview")
    ]
    if verify and any(source is not None and source.name == "COMMANDLINE" for source in sources):
        raise UsageError("--verify draws what the picture holds and writes nothing: drop the other options")
    check_one_input(picture, *(source_files or []), *(mask or []))
    image, record = read_drawing(picture_file(picture))
    changed = _changes(changes or [])
    if "model" in changed:
        bundle = find_bundle(changed["model"])
        changed["model"] = bundle.ref
    else:
        otherwise = "name it with --model FOLDER, or draw with another: --set model=NAME"
        bundle = find_recorded(record.recipe.model, record.made.bundle_hash, str(picture), otherwise, models or ())
    if record.recipe.edit is not None:
        edit_defaults(bundle)
    elif source_files or mask:
        raise UsageError(f"{picture} is no edit: drop --input and --mask")
    recipe = vary_recipe(record.recipe, changed)
    guidances = {f"--set {key}": changed.get(key) for key in ("negative", "cfg_interval")}
    check_guidance(recipe.cfg, guidances, 1.0 if recipe.edit is None else recipe.edit.image_cfg)

    flags = make_settings(
        output=output,
        trace=trace,
        log=log,
        preview=preview,
        device=device,
        attention=attention,
        max_vram=max_vram,
        offload=offload,
        server=server,
    )
    settings = resolve(flags, None)
    redrawer = Redrawer(settings, report, compiled=compiled, models=models or (), loras=lora or ())
    # A LoRA that is missing is told before anything is loaded.
    with_loras(settings, recipe, lora or ())
    check_size(*recipe.working_size, bundle.index.canvas)
    record_options = make_record_options(settings.trace, regions=regions, previews=preview_steps)
    check_recipe(recipe, bundle, compiled=redrawer.compiles(record.made), regions=regions, options=record_options)
    routes = load_route_source(picture, recipe, route_from)
    if not verify:
        check_output(settings.output, json=json, trace=trace, regions=regions, previews=preview_steps)
    show = picture_printer(settings.preview and not verify, report)
    names = naming(settings.output, suffix=settings.format, overwrite=overwrite)
    path = None if verify else names.path(recipe)
    pictures, masks = ([picture_file(path) for path in paths or []] for paths in (source_files, mask))
    finder = Finder(pictures, masks, redrawer.redraw)
    finder.check_given(recipe, record.earlier)
    inputs = finder.inputs_of(recipe, record.earlier)
    finder.check_all_used()
    job = None if path is None else Job(recipe, path, names, None if inputs is None else lambda: inputs)
    if job is not None:
        check_format(job.path, recipe, inputs, settings.metadata)
    for note in () if inputs is None else inputs.notes:
        report.note("note", note, note=note)
    pipeline = redrawer.pipeline(bundle, recipe, record.made)
    with threads_of(pipeline, record.made) as follow:
        if job is not None:
            JobDrawer(
                pipeline,
                Manifest(None, resume=False, write=False),
                total=1,
                settings=settings,
                report=report,
                record_options=record_options,
                observers=(follow,),
                route_from=routes,
                show=show,
            ).draw(group_jobs([job]))
            report.times()
            return
        with report.stage("sampling"):
            drawn = pipeline.draw(recipe, [follow], inputs, route_from=routes).image
    report.times()
    _say_verdict(image, drawn, record, report)


def _changes(assignments: list[str]) -> dict[str, str]:
    """Reads KEY=VALUE pairs.

    Raises:
        UsageError: a pair has no key or no equals sign.
    """
    pairs = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not key or not equals:
            raise UsageError(f"--set {assignment}: write KEY=VALUE, for example --set seed=7")
        if key.strip() == "route_from":
            raise UsageError("--set route_from: draw anew with `mos generate --route-from` to follow another run")
        pairs[key.strip()] = value.strip()
    return pairs


def _say_verdict(image: "Image", drawn: "Image", record: "PictureRecord", report: Report) -> None:
    """Says whether a picture, as its file has it, came out exact, close or different (exit code 1)."""
    from mos_cli.config.recipe import pixels_hash
    from mos_cli.images.differences import psnr
    from mos_cli.images.outputs import as_stored, drawn_hash

    if pixels_hash(drawn) == drawn_hash(image, record):
        report.event("verified", "exact", verdict="exact")
        return
    # The loss of the file's format is no difference between the two.
    again = drawn if record.stored is None else as_stored(drawn, record.stored.format)
    alike = (image.size, image.mode) == (again.size, again.mode)
    decibels = psnr(image, again) if alike else 0.0
    verdict = "close" if decibels >= CLOSE_PSNR else "different"
    measured = f"PSNR {decibels:.1f} dB" if isfinite(decibels) else "the same in the file's format"
    number = round(decibels, 2) if isfinite(decibels) else None
    report.event("verified", f"{verdict} ({measured})", verdict=verdict, psnr=number)
    if verdict == "different":
        raise typer.Exit(1)
