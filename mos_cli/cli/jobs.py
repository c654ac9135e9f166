"""From recipes to files: what `generate`, `edit`, `run` and `replay` share."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mos_cli.cli.output import Report, print_error
from mos_cli.errors import PARTLY_FAILED, MosError, UsageError
from mos_cli.utils.counts import counted

if TYPE_CHECKING:
    from mos_cli.bundles.bundle import Bundle
    from mos_cli.config.recipe import Recipe
    from mos_cli.config.settings import Metadata, RunSettings
    from mos_cli.images.inputs import Inputs
    from mos_cli.images.naming import Naming
    from mos_cli.routing.trace import RecordOptions


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

    With --quiet and into a pipe, only the paths of the pictures are printed to stdout.

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
            report.note("setting", f"{name:<14} {value}")
    failed = there = 0
    for number, job in enumerate(jobs, start=1):
        if isinstance(job, Job) and job.done:
            there += 1
            report.note("there", f"{job.path}  is there", index=number, path=str(job.path))
            continue
        problem = job.error if isinstance(job, RefusedJob) else next(problems)
        if problem is not None:
            failed += 1
            report_failed(job, number, problem, report)
        elif isinstance(job, Job):
            line = f"{job.path}  (seed {job.recipe.seed}: {shortened(job.recipe.weighted_prompt)})"
            report.path("would draw", job.path, line, path=str(job.path), recipe=job.recipe.model_dump())
    if len(jobs) > 1:
        number = len(jobs) - failed - there
        line = f"{number} picture{'' if number == 1 else 's'} would be drawn" + (
            f", {there} are there" if there else ""
        )
        report.note("total", line, pictures=number, there=there, failed=failed)
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
        print_error(f"{failed} of {counted(len(jobs), 'picture')} failed")
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
