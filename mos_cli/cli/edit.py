"""`mos edit`: from a picture and an instruction to another picture, and its routing trace."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from mos_cli.cli.asked import (
    check_recipe,
    check_sheet,
    make_jobs,
    make_record_options,
    read_prompts,
    route_source,
    say_what_would_be_drawn,
    shared_fields,
)
from mos_cli.cli.drawing import Report, draw_jobs
from mos_cli.cli.loading import fit_to_card, load_pipeline
from mos_cli.cli.options import (
    Attention,
    Cfg,
    CfgInterval,
    Compile,
    Count,
    Device,
    DryRun,
    FeatureCache,
    Json,
    MaxVram,
    Model,
    Negative,
    Offload,
    Output,
    Overwrite,
    Precision,
    Preset,
    PreviewSteps,
    Quant,
    Quiet,
    Regions,
    Route,
    RouteFrom,
    RouteUntil,
    Seed,
    Sheet,
    Solver,
    Steps,
    Trace,
    Verbose,
)
from mos_cli.errors import UsageError


def edit(
    picture: Annotated[Path, typer.Argument(help="The picture to edit: PNG, JPEG or WebP, of any size.")],
    instruction: Annotated[
        str, typer.Argument(help="What to change; - reads instructions from stdin, @FILE from a file, a line each.")
    ],
    reference: Annotated[
        list[Path] | None,
        typer.Option("--reference", "-r", metavar="FILE", help="A further picture to draw from; repeatable."),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="White may change; what is black stays bit for bit."),
    ] = None,
    invert_mask: Annotated[bool, typer.Option("--invert-mask", help="Black may change instead.")] = False,
    feather: Annotated[float, typer.Option(min=0, help="Fade the mask inwards, over so many pixels.")] = 0.0,
    composite: Annotated[
        bool,
        typer.Option("--composite", help="Without a mask: keep bit for bit what the edit did not visibly change."),
    ] = False,
    strength: Annotated[
        float, typer.Option(help="How far to go back to noise: 1 redraws everything, 0.5 keeps the layout.")
    ] = 1.0,
    image_cfg: Annotated[
        float | None,
        typer.Option(envvar="MOS_IMAGE_CFG", help="Guidance towards the picture.", show_default="the model's"),
    ] = None,
    model: Model = None,
    preset: Preset = None,
    seed: Seed = None,
    count: Count = 1,
    steps: Steps = None,
    solver: Solver = None,
    cfg: Cfg = None,
    cfg_interval: CfgInterval = None,
    negative: Negative = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Size of the result, the picture in its middle: 64, 96x64 or 3:2.",
            show_default="the picture's own",
        ),
    ] = None,
    max_pixels: Annotated[
        int | None,
        typer.Option(min=1, help="Let the model work on so many pixels at most.", show_default="the model's own size"),
    ] = None,
    output: Output = None,
    overwrite: Overwrite = False,
    trace: Trace = None,
    route: Route = None,
    route_from: RouteFrom = None,
    route_until: RouteUntil = None,
    regions: Regions = False,
    preview_steps: PreviewSteps = False,
    device: Device = None,
    precision: Precision = None,
    quant: Quant = None,
    feature_cache: FeatureCache = None,
    max_vram: MaxVram = None,
    offload: Offload = None,
    attention: Attention = None,
    compiled: Compile = None,
    strip: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Also write before, after and their difference side by side.")
    ] = None,
    sheet: Sheet = None,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Change a picture as an instruction says. The result is as large as the picture, and holds its recipe.

    Editing a picture that mos made keeps its history: mos replay can draw the whole chain again.
    """
    from mos_cli.bundles.bundle import edits_of, find_bundle
    from mos_cli.config.settings import make_settings, parse_size, resolve
    from mos_cli.images.outputs import naming

    report = Report(json=json, quiet=quiet, verbose=verbose)
    instructions = read_prompts(instruction, 'what to change, for example: mos edit cat.png "make it blue"')
    flags = make_settings(
        model=model,
        steps=steps,
        solver=solver,
        cfg=cfg,
        cfg_interval=cfg_interval,
        negative=negative,
        output=output,
        trace=trace,
        routes=route or None,
        device=device,
        precision=precision,
        quant=quant,
        feature_cache=feature_cache,
        max_vram=max_vram,
        offload=offload,
        attention=attention,
        compile=compiled,
    )
    settings = resolve(flags, preset)
    record_options = make_record_options(settings.trace, regions=regions, previews=preview_steps)
    if size is not None and max_pixels is not None:
        raise UsageError("--size and --max-pixels exclude each other: choose one")
    if mask is None and (invert_mask or feather):
        raise UsageError("--invert-mask and --feather say what to do with a --mask: name one")
    if mask is not None and composite:
        raise UsageError("--composite is for edits without a mask: with one, what it leaves out is kept in any case")
    names = naming(settings.output, overwrite=overwrite)
    bundle = find_bundle(settings.model)
    defaults = edits_of(bundle)
    if strip is not None and (count > 1 or len(instructions) > 1):
        raise UsageError("--strip shows one edit: leave it out, or ask for one picture")
    from mos_cli.config.recipe import MaskRecipe, check_guidance, pixels_hash
    from mos_cli.images.inputs import describe_edit, read_inputs
    from mos_cli.images.masks import read_mask
    from mos_cli.images.pictures import working_size

    inputs = read_inputs([picture, *(reference or [])])
    for note in inputs.notes:
        report.event("note", note, note=note)
    used, source_size, canvas = None, inputs.pictures[0].image.size, bundle.index.canvas
    if mask is not None:
        allowed = read_mask(mask, source_size, invert=invert_mask, feather=feather)
        inputs = replace(inputs, mask=allowed)
        used = MaskRecipe(sha256=pixels_hash(allowed), invert=invert_mask, feather=feather)
    working = working_size(source_size, canvas, max_pixels) if size is None else parse_size(size, canvas)
    settings = fit_to_card(bundle, settings, working, report, fetch=not dry_run, references=len(inputs.pictures))
    with report.stage("libraries"):
        fields = shared_fields(settings, bundle, defaults)
    guidance = defaults.image_cfg if image_cfg is None else image_cfg
    options = {"--negative": settings.negative, "--cfg-interval": flags.cfg_interval}
    check_guidance(fields["cfg"], options, guidance)
    fields["width"], fields["height"] = source_size if size is None else working
    fields["edit"] = describe_edit(
        inputs,
        canvas=working,
        image_cfg=guidance,
        strength=strength,
        mask=used,
        composite=composite or mask is not None,
    )
    routes, fields["route_from"] = route_source(route_from, route_until, bundle)
    jobs = make_jobs(instructions, names, fields, seed=seed, count=count, inputs=inputs)
    check_recipe(jobs[0].recipe, bundle, compiled=settings.compile, regions=regions)
    for option, extra in {"--strip": strip, "--sheet": sheet}.items():
        if extra is not None:
            check_sheet(option, extra, names)
    if dry_run:
        say_what_would_be_drawn(jobs, report)
        return
    pipeline = load_pipeline(bundle, settings, report, precision=fields["precision"], quant=fields["quant"])
    draw_jobs(
        pipeline,
        jobs,
        trace=settings.trace,
        overwrite=overwrite,
        report=report,
        record_options=record_options,
        route_from=routes,
        sheet=sheet,
        strip=strip,
    )
