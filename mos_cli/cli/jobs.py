"""From recipes to files: what `generate`, `edit`, `run` and `replay` share."""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import typer

from mos_cli.cli.output import Report, print_bytes, print_error, print_warning
from mos_cli.cli.progress import sampling_bars, stop_between_steps
from mos_cli.cli.standard_files import picture_file
from mos_cli.errors import PARTLY_FAILED, InputError, MosError, UsageError
from mos_cli.utils.files import expand

if TYPE_CHECKING:
    from PIL.Image import Image

    from mos_cli.bundles.bundle import Bundle
    from mos_cli.config.recipe import Recipe
    from mos_cli.config.settings import Metadata, RunSettings, TraceLevel
    from mos_cli.images.inputs import Inputs
    from mos_cli.images.manifest import Manifest
    from mos_cli.images.naming import Naming
    from mos_cli.images.pictures import PictureFile
    from mos_cli.inference.drawing import Drawing
    from mos_cli.inference.pipeline import MoSPipeline
    from mos_cli.routing.trace import Recording, RecordOptions
    from mos_cli.sampling.sampler import Observer, Step
    from mos_cli.server.client import RemotePipeline


READ_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".avif", ".gif", ".tif", ".tiff", ".bmp"}
"""The names of pictures in a folder."""


@dataclass(frozen=True)
class Job:
    """A picture to draw and the path it is written to.

    Attributes:
        names: gives it another name if its own was taken while it was drawn.
        inputs: reads the pictures of an edit; they are not held while they wait.
        source: the file that is edited, for the name.
        key: what identifies it in the manifest.
        cell: its row and column in a sheet with axes.
        done: it is there already, and is not drawn.
        batch: the number of the batch that it is drawn in; None if it is drawn alone.
    """

    recipe: "Recipe"
    path: Path
    names: "Naming"
    inputs: "Callable[[], Inputs] | None" = None
    source: Path | None = None
    key: str = ""
    cell: tuple[str, str] = ("", "")
    done: bool = False
    batch: int | None = None


@dataclass(frozen=True)
class RefusedJob:
    """A job that cannot be drawn, as it turned out before the first is.

    Attributes:
        subject: what messages call it: its prompt, its picture, or its line.
    """

    subject: str
    error: MosError


JobGroup = list[tuple[int, Job | RefusedJob]]
"""Jobs that are drawn at once, or one, with their numbers in the run."""


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


def read_pictures(arguments: Sequence[Path]) -> "list[tuple[PictureFile, str]]":
    """The pictures that arguments name, and what messages call each: files, - for stdin, folders, lists (@FILE).

    A folder stands for the pictures in it, by name, without hidden files and previews of steps.

    Raises:
        InputError: a folder or list has none, or cannot be read.
    """
    from mos_cli.images.companions import PREVIEWS_SUFFIX

    found: list[tuple[PictureFile, str]] = []
    for argument in arguments:
        if str(argument).startswith("@"):
            list_file = expand(str(argument)[1:])
            lines = [line.strip() for line in _lines(list_file.read_bytes(), str(list_file))]
            files = [expand(line) for line in lines if line]
        elif argument.is_dir():
            files = [
                path
                for path in sorted(argument.iterdir())
                if path.suffix.lower() in READ_SUFFIXES and not path.name.startswith(".")
                if not path.name.endswith(PREVIEWS_SUFFIX)
            ]
        else:
            if not argument.suffix and str(argument) != "-" and len(arguments) > 1 and not argument.exists():
                raise InputError(f"{argument} is not there: put a text of several words in quotes")
            files = [argument]
        if not files:
            raise InputError(f"{argument} has no pictures: name a folder or a list that has some")
        found += [(picture_file(file), str(file)) for file in files]
    return found


def _lines(data: bytes, source: str) -> list[str]:
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"the lines of {source} are not UTF-8 text") from None
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


def check_format(path: Path, recipe: "Recipe", inputs: "Inputs | None", metadata: "Metadata") -> None:
    """Raises UsageError if the format of a file cannot hold its picture; called before it is drawn."""
    from mos_cli.images.naming import STDOUT
    from mos_cli.images.outputs import check_recipe_fits

    if path != STDOUT:
        check_recipe_fits(path, recipe, inputs, with_earlier=metadata == "full")


def check_sheet(option: str, sheet: Path, taken: set[Path], overwrite: bool) -> None:
    """Raises UsageError or InputError if a sheet cannot be written under its name; called before pictures are drawn.

    Args:
        taken: the paths of the pictures and of other sheets; this one is added.
    """
    from mos_cli.utils.files import check_writable, refuse_existing

    if sheet.suffix.lower() != ".png" or sheet.absolute() in taken:
        raise UsageError(f"{option} {sheet}: name a .png of its own")
    check_writable(sheet.parent)
    refuse_existing(sheet, overwrite)
    taken.add(sheet.absolute())


def print_jobs(jobs: Sequence[Job | RefusedJob], bundle: "Bundle", settings: "RunSettings", report: Report) -> None:
    """Prints what would be drawn, for --dry-run: the settings that all share, then each picture, and how many.

    Raises:
        MosError: the only prompt cannot be drawn.
        typer.Exit: some of several cannot (exit code 7).
    """
    from mos_cli.inference.requests import check_prompts

    missing = [job for job in jobs if isinstance(job, Job) and not job.done]
    found = check_prompts([job.recipe for job in missing], bundle)
    if found is None:
        note = "the prompts are not checked: they are read when something is drawn"
        report.note("note", note, note=note)
        found = [None] * len(missing)
    problems = iter(found)
    if len(jobs) == 1 and found and found[0] is not None:
        raise found[0]
    if not report.json and missing:
        run = settings.model_dump(include={"device", "attention", "offload", "compile", "trace"})
        tables = [recipe_text(job.recipe) | as_texts(run) for job in missing]
        for name, value in tables[0].items():
            if any(table.get(name) != value for table in tables):
                continue
            report.event("setting", f"{name:<14} {value}")
    failed = there = 0
    for number, job in enumerate(jobs, start=1):
        if isinstance(job, Job) and job.done:
            there += 1
            report.event("there", f"{job.path}  is there", index=number, path=str(job.path))
            continue
        problem = job.error if isinstance(job, RefusedJob) else next(problems)
        if problem is not None:
            failed += 1
            report_failed(job, number, problem, report)
        elif isinstance(job, Job):
            line = f"{job.path}  (seed {job.recipe.seed}: {shortened(job.recipe.weighted_prompt)})"
            report.event("would draw", line, path=str(job.path), recipe=job.recipe.model_dump())
    if len(jobs) > 1:
        number = len(jobs) - failed - there
        line = f"{number} picture{'' if number == 1 else 's'} would be drawn" + (
            f", {there} are there" if there else ""
        )
        report.event("total", line, pictures=number, there=there, failed=failed)
    report.times()
    exit_if_failed(failed, jobs)


def report_failed(job: Job | RefusedJob, number: int, error: MosError, report: Report) -> None:
    """Reports a job of several that cannot be drawn."""
    subject = job.subject if isinstance(job, RefusedJob) else repr(shortened(job.recipe.prompt))
    print_error(f"{subject}: {error}")
    report.event(
        "failed",
        index=number,
        prompt=job.subject if isinstance(job, RefusedJob) else job.recipe.prompt,
        error=str(error),
    )


def exit_if_failed(failed: int, jobs: Sequence[Job | RefusedJob], *, said: bool = True) -> None:
    """Ends the run with exit code 7 if some of its jobs failed; `said`: with a line."""
    if failed and said:
        print_error(f"{failed} of {len(jobs)} pictures failed")
    if failed:
        raise typer.Exit(PARTLY_FAILED)


def recipe_text(recipe: "Recipe") -> dict[str, str]:
    """A recipe as text by name, without what tells the pictures of a run apart."""
    from mos_cli.config.recipe import with_weights

    told_apart = {"prompt", "seed", "width", "height", "route_from", "template", "weights", "negative_weights", "batch"}
    values = recipe.model_dump(exclude_none=True, exclude=told_apart)
    values["negative"] = with_weights(recipe.negative, recipe.negative_weights)
    values = {name: value for name, value in values.items() if value != ""}
    values["cfg_interval"] = "{:g},{:g}".format(*recipe.cfg_interval)
    if recipe.edit is not None:
        values |= recipe.edit.model_dump(include={"image_cfg", "strength", "composite"})
        values["canvas"] = "{}x{}".format(*recipe.edit.canvas)
        values["edit"] = ", ".join(f"{source.width}x{source.height}" for source in recipe.edit.sources)
    if recipe.loras is not None:
        values["loras"] = [f"{lora.name}:{lora.scale:g}" for lora in recipe.loras]
    values["size"] = f"{recipe.width}x{recipe.height}"
    return as_texts(values)


def as_texts(values: dict[str, Any]) -> dict[str, str]:
    """Settings as they are printed."""
    texts = {}
    for name, value in values.items():
        if isinstance(value, bool):
            texts[name] = "yes" if value else "no"
        else:
            texts[name] = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return texts


def shortened(text: str) -> str:
    """A prompt as it is named in messages: on one line, its beginning if it is long."""
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def draw_jobs(
    pipeline: "MoSPipeline | RemotePipeline",
    groups: Sequence[JobGroup],
    manifest: "Manifest",
    *,
    total: int,
    trace: "TraceLevel",
    metadata: "Metadata",
    log: bool,
    report: Report,
    record_options: "RecordOptions",
    observers: Sequence["Observer"] = (),
    route_from: "Recording | None" = None,
    drawn: "Callable[[Job, Image], None]" = lambda job, image: None,
    show: "Callable[[Image], None] | None" = None,
) -> int:
    """Draws and writes every job that is not done; one that fails does not stop the others.

    The first Ctrl-C stops after the current step, the second at once; pictures that are written stay.

    Args:
        groups: the jobs, see `group_jobs`.
        manifest: where it is recorded what becomes of each job.
        total: the number of jobs of the run, others' included.
        trace: how much of the trace is written, a `TraceLevel`.
        metadata: what the pictures say of themselves.
        log: list them in the log, but for those without metadata.
        observers: called after every step of every picture.
        drawn: called with every job and its picture, when it is written.
        show: prints a picture in the terminal.

    Returns:
        How many jobs failed.

    Raises:
        MosError: the only job failed.
    """
    missing = [job for group in groups for _, job in group if isinstance(job, Job) and not job.done]
    if metadata == "none" and missing:
        kept = "" if trace == "off" or missing[0].path == Path("-") else "; the trace beside it still holds the prompt"
        note = f"without metadata, mos replay cannot draw the picture again{kept}"
        report.note("note", note, note=note)
    failed = written = 0
    with report.stage("reading"):
        pipeline.encode_ahead([job.recipe for job in missing])
    with sampling_bars(report) as bars, stop_between_steps() as check_interrupt:
        for group in groups:
            number, job = group[0]
            if isinstance(job, RefusedJob):
                failed += 1
                report_failed(job, number, job.error, report)
                manifest.record("failed", f"refused-{number}", number, job.subject, error=str(job.error))
                continue
            batch = {number: job for number, job in group if isinstance(job, Job)}
            if all(job.done for job in batch.values()):
                continue
            task = bars.add_task(_named(list(batch), total), total=job.recipe.steps, unit="steps")
            started = perf_counter()

            def observe(step: "Step", task: Any = task, numbers: Sequence[int] = tuple(batch)) -> None:
                bars.update(task, completed=step.index + 1)
                for number in numbers if report.json else ():
                    report.event("step", index=number, step=step.index + 1, steps=step.total, t=round(step.t, 4))
                check_interrupt()

            drawings: Mapping[int, Drawing | MosError]
            try:
                with report.stage("sampling"):
                    options = {"record_options": record_options, "route_from": route_from}
                    drawings = _drawings(pipeline, batch, [observe, *observers], options)
            except MosError as error:
                drawings = dict.fromkeys(batch, error)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"{written} of {len(missing)} pictures are written") from None
            finally:
                bars.remove_task(task)
            seconds = (perf_counter() - started) / len(batch)
            for number, job in batch.items():
                if job.done:
                    continue

                def record(
                    status: Literal["writing", "done", "failed"], job: Job = job, number: int = number, **more: Any
                ) -> None:
                    manifest.record(status, job.key, number, job.recipe.prompt, seed=job.recipe.seed, **more)

                try:
                    drawing = drawings[number]
                    if isinstance(drawing, MosError):
                        raise drawing
                    started = perf_counter()
                    with report.stage("writing"):
                        files = _save(drawing, job, trace, metadata, record)
                except MosError as error:
                    record("failed", error=str(error), seconds=seconds)
                    if total == 1:
                        raise
                    failed += 1
                    report_failed(job, number, error, report)
                    continue
                written += 1
                record("done", files=files, seconds=seconds + perf_counter() - started)
                if log and metadata != "none" and files:
                    log = log_drawn(next(iter(files)), drawing.record.recipe)
                drawn(job, drawing.image)
                report.picture(list(files), index=number, prompt=job.recipe.prompt, seed=job.recipe.seed)
                if show is not None:
                    # A bar that moves would write into the picture.
                    bars.stop()
                    show(drawing.image)
                    bars.start()
    return failed


def group_jobs(jobs: Sequence[Job | RefusedJob]) -> list[JobGroup]:
    """The numbered jobs, those of a batch where the first of them is."""
    groups: list[JobGroup] = []
    batches: dict[int, JobGroup] = {}
    for number, job in enumerate(jobs, start=1):
        of_batch = job.batch if isinstance(job, Job) else None
        if of_batch in batches:
            batches[of_batch].append((number, job))
            continue
        groups.append([(number, job)])
        if of_batch is not None:
            batches[of_batch] = groups[-1]
    return groups


def _named(numbers: Sequence[int], total: int) -> str:
    """What the progress bar calls the pictures that are drawn at once."""
    if len(numbers) > 1:
        return f"{len(numbers)} pictures from {numbers[0]} of {total}"
    return f"picture {numbers[0]} of {total}" if total > 1 else "drawing"


def _drawings(
    pipeline: "MoSPipeline | RemotePipeline",
    batch: Mapping[int, Job],
    observers: "Sequence[Observer]",
    options: dict[str, Any],
) -> "dict[int, Drawing | MosError]":
    """The drawings of a batch, or of a single picture. Those that are there already are drawn with the others.

    A picture depends in its last bits on the lengths of the other prompts, so a run that goes on makes the same batch.
    """
    number, job = next(iter(batch.items()))
    if len(batch) == 1 or (of_first := job.recipe.batch) is None:
        inputs = None if job.inputs is None else job.inputs()
        return {number: pipeline.draw(job.recipe, observers, inputs, **options)}
    places = {job.recipe.batch.place: number for number, job in batch.items() if job.recipe.batch is not None}
    recipes = [batch[places[place]].recipe if place in places else None for place in range(of_first.size)]
    # No batch is drawn with a server.
    drawn = pipeline.draw_batch(recipes, observers, **options)  # pyright: ignore[reportAttributeAccessIssue]
    return {places[place]: drawing for place, drawing in zip(sorted(places), drawn, strict=True)}


def _save(drawing: "Drawing", job: Job, trace: Any, metadata: Any, record: Callable[..., None]) -> dict[Path, bytes]:
    """Writes a picture; if its name was taken while it was drawn, under the next one that is free.

    Returns:
        The files written, the picture first; none for a picture that went to stdout.
    """
    from mos_cli.images.companions import write_picture
    from mos_cli.images.naming import STDOUT
    from mos_cli.utils.files import NameTakenError

    if job.path == STDOUT:
        print_bytes(drawing.encode(Path("stdout.png"), metadata).data)
        return {}
    names, path = job.names, job.path
    further = names.paths_after(path, job.recipe, job.source)
    while True:
        files = drawing.files(path, trace=trace, metadata=metadata)
        record("writing", files=files)
        try:
            write_picture(files, names.overwrite and path == job.path)
        except NameTakenError:
            path = next(further)
            continue
        if path != job.path and not names.numbered:
            print_warning(f"{job.path} was taken while this was drawn: it is saved as {path}")
        return files


def log_drawn(path: Path | None, recipe: "Recipe") -> bool:
    """Lists a picture in the log. Where that fails, a warning says so, and the run goes on without the log."""
    from mos_cli.images.log import log_picture

    try:
        log_picture(path, recipe)
    except InputError as error:
        print_warning(f"{error}; the pictures are drawn, and not listed by mos logs: --no-log turns it off")
        return False
    return True


def write_strip(
    path: Path, inputs: "Inputs", after: "Image", instruction: str, overwrite: bool, report: Report
) -> None:
    """Writes an edit before and after side by side."""
    from mos_cli.images.pictures import Fit
    from mos_cli.images.sheets import strip

    before = inputs.pictures[0].rgb
    before = before if before.size == after.size else Fit(before.size, after.size).forward(before)
    write_sheet("strip", path, strip(before, after.convert("RGB"), instruction), overwrite, report)


def write_sheet(kind: str, path: Path, image: "Image", overwrite: bool, report: Report) -> None:
    from mos_cli.images.outputs import png
    from mos_cli.utils.files import atomic_write

    atomic_write(path, png(image, None), overwrite)
    report.note(kind, str(path), file=str(path))
