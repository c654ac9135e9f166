"""Draws a list of recipes and writes the files: what `generate` and `replay` share."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mos_cli.cli import console
from mos_cli.cli.interrupt import gentle_interrupt
from mos_cli.errors import PARTLY_FAILED, MosError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

    from mos_cli.config.recipe import Recipe
    from mos_cli.images.inputs import Inputs
    from mos_cli.inference.pipeline import Drawing, MoSPipeline
    from mos_cli.routing.trace import Recording, RecordOptions
    from mos_cli.sampling.sampler import Step


@dataclass(frozen=True)
class Job:
    """A picture to draw and where it goes."""

    recipe: "Recipe"
    path: Path
    inputs: "Inputs | None" = None


@dataclass
class Report:
    """What the user is told while pictures are drawn: lines, JSON events, nothing, or lines and times.

    Raises:
        UsageError: more than one of json, quiet and verbose is asked for.
    """

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.json + self.quiet + self.verbose > 1:
            raise UsageError("--json, --quiet and --verbose exclude each other: choose one")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time the block takes to a stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def event(self, kind: str, line: str | None = None, **values: Any) -> None:
        """One thing that happened: a JSON line, or a line for people if there is one."""
        if self.json:
            typer.echo(json.dumps({"event": kind, **values}))
        elif line is not None and not self.quiet:
            # A progress bar lives on stderr; where both streams are one terminal it has to know of the line.
            both = console.out.is_terminal and console.err.is_terminal
            (console.err if both else console.out).print(line, soft_wrap=True, markup=False)

    def times(self) -> None:
        """Prints how long each stage took, if asked to."""
        if self.verbose:
            for name, seconds in self.seconds.items():
                console.err.print(f"  {name:<10}{seconds:6.2f} s")

    def progress(self) -> Progress:
        """A progress bar on stderr, gone when it is done."""
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeRemainingColumn(),
            console=console.err,
            transient=True,
            disable=self.quiet or self.json or not console.err.is_terminal,
        )


def draw_jobs(
    pipeline: "MoSPipeline",
    jobs: list[Job],
    *,
    trace: str,
    overwrite: bool,
    report: Report,
    record_options: "RecordOptions",
    route_from: "Recording | None" = None,
    sheet: Path | None = None,
    strip: Path | None = None,
) -> None:
    """Draws and writes every job, and a contact sheet of them; one that fails does not stop the others.

    `strip` gets the first job's picture before and after its edit.

    The first Ctrl-C ends after the step at hand, the second at once; pictures written stay.

    Raises:
        MosError: the only job failed.
        typer.Exit: some of several jobs failed (exit code 7).
    """
    failed, drawn = 0, []
    with report.stage("reading"):
        pipeline.encode_ahead([job.recipe for job in jobs])
    with report.progress() as bars, gentle_interrupt() as check_interrupt:
        for number, job in enumerate(jobs, start=1):
            name = f"picture {number} of {len(jobs)}" if len(jobs) > 1 else "drawing"
            task = bars.add_task(name, total=job.recipe.steps, unit="steps")

            def observe(step: "Step", task: Any = task, number: int = number) -> None:
                bars.update(task, completed=step.index + 1)
                if report.json:
                    report.event("step", picture=number, step=step.index + 1, steps=step.total, t=round(step.t, 4))
                check_interrupt()

            try:
                with report.stage("sampling"):
                    drawing = pipeline.draw(
                        job.recipe, [observe], job.inputs, record_options=record_options, route_from=route_from
                    )
                with report.stage("writing"):
                    files = write_drawing(drawing, job.path, trace=trace, overwrite=overwrite)
            except MosError as error:
                if len(jobs) == 1:
                    raise
                failed += 1
                console.print_error(f"{job.recipe.prompt!r}: {error}")
                report.event("failed", picture=number, prompt=job.recipe.prompt, error=str(error))
                continue
            finally:
                bars.remove_task(task)
            if sheet is not None or strip is not None:
                drawn.append((drawing.image, job.recipe.prompt))
            seed = job.recipe.seed
            report.event("picture", f"{files[0]}  (seed {seed})", seed=seed, files=[str(file) for file in files])
            for file in files[1:]:
                if not report.json:
                    report.event("file", f"{file}")
    if drawn and sheet is not None:
        from mos_cli.images.sheets import contact_sheet

        _write_extra("sheet", sheet, contact_sheet(drawn), overwrite, report)
    if drawn and strip is not None and (inputs := jobs[0].inputs) is not None:
        from mos_cli.images.pictures import Fit
        from mos_cli.images.sheets import strip as before_and_after

        after, instruction = drawn[0]
        before = inputs.pictures[0].rgb
        before = before if before.size == after.size else Fit(before.size, after.size).forward(before)
        _write_extra("strip", strip, before_and_after(before, after.convert("RGB"), instruction), overwrite, report)
    report.times()
    if failed:
        console.print_error(f"{failed} of {len(jobs)} pictures failed")
        raise typer.Exit(PARTLY_FAILED)


def _write_extra(kind: str, path: Path, image: "Image", overwrite: bool, report: Report) -> None:
    from mos_cli.images.outputs import png
    from mos_cli.utils.files import atomic_write

    atomic_write(path, png(image, None), overwrite)
    report.event(kind, str(path), file=str(path))


def write_drawing(drawing: "Drawing", path: Path, *, trace: str, overwrite: bool) -> list[Path]:
    """Writes the picture, its previews and, as far as `trace` says, its trace; all of them or none."""
    from mos_cli.images.outputs import animation, companions, png
    from mos_cli.routing.trace import trace_files
    from mos_cli.utils.files import write_all

    files = {path: png(drawing.image, drawing.record)}
    if trace != "off":
        files |= trace_files(drawing.trace, drawing.routes if trace in ("topk", "full") else None, path)
    if drawing.previews:
        files[companions(path).previews] = animation(drawing.previews)
    replaced = path.is_file()
    write_all(files, overwrite)
    for other in companions(path):
        if replaced and other not in files:
            # What a replaced picture had beside it would speak of another one now.
            other.unlink(missing_ok=True)
    return list(files)
