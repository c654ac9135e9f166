"""Many pictures in one run: their jobs are listed or drawn.

`generate`, `edit` and `run` each make a list of `Request`s and call `draw_requests`.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from mos_cli.cli.drawing import JobDrawer, refuse, write_sheet, write_strip
from mos_cli.cli.job_sharing import join_processes
from mos_cli.cli.jobs import (
    Job,
    RefusedJob,
    check_sheet,
    exit_if_failed,
    group_jobs,
    make_record_options,
    parse_percent,
    print_jobs,
)
from mos_cli.cli.loading import find_server, load_with_progress
from mos_cli.cli.options import DrawOptions
from mos_cli.cli.output import Report
from mos_cli.cli.requests import JobMaker, Request, vary
from mos_cli.cli.terminal_pictures import picture_printer
from mos_cli.errors import UsageError
from mos_cli.utils.counts import counted

if TYPE_CHECKING:
    from PIL.Image import Image

    from mos_cli.bundles.bundle import Bundle
    from mos_cli.config.recipe import Recipe
    from mos_cli.config.settings import RunSettings, Settings
    from mos_cli.inference.pipeline import MoSPipeline
    from mos_cli.sampling.sampler import Observer


def draw_requests(
    requests: Sequence[Request | RefusedJob],
    flags: "Settings",
    options: DrawOptions,
    report: Report,
    *,
    strip: Path | None = None,
) -> None:
    """Draws everything that is requested, or with --dry-run lists it.

    Args:
        flags: the settings of the run.
        strip: where the only picture is shown before and after its edit.

    Raises:
        MosError: a setting of the run is wrong, or the only picture cannot be drawn.
        typer.Exit: some of several pictures failed (exit code 7).
    """
    from mos_cli.bundles.bundle import edit_defaults, find_bundle
    from mos_cli.config.settings import resolve
    from mos_cli.images.manifest import Manifest
    from mos_cli.images.naming import naming
    from mos_cli.inference.requests import check_device, random_seed, route_source

    requests = vary(requests, options.vary or ())
    processes = join_processes()
    _check_options(options, strip, several=len(requests) > 1 or options.count > 1, shared=processes.several)
    if processes.number > 0:
        report.quiet, report.verbose = not report.json, False
    settings = resolve(flags, options.preset)
    settings = settings.model_copy(update={"device": processes.device(settings.device)})
    record_options = make_record_options(settings.trace, regions=options.regions, previews=options.preview_steps)
    options.check_output(settings.output)
    show = picture_printer(settings.preview and not options.dry_run, report)
    names = naming(settings.output, suffix=settings.format, overwrite=options.overwrite)
    bundle = find_bundle(settings.model)
    if all(isinstance(request, Request) and request.edit for request in requests):
        edit_defaults(bundle)
    maker = JobMaker(requests, bundle, options, record_options, names, report)
    remote = None if options.dry_run else find_server(settings, bundle, report)
    settings = maker.fit(settings) if remote is None else remote.adopt(settings)
    recording, route_from = route_source(options.route_from, parse_percent(options.route_until), bundle)
    random = processes.agreed(random_seed())
    sheets = _Sheets(options, strip, report)
    with ExitStack() as stack:
        # All have the same jobs, under the same names: no picture is written before all have theirs.
        with processes.one_after_the_other():
            first = processes.number == 0
            opened = Manifest(options.manifest, resume=options.resume, write=not options.dry_run, joins=not first)
            manifest = stack.enter_context(opened)
            seed = random if manifest.seed is None else manifest.seed
            jobs = maker.jobs(settings, manifest, seed, {"route_from": route_from})
            if len(jobs) == 1 and isinstance(jobs[0], RefusedJob):
                raise jobs[0].error
            drawable = [job for job in jobs if isinstance(job, Job)]
            if drawable and remote is None:
                check_device(settings, drawable[0].recipe, bundle)
            sheets.check(names.returned)
            if not options.dry_run:
                manifest.begin(seed if settings.seed is None else settings.seed)
        if options.dry_run:
            if first:
                print_jobs(jobs, bundle, settings, report)
            return
        groups = processes.share(group_jobs(jobs))
        own = [job for group in groups for _, job in group]
        if any(isinstance(job, Job) and not job.done for job in own):
            pipeline, observers = (remote, ()) if remote else _load(bundle, settings, drawable[0].recipe, report)
            failed = JobDrawer(
                pipeline,
                manifest,
                total=len(jobs),
                settings=settings,
                report=report,
                record_options=record_options,
                observers=observers,
                route_from=recording,
                drawn=sheets.add,
                show=show,
            ).draw(groups)
        else:
            refused = [(number, job) for group in groups for number, job in group if isinstance(job, RefusedJob)]
            for number, job in refused:
                refuse(job, number, manifest, report)
            failed = len(refused)
        # The manifest is locked until all processes are done.
        failed = processes.total(failed)
        if there := sum(job.done for job in drawable):
            note = f"already there: {there} of {counted(len(jobs), 'picture')}"
            report.note("there", note, pictures=there)
        sheets.write(drawable)
    report.times()
    exit_if_failed(failed, jobs, said=first)


def _check_options(options: DrawOptions, strip: Path | None, *, several: bool, shared: bool) -> None:
    """Raises UsageError for options that do not go together, or not with several pictures or processes."""
    if options.resume and options.manifest is None:
        raise UsageError("--resume goes on with the run of a manifest: name it with --manifest FILE")
    if strip is not None and several:
        raise UsageError("--strip shows one edit: leave it out, or draw one picture")
    if shared and (options.sheet or strip):
        raise UsageError("a sheet or a strip is made by one process: leave it out, or draw without the launcher")


def _load(
    bundle: "Bundle", settings: "RunSettings", recipe: "Recipe", report: Report
) -> "tuple[MoSPipeline, Sequence[Observer]]":
    """The model, and what adapts the number of a CPU's threads to the other work on the machine, after every step."""
    from mos_cli.utils.threads import AdaptiveThreads

    adapt_threads = AdaptiveThreads()
    pipeline = load_with_progress(bundle, settings, report, precision=recipe.precision, quant=recipe.quant)
    adapt_threads()
    # A GPU's work does not depend on it, and blocks are compiled for a number of threads.
    adapting = pipeline.device.type == "cpu" and not pipeline.compiled
    return pipeline, (adapt_threads,) if adapting else ()


class _Sheets:
    """The pictures of a run that are shown together: all in a sheet, or the only edit before and after in a strip."""

    def __init__(self, options: DrawOptions, strip: Path | None, report: Report) -> None:
        self.sheet, self.strip, self.overwrite, self.report = options.sheet, strip, options.overwrite, report
        self.in_grid = bool(options.vary)
        self._images: dict[int, Image] = {}

    def check(self, taken: set[Path]) -> None:
        """Raises UsageError or InputError if one cannot be written; `taken` are the paths of the pictures."""
        for option, path in {"--strip": self.strip, "--sheet": self.sheet}.items():
            if path is not None:
                check_sheet(option, path, taken, self.overwrite)

    def add(self, job: Job, image: "Image") -> None:
        """Takes a picture that was drawn; a strip is written at once."""
        if self.sheet is not None:
            self._images[id(job)] = image
        if self.strip is not None and job.inputs is not None:
            write_strip(self.strip, job.inputs(), image, job.recipe.prompt, self.overwrite, self.report)

    def write(self, jobs: Sequence[Job]) -> None:
        """Writes the sheet: a grid with axes, or all pictures with their prompts; also those that were there before."""
        if self.sheet is None:
            return
        from mos_cli.images.outputs import read_stored
        from mos_cli.images.sheets import contact_sheet, grid

        shown = []
        for job in jobs:
            if (image := self._images.get(id(job))) is None and job.done:
                image = read_stored(job.path)[0]
            if image is not None:
                shown.append((job, image))
        if shown:
            laid_out = (
                grid({job.cell: image for job, image in shown}, _title(jobs))
                if self.in_grid
                else contact_sheet([(image, _caption(job, jobs)) for job, image in shown])
            )
            write_sheet("sheet", self.sheet, laid_out, self.overwrite, self.report)


def _title(jobs: Sequence[Job]) -> str:
    """The prompt above a grid, as it was typed; none where there are several, which stand beside their rows."""
    recipes = [job.recipe for job in jobs]
    typed = {recipe.weighted_prompt if recipe.template is None else recipe.template.text for recipe in recipes}
    return typed.pop() if len(typed) == 1 else ""


def _caption(job: Job, jobs: Sequence[Job]) -> str:
    """The prompt on a sheet, after the seed where the prompt has several pictures."""
    prompt = job.recipe.weighted_prompt
    several = sum(other.recipe.weighted_prompt == prompt for other in jobs) > 1
    return f"{job.recipe.seed}: {prompt}" if several else prompt
