"""What `generate`, `edit` and `replay` share: prompts become recipes, and recipes become files."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mos_cli.cli.output import Report, print_bytes, print_error, print_warning
from mos_cli.cli.progress import sampling_bars, stop_between_steps
from mos_cli.errors import PARTLY_FAILED, InputError, MosError, UsageError
from mos_cli.utils.files import expand

if TYPE_CHECKING:
    from PIL.Image import Image

    from mos_cli.bundles.bundle import Bundle
    from mos_cli.config.recipe import Recipe
    from mos_cli.config.settings import Metadata, RunSettings, TraceLevel
    from mos_cli.images.inputs import Inputs
    from mos_cli.images.naming import Naming
    from mos_cli.inference.pipeline import Drawing, MoSPipeline
    from mos_cli.routing.trace import Recording, RecordOptions
    from mos_cli.sampling.sampler import Observer, Step


@dataclass(frozen=True)
class Job:
    """A picture to draw and the path it is written to."""

    recipe: "Recipe"
    path: Path
    inputs: "Inputs | None" = None


def read_prompts(argument: str, advice: str) -> list[str]:
    """The prompts that an argument names: itself, or the lines of stdin (-) or of a file (@FILE).

    Lines that are empty or begin with # are left out.

    Raises:
        InputError: there are none, which `advice` helps with, or they cannot be read.
    """
    if argument == "-":
        if sys.stdin is None:
            raise InputError("stdin is closed: give the prompt itself, or @FILE")
        lines = _lines(sys.stdin.buffer.read(), "stdin")
    elif argument.startswith("@"):
        lines = _lines(expand(argument[1:]).read_bytes(), argument[1:])
    else:
        lines = [argument]
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"the prompt is empty: say {advice}")
    return prompts


def _lines(data: bytes, source: str) -> list[str]:
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"the prompts from {source} are not UTF-8 text") from None
    return [line for line in lines if not line.lstrip().startswith("#")]


def make_record_options(trace: str, *, regions: bool, previews: bool) -> "RecordOptions":
    """What is recorded beside the routes.

    Raises:
        UsageError: regions are requested without the arrays that they would be written into.
    """
    from mos_cli.routing.trace import RecordOptions

    if regions and trace not in ("topk", "full"):
        raise UsageError(f"--regions are written into the trace's arrays, which --trace {trace} leaves out")
    return RecordOptions(probabilities=trace == "full", regions=regions, previews=previews)


def parse_percent(text: str | None) -> float | None:
    """The part of the steps that --route-until names, above 0 to 1; raises UsageError."""
    if text is None:
        return None
    percent = re.fullmatch(r"(\d{1,3}(?:\.\d{1,3})?)%", text)
    if percent is None or not 0 < float(percent[1]) <= 100:
        raise UsageError(f"--route-until {text}: write a share of the steps, such as 40%")
    return float(percent[1]) / 100


def make_jobs(
    prompts: list[str],
    names: "Naming",
    fields: dict[str, Any],
    *,
    seed: int | None,
    count: int,
    metadata: "Metadata",
    inputs: "Inputs | None" = None,
) -> list[Job]:
    """A job for every prompt and seed; without a seed the first is random.

    Raises:
        UsageError, InputError: a picture cannot be written under its name or in its format.
    """
    from mos_cli.config.recipe import make_recipe
    from mos_cli.inference.requests import random_seed

    first = random_seed() if seed is None else seed
    jobs = []
    for prompt in prompts:
        for index in range(count):
            recipe = make_recipe(prompt=prompt, seed=first + index, **fields)
            jobs.append(Job(recipe, names.path(recipe), inputs))
            check_format(jobs[-1], metadata)
    return jobs


def check_format(job: Job, metadata: "Metadata") -> None:
    """Raises UsageError if the format of a job's file cannot hold its picture; called before it is drawn."""
    from mos_cli.images.naming import STDOUT
    from mos_cli.images.outputs import check_recipe_fits

    if job.path != STDOUT:
        check_recipe_fits(job.path, job.recipe, job.inputs, with_earlier=metadata == "full")


def check_sheet(option: str, sheet: Path, names: "Naming", overwrite: bool) -> None:
    """Raises UsageError or InputError if a sheet cannot be written under its name; called before pictures are drawn."""
    from mos_cli.utils.files import check_writable, refuse_existing

    if sheet.suffix.lower() != ".png" or sheet.absolute() in names.returned:
        raise UsageError(f"{option} {sheet}: name a .png of its own")
    check_writable(sheet.parent)
    refuse_existing(sheet, overwrite)
    names.returned.add(sheet.absolute())


def print_jobs(jobs: list[Job], bundle: "Bundle", settings: "RunSettings", report: Report) -> None:
    """Prints what would be drawn, for --dry-run: the settings of all pictures as a table, then each picture.

    Raises:
        MosError: the only prompt cannot be drawn.
        typer.Exit: some of several cannot (exit code 7).
    """
    from mos_cli.inference.requests import check_prompts

    problems = check_prompts([job.recipe for job in jobs], bundle)
    if problems is None:
        note = "the prompts are not checked: they are read when something is drawn"
        report.note("note", note, note=note)
        problems = [None] * len(jobs)
    if len(jobs) == 1 and problems[0] is not None:
        raise problems[0]
    if not report.json:
        for name, value in _shared_settings(jobs[0].recipe, settings).items():
            report.event("setting", f"{name:<14} {value}")
    for number, (job, problem) in enumerate(zip(jobs, problems, strict=True), start=1):
        if problem is not None:
            report_failed(job, number, problem, report)
            continue
        line = f"{job.path}  (seed {job.recipe.seed}: {shortened(job.recipe.prompt)})"
        report.event("would draw", line, path=str(job.path), recipe=job.recipe.model_dump())
    report.times()
    exit_if_failed(sum(problem is not None for problem in problems), jobs)


def report_failed(job: Job, number: int, error: MosError, report: Report) -> None:
    """Reports a job of several that cannot be drawn."""
    print_error(f"{shortened(job.recipe.prompt)!r}: {error}")
    report.event("failed", index=number, prompt=job.recipe.prompt, error=str(error))


def exit_if_failed(failed: int, jobs: list[Job]) -> None:
    """Ends the run with exit code 7 if some of its jobs failed."""
    if failed:
        print_error(f"{failed} of {len(jobs)} pictures failed")
        raise typer.Exit(PARTLY_FAILED)


def _shared_settings(recipe: "Recipe", settings: "RunSettings") -> dict[str, str]:
    """What all pictures of a run have in common, as text by name."""
    values = recipe.model_dump(exclude_none=True, exclude={"prompt", "seed", "width", "height", "route_from"})
    values = {name: value for name, value in values.items() if value != ""}
    if recipe.edit is not None:
        values |= recipe.edit.model_dump(include={"canvas", "image_cfg", "strength", "composite"})
        values["edit"] = ", ".join(f"{source.width}x{source.height}" for source in recipe.edit.sources)
    values["size"] = f"{recipe.width}x{recipe.height}"
    values |= settings.model_dump(include={"device", "attention", "offload", "compile", "trace"})
    shown = {True: "yes", False: "no"}
    return {
        name: ", ".join(map(str, value)) if isinstance(value, list | tuple) else shown.get(value, str(value))
        for name, value in values.items()
    }


def shortened(text: str) -> str:
    """A prompt as it is named in messages: on one line, its beginning if it is long."""
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def draw_jobs(
    pipeline: "MoSPipeline",
    jobs: list[Job],
    names: "Naming",
    *,
    trace: "TraceLevel",
    metadata: "Metadata",
    overwrite: bool,
    report: Report,
    record_options: "RecordOptions",
    observers: Sequence["Observer"] = (),
    route_from: "Recording | None" = None,
    sheet: Path | None = None,
    strip: Path | None = None,
) -> None:
    """Draws and writes every job, and a contact sheet of them; one that fails does not stop the others.

    The first Ctrl-C stops after the current step, the second at once; pictures that are written stay.

    Args:
        names: gives a picture another name if its own was taken while it was drawn.
        trace: how much of the trace is written, a `TraceLevel`.
        metadata: what the pictures say of themselves.
        overwrite: sheets may replace files.
        observers: called after every step of every picture.
        strip: where the first job's picture is shown before and after its edit.

    Raises:
        MosError: the only job failed.
        typer.Exit: some of several jobs failed (exit code 7).
    """
    if metadata == "none":
        kept = "" if trace == "off" or jobs[0].path == Path("-") else "; the trace beside it still holds the prompt"
        note = f"without metadata, mos replay cannot draw the picture again{kept}"
        report.note("note", note, note=note)
    failed, drawn = 0, []
    with report.stage("reading"):
        pipeline.encode_ahead([job.recipe for job in jobs])
    with sampling_bars(report) as bars, stop_between_steps() as check_interrupt:
        for number, job in enumerate(jobs, start=1):
            name = f"picture {number} of {len(jobs)}" if len(jobs) > 1 else "drawing"
            task = bars.add_task(name, total=job.recipe.steps, unit="steps")

            def observe(step: "Step", task: Any = task, number: int = number) -> None:
                bars.update(task, completed=step.index + 1)
                if report.json:
                    report.event("step", index=number, step=step.index + 1, steps=step.total, t=round(step.t, 4))
                check_interrupt()

            try:
                with report.stage("sampling"):
                    drawing = pipeline.draw(
                        job.recipe,
                        [observe, *observers],
                        job.inputs,
                        record_options=record_options,
                        route_from=route_from,
                    )
                with report.stage("writing"):
                    files = _save(drawing, job, names, trace, metadata)
            except MosError as error:
                if len(jobs) == 1:
                    raise
                failed += 1
                report_failed(job, number, error, report)
                continue
            finally:
                bars.remove_task(task)
            if sheet is not None or strip is not None:
                drawn.append((drawing.image, job.recipe.prompt))
            report.picture(files, index=number, prompt=job.recipe.prompt, seed=job.recipe.seed)
    if drawn and sheet is not None:
        from mos_cli.images.sheets import contact_sheet

        _write_sheet("sheet", sheet, contact_sheet(drawn), overwrite, report)
    if drawn and strip is not None and (inputs := jobs[0].inputs) is not None:
        from mos_cli.images.pictures import Fit
        from mos_cli.images.sheets import strip as before_and_after

        after, instruction = drawn[0]
        before = inputs.pictures[0].rgb
        before = before if before.size == after.size else Fit(before.size, after.size).forward(before)
        _write_sheet("strip", strip, before_and_after(before, after.convert("RGB"), instruction), overwrite, report)
    report.times()
    exit_if_failed(failed, jobs)


def _save(drawing: "Drawing", job: Job, names: "Naming", trace: Any, metadata: Any) -> list[Path]:
    """Writes a picture; if its name was taken while it was drawn, under the next one that is free.

    Returns:
        The files written, the picture first; none for a picture that went to stdout.
    """
    from mos_cli.images.naming import STDOUT
    from mos_cli.utils.files import NameTakenError

    if job.path == STDOUT:
        print_bytes(drawing.encode(Path("stdout.png"), metadata).data)
        return []
    path, further = job.path, names.paths_after(job.path, job.recipe)
    while True:
        try:
            overwrite = names.overwrite and path == job.path
            files = drawing.save(path, trace=trace, metadata=metadata, overwrite=overwrite)
        except NameTakenError:
            path = next(further)
            continue
        if path != job.path and not names.numbered:
            print_warning(f"{job.path} was taken while this was drawn: it is saved as {path}")
        return files


def _write_sheet(kind: str, path: Path, image: "Image", overwrite: bool, report: Report) -> None:
    from mos_cli.images.outputs import png
    from mos_cli.utils.files import atomic_write

    atomic_write(path, png(image, None), overwrite)
    report.note(kind, str(path), file=str(path))
