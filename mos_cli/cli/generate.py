"""`mos generate`: from prompts to pictures and routing traces."""

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


@with_draw_options
def generate(
    prompt: Annotated[
        str,
        typer.Argument(
            callback=as_text, help="What to draw; - reads prompts from stdin, @FILE from a file, a line each."
        ),
    ],
    size: Annotated[
        str | None,
        typer.Option("--size", envvar="MOS_SIZE", metavar="SIZE", help="64, 96x64 or 3:2.", show_default="the model's"),
    ] = None,
    *,
    options: DrawOptions,
) -> None:
    """Draw pictures from a prompt, each with its recipe inside and its routing trace beside it."""
    from mos_cli.bundles.bundle import find_bundle
    from mos_cli.config.settings import parse_size, resolve
    from mos_cli.images.naming import naming
    from mos_cli.inference.requests import check_device, check_recipe, generation_fields, route_source
    from mos_cli.utils.threads import AdaptiveThreads

    report = Report(json=options.json, quiet=options.quiet, verbose=options.verbose)
    prompts = read_prompts(prompt, 'what to draw, for example: mos generate "a red apple"')
    flags = options.settings(size=size)
    settings = resolve(flags, options.preset)
    record_options = make_record_options(settings.trace, regions=options.regions, previews=options.preview_steps)
    options.check_output(settings.output)
    names = naming(settings.output, suffix=settings.format, overwrite=options.overwrite)
    bundle = find_bundle(settings.model)
    canvas = parse_size(settings.size, bundle.index.canvas)
    settings = fit_to_memory(bundle, settings, canvas, report, fetch=not options.dry_run)
    with report.stage("libraries"):
        fields = generation_fields(settings, bundle, canvas, cfg_interval=flags.cfg_interval)
    recording, fields["route_from"] = route_source(options.route_from, parse_percent(options.route_until), bundle)
    jobs = make_jobs(prompts, names, fields, seed=settings.seed, count=options.count, metadata=settings.metadata)
    check_recipe(jobs[0].recipe, bundle, compiled=settings.compile, regions=options.regions, options=record_options)
    check_device(settings, jobs[0].recipe, bundle)
    if options.sheet is not None:
        check_sheet("--sheet", options.sheet, names, options.overwrite)
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
    )
