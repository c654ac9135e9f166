"""`mos edit`: from a picture and an instruction to another picture, and its routing trace."""

from pathlib import Path
from typing import Annotated

import typer

from mos_cli.cli.jobs import (
    check_sheet,
    draw_jobs,
    make_jobs,
    make_record_options,
    parse_percent,
    print_jobs,
    read_prompts,
)
from mos_cli.cli.loading import fit_to_memory, load_with_progress
from mos_cli.cli.options import DrawOptions, as_text, with_draw_options
from mos_cli.cli.output import Report
from mos_cli.cli.standard_files import check_one_input, picture_file
from mos_cli.errors import UsageError


@with_draw_options
def edit(
    picture: Annotated[
        Path,
        typer.Argument(
            help="The picture to edit, of any size: PNG, JPEG, WebP, AVIF, GIF, TIFF or BMP; - reads it from stdin."
        ),
    ],
    instruction: Annotated[
        str,
        typer.Argument(
            callback=as_text, help="What to change; - reads instructions from stdin, @FILE from a file, a line each."
        ),
    ],
    reference: Annotated[
        list[Path] | None,
        typer.Option("--reference", "-r", metavar="FILE", help="A further picture to draw from; repeatable."),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option("--mask", metavar="FILE", help="White may change; what is black stays bit for bit."),
    ] = None,
    invert_mask: Annotated[bool, typer.Option("--invert-mask", help="Black may change instead.")] = False,
    feather: Annotated[float, typer.Option("--feather", min=0, help="Pixels over which the mask fades inwards.")] = 0.0,
    composite: Annotated[
        bool,
        typer.Option("--composite", help="Without a mask: keep bit for bit what the edit did not visibly change."),
    ] = False,
    keep_alpha: Annotated[
        bool, typer.Option("--keep-alpha", help="Make the result as transparent as the picture; else it is opaque.")
    ] = False,
    strength: Annotated[
        float,
        typer.Option("--strength", help="How far to go back to noise: 1 redraws everything, 0.5 keeps the layout."),
    ] = 1.0,
    image_cfg: Annotated[
        float | None,
        typer.Option(
            "--image-cfg", envvar="MOS_IMAGE_CFG", help="Guidance towards the picture.", show_default="the model's"
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            metavar="SIZE",
            help="Size of the result, the picture in its middle: 64, 96x64 or 3:2.",
            show_default="the picture's own",
        ),
    ] = None,
    max_pixels: Annotated[
        int | None,
        typer.Option(
            "--max-pixels",
            min=1,
            help="Most pixels that the model works on.",
            show_default="the model's own size",
        ),
    ] = None,
    strip: Annotated[
        Path | None,
        typer.Option("--strip", metavar="PNG", help="Also write before, after and their difference side by side."),
    ] = None,
    *,
    options: DrawOptions,
) -> None:
    """Change a picture as an instruction says. The result is as large as the picture, and holds its recipe.

    Editing a picture that mos made keeps its history: mos replay can draw the whole chain again.
    """
    from mos_cli.bundles.bundle import edit_defaults, find_bundle
    from mos_cli.config.settings import resolve
    from mos_cli.images.inputs import read_inputs
    from mos_cli.images.naming import naming
    from mos_cli.inference.requests import EditRequest, check_device, check_recipe, edit_fields, route_source
    from mos_cli.utils.threads import AdaptiveThreads

    report = Report(json=options.json, quiet=options.quiet, verbose=options.verbose)
    check_one_input(picture, instruction, mask, *(reference or []))
    instructions = read_prompts(instruction, 'what to change, for example: mos edit cat.png "make it blue"')
    flags = options.settings(image_cfg=image_cfg)
    settings = resolve(flags, options.preset)
    record_options = make_record_options(settings.trace, regions=options.regions, previews=options.preview_steps)
    request = EditRequest(
        size=size,
        max_pixels=max_pixels,
        mask=None if mask is None else picture_file(mask),
        invert_mask=invert_mask,
        feather=feather,
        composite=composite,
        keep_alpha=keep_alpha,
        strength=strength,
        image_cfg=settings.image_cfg,
    )
    options.check_output(settings.output)
    names = naming(settings.output, suffix=settings.format, overwrite=options.overwrite)
    bundle = find_bundle(settings.model)
    edit_defaults(bundle)
    if strip is not None and (options.count > 1 or len(instructions) > 1):
        raise UsageError("--strip shows one edit: leave it out, or draw one picture")
    inputs = request.with_mask(read_inputs([picture_file(path) for path in (picture, *(reference or []))]))
    for note in inputs.notes:
        report.note("note", note, note=note)
    canvas = request.working_size(inputs, bundle.index.canvas)
    references = len(inputs.pictures)
    settings = fit_to_memory(bundle, settings, canvas, report, fetch=not options.dry_run, references=references)
    with report.stage("libraries"):
        fields = edit_fields(settings, bundle, request, inputs, cfg_interval=flags.cfg_interval)
    if lost := request.lost(inputs, (fields["width"], fields["height"])):
        report.note("note", lost, note=lost)
    recording, fields["route_from"] = route_source(options.route_from, parse_percent(options.route_until), bundle)
    jobs = make_jobs(
        instructions, names, fields, seed=settings.seed, count=options.count, metadata=settings.metadata, inputs=inputs
    )
    check_recipe(jobs[0].recipe, bundle, compiled=settings.compile, regions=options.regions, options=record_options)
    check_device(settings, jobs[0].recipe, bundle)
    for option, sheet in {"--strip": strip, "--sheet": options.sheet}.items():
        if sheet is not None:
            check_sheet(option, sheet, names, options.overwrite)
    if options.dry_run:
        print_jobs(jobs, bundle, settings, report)
        return
    adapt_threads = AdaptiveThreads()
    pipeline = load_with_progress(bundle, settings, report, precision=fields["precision"], quant=fields["quant"])
    adapt_threads()
    draw_jobs(
        pipeline,
        jobs,
        names,
        trace=settings.trace,
        metadata=settings.metadata,
        overwrite=options.overwrite,
        report=report,
        record_options=record_options,
        # Blocks are compiled for a number of threads.
        observers=() if pipeline.compiled else (adapt_threads,),
        route_from=recording,
        sheet=options.sheet,
        strip=strip,
    )
