"""`mos generate`: from words to pictures and routing traces."""

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


def generate(
    prompt: Annotated[
        str, typer.Argument(help="What to draw; - reads prompts from stdin, @FILE from a file, a line each.")
    ],
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
        typer.Option(envvar="MOS_SIZE", metavar="SIZE", help="64, 96x64 or 3:2.", show_default="the model's"),
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
    sheet: Sheet = None,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Draw pictures from a prompt, each with its recipe inside and its routing trace beside it."""
    from mos_cli.bundles.bundle import find_bundle
    from mos_cli.config.settings import make_settings, parse_size, resolve
    from mos_cli.images.outputs import naming

    report = Report(json=json, quiet=quiet, verbose=verbose)
    prompts = read_prompts(prompt, 'what to draw, for example: mos generate "a red apple"')
    flags = make_settings(
        model=model,
        steps=steps,
        solver=solver,
        cfg=cfg,
        cfg_interval=cfg_interval,
        negative=negative,
        size=size,
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
    names = naming(settings.output, overwrite=overwrite)
    bundle = find_bundle(settings.model)
    width, height = parse_size(settings.size, bundle.index.canvas)
    settings = fit_to_card(bundle, settings, (width, height), report, fetch=not dry_run)
    with report.stage("libraries"):
        fields = shared_fields(settings, bundle, bundle.index.defaults)
    from mos_cli.config.recipe import check_guidance

    fields["width"], fields["height"] = width, height
    check_guidance(fields["cfg"], {"--negative": settings.negative, "--cfg-interval": flags.cfg_interval})
    routes, fields["route_from"] = route_source(route_from, route_until, bundle)
    jobs = make_jobs(prompts, names, fields, seed=seed, count=count)
    check_recipe(jobs[0].recipe, bundle, compiled=settings.compile, regions=regions)
    if sheet is not None:
        check_sheet("--sheet", sheet, names)
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
    )
