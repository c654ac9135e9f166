"""Drawing jobs and writing their files, in batches or alone; a job that fails does not stop the others."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

from rich.progress import Progress

from mos_cli.cli.jobs import Job, JobGroup, RefusedJob, report_failed
from mos_cli.cli.output import Report, print_bytes, print_warning
from mos_cli.cli.progress import sampling_bars, stop_between_steps
from mos_cli.errors import InputError, MosError
from mos_cli.utils.counts import counted

if TYPE_CHECKING:
    from PIL.Image import Image

    from mos_cli.config.recipe import Recipe
    from mos_cli.config.settings import RunSettings
    from mos_cli.images.inputs import Inputs
    from mos_cli.images.manifest import Manifest
    from mos_cli.inference.drawing import Drawing
    from mos_cli.inference.pipeline import MoSPipeline
    from mos_cli.routing.trace import Recording, RecordOptions
    from mos_cli.sampling.sampler import Observer, Step
    from mos_cli.server.client import RemotePipeline


@dataclass
class JobDrawer:
    """Draws the jobs of a run.

    Attributes:
        manifest: where it is recorded what becomes of each job.
        total: the number of jobs of the run, those of other processes included.
        settings: how much of the trace is written, what the pictures say of themselves, whether they are listed in the
            log; those without metadata are not.
        observers: called after every step of every picture.
        drawn: called with every job and its picture, when it is written.
        show: prints a picture in the terminal.
        failed, written: the numbers of jobs that did and did not fail.
    """

    pipeline: "MoSPipeline | RemotePipeline"
    manifest: "Manifest"
    total: int
    settings: "RunSettings"
    report: Report
    record_options: "RecordOptions"
    observers: Sequence["Observer"] = ()
    route_from: "Recording | None" = None
    drawn: "Callable[[Job, Image], None]" = lambda job, image: None
    show: "Callable[[Image], None] | None" = None
    failed: int = 0
    written: int = 0

    def draw(self, groups: Sequence[JobGroup]) -> int:
        """Draws and writes every job that is not done, see `group_jobs`.

        The first Ctrl-C stops after the current step, the second at once; pictures that are written stay.

        Returns:
            How many jobs failed.

        Raises:
            MosError: the only job failed.
        """
        missing = [job for group in groups for _, job in group if isinstance(job, Job) and not job.done]
        self._note_lost_metadata(missing)
        with self.report.stage("reading"):
            self.pipeline.encode_ahead([job.recipe for job in missing])
        with sampling_bars(self.report) as bars, stop_between_steps() as check_interrupt:
            for group in groups:
                number, job = group[0]
                if isinstance(job, RefusedJob):
                    self.failed += 1
                    refuse(job, number, self.manifest, self.report)
                    continue
                batch = {number: job for number, job in group if isinstance(job, Job)}
                if all(job.done for job in batch.values()):
                    continue
                started = perf_counter()
                try:
                    drawings = self._draw(batch, bars, check_interrupt)
                except KeyboardInterrupt:
                    raise KeyboardInterrupt(f"{self.written} of {counted(len(missing), 'picture')} written") from None
                seconds = (perf_counter() - started) / len(batch)
                for number, job in batch.items():
                    if not job.done:
                        self._write(job, number, drawings[number], seconds, bars)
        self._note_graphs()
        return self.failed

    def _note_graphs(self) -> None:
        graphs = self.pipeline.graphs
        if graphs is None:
            return
        if graphs.failure is not None:
            note = f"steps are not replayed as CUDA graphs: {graphs.failure}"
            self.report.note("note", note, note=note)
        if graphs.passes:
            self.report.lines["graphs"] = graphs.note

    def _note_lost_metadata(self, missing: Sequence[Job]) -> None:
        if self.settings.metadata == "none" and missing:
            nothing_kept = self.settings.trace == "off" or missing[0].path == Path("-")
            kept = "" if nothing_kept else "; the trace beside it still holds the prompt"
            note = f"without metadata, mos replay cannot draw the picture again{kept}"
            self.report.note("note", note, note=note)

    def _draw(
        self, batch: Mapping[int, Job], bars: Progress, check_interrupt: Callable[[], None]
    ) -> "Mapping[int, Drawing | MosError]":
        """The drawings of a batch, or what went wrong."""
        first = next(iter(batch.values()))
        task = bars.add_task(_named(list(batch), self.total), total=first.recipe.steps, unit="steps")

        def observe(step: "Step") -> None:
            bars.update(task, completed=step.index + 1)
            for number in batch if self.report.json else ():
                self.report.event("step", index=number, step=step.index + 1, steps=step.total, t=round(step.t, 4))
            check_interrupt()

        try:
            with self.report.stage("sampling"):
                options = {"record_options": self.record_options, "route_from": self.route_from}
                return _drawings(self.pipeline, batch, [observe, *self.observers], options)
        except MosError as error:
            return dict.fromkeys(batch, error)
        finally:
            bars.remove_task(task)

    def _write(self, job: Job, number: int, drawing: "Drawing | MosError", seconds: float, bars: Progress) -> None:
        """Writes a picture that took so many seconds; raises the error of the only one."""
        settings = self.settings

        def record(status: Literal["writing", "done", "failed"], **more: Any) -> None:
            self.manifest.record(status, job.key, number, job.recipe.prompt, seed=job.recipe.seed, **more)

        started = perf_counter()
        try:
            if isinstance(drawing, MosError):
                raise drawing
            with self.report.stage("writing"):
                files = _save(drawing, job, settings, record)
        except MosError as error:
            record("failed", error=str(error), seconds=seconds)
            if self.total == 1:
                raise
            self.failed += 1
            report_failed(job, number, error, self.report)
            return
        self.written += 1
        record("done", files=files, seconds=seconds + perf_counter() - started)
        if settings.log and settings.metadata != "none" and files:
            logged = log_drawn(next(iter(files)), drawing.record.recipe)
            self.settings = settings.model_copy(update={"log": logged})
        self.report.picture(list(files), index=number, prompt=job.recipe.prompt, seed=job.recipe.seed)
        self.drawn(job, drawing.image)
        if self.show is not None:
            # A bar that moves would write into the picture.
            bars.stop()
            self.show(drawing.image)
            bars.start()


def refuse(job: RefusedJob, number: int, manifest: "Manifest", report: Report) -> None:
    """Reports a job that is not drawn, and records it."""
    report_failed(job, number, job.error, report)
    manifest.record("failed", f"refused-{number}", number, job.subject, error=str(job.error))


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


def _save(drawing: "Drawing", job: Job, settings: "RunSettings", record: Callable[..., None]) -> dict[Path, bytes]:
    """Writes a picture; if its name was taken while it was drawn, under the next one that is free.

    Returns:
        The files written, the picture first; none for a picture that went to stdout.
    """
    from mos_cli.images.companions import write_picture
    from mos_cli.images.naming import STDOUT
    from mos_cli.utils.files import NameTakenError

    if job.path == STDOUT:
        print_bytes(drawing.encode(Path("stdout.png"), settings.metadata).data)
        return {}
    names, path = job.names, job.path
    further = names.paths_after(path, job.recipe, job.source)
    while True:
        files = drawing.files(path, trace=settings.trace, metadata=settings.metadata)
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
    from mos_cli.images.sheets import sheet_png
    from mos_cli.utils.files import atomic_write

    atomic_write(path, sheet_png(image), overwrite)
    report.note(kind, str(path), file=str(path))
