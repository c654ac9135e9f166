"""`mos train`: from a recipe and pictures to a bundle or a LoRA file."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from mos_cli.cli.completion import model_names, recipe_names
from mos_cli.cli.options import ArtFile, as_text
from mos_cli.cli.output import stderr, stdout
from mos_cli.cli.processes import check_processes, is_worker, run_in_processes
from mos_cli.cli.progress import stop_between_steps
from mos_cli.cli.unused import print_unused
from mos_cli.errors import UsageError
from mos_cli.utils.durations import as_clock, parse_duration

if TYPE_CHECKING:
    from mos_cli.training.metrics import Metrics

LINE_INTERVAL = 5.0
"""Seconds between two lines of progress where the output is no terminal."""


def train(
    recipe: Annotated[
        str,
        typer.Argument(
            autocompletion=recipe_names,
            help="A TOML file, or the name of a shipped recipe: finetune, finetune-lora, emoji, ...",
        ),
    ],
    start_from: Annotated[
        str | None,
        typer.Option(
            "--from",
            autocompletion=model_names,
            help="The model to continue, or the base model that a router is trained for: name, path or hub id.",
            show_default="the recipe's",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Folder of captioned pictures, see docs/finetune.md.", show_default="the recipe's"),
    ] = None,
    caption: Annotated[
        str | None,
        typer.Option(
            "--caption",
            metavar="TEXT",
            callback=as_text,
            help='That of pictures without one: "a photo of {folder}", from the name of its folder.',
        ),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse a folder with files that cannot be used.")] = False,
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the new model.", show_default="the recipe's")
    ] = None,
    art: ArtFile = None,
    run: Annotated[
        Path | None,
        typer.Option("--run", help="Folder of the run; a run found there goes on.", show_default="runs/NAME"),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(
            "--export",
            help="Where the bundle, or the LoRA file, goes when the run is done.",
            show_default="RUN/bundle or RUN/NAME.safetensors",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Training steps, instead of the recipe's.")
    ] = None,
    duration: Annotated[
        str | None,
        typer.Option(
            "--time",
            metavar="TIME",
            help="Time to train for, instead of a number of steps: 90s, 12m, 1.5h. The learning rates fall in time; "
            "stages have its parts in proportion to their steps.",
        ),
    ] = None,
    extend: Annotated[
        bool,
        typer.Option("--extend", help="Go on from before the learning rates fell, for a run with more --steps."),
    ] = False,
    tracker: Annotated[
        list[str] | None,
        typer.Option(
            "--tracker",
            metavar="NAME",
            help="Send the metrics to a tracker of accelerate, too: wandb, aim, trackio, ...; repeatable.",
        ),
    ] = None,
    processes: Annotated[
        int,
        typer.Option("--processes", min=1, help="Processes of this machine that share every batch: one for each GPU."),
    ] = 1,
    ema: Annotated[
        str | None,
        typer.Option(
            "--ema", help="Moving average to export: 0.05 or 0.10 of the run wide.", show_default="the recipe's"
        ),
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Print the recipe and stop: a start for one of your own.")
    ] = False,
) -> None:
    """Train a model and export it as a bundle. Ctrl-C stops after the current step; the same command goes on.

    On several machines: accelerate launch -m mos_cli train RECIPE; with --use_fsdp the network is sharded.
    """
    from mos_cli.bundles.loras import check_lora_name
    from mos_cli.training.recipe import load_recipe, recipe_path
    from mos_cli.utils.extras import require
    from mos_cli.utils.files import check_writable
    from mos_cli.utils.quiet import quieten

    if show:
        stdout.print(
            recipe_path(recipe).read_text(encoding="utf-8"), end="", markup=False, highlight=False, soft_wrap=True
        )
        return
    quieten()
    from mos_cli.adapters.recipe import is_base_model_recipe

    pictures = None if data is None else str(data)
    if is_base_model_recipe(path := recipe_path(recipe)):
        if tracker or processes > 1 or duration is not None or ema is not None or extend or art is not None:
            raise UsageError(
                "--art, --ema, --extend, --processes, --time and --tracker do not go with "
                f"{recipe}, which trains on a base model"
            )
        from mos_cli.cli.train_base_model import train_on_base_model

        values = {"data": pictures, "base": start_from, "name": name, "caption": caption, "steps": steps}
        given = {field: value for field, value in values.items() if value is not None}
        train_on_base_model(path, given, run=run, export=export, strict=strict)
        return
    require("training", "train", "inflect", "matplotlib", "tensorboard")
    if duration is not None and steps is not None:
        raise UsageError("--time and --steps exclude each other: a run ends by one of them")
    overrides = {"steps": steps, "time": _seconds(duration), "ema": ema}
    loaded = load_recipe(
        recipe,
        {name: value for name, value in overrides.items() if value is not None},
        start_from=start_from,
        data=pictures,
        caption=caption,
        name=name,
    )
    if extend and loaded.train.time is not None:
        raise UsageError("--extend is for more --steps: a run with a time goes on with a longer --time")
    folder = run or Path("runs") / loaded.bundle.name
    if loaded.lora is not None:
        require("a LoRA", "train", "peft")
        target = export or folder / f"{loaded.bundle.name}.safetensors"
        check_lora_name(target)
    else:
        target = export or folder / "bundle"
    for place in (folder, target):
        check_writable(place if loaded.lora is None else place.parent)
    if processes > 1 and not is_worker():
        check_processes(processes)
        raise typer.Exit(run_in_processes(sys.argv[1:], processes))
    from mos_cli.bundles.bundle import INDEX
    from mos_cli.datasets.art.file import data_folder
    from mos_cli.training.export import export as export_bundle
    from mos_cli.training.launch import check_tracker
    from mos_cli.training.run import train as run_training
    from mos_cli.training.run_recipe import RECIPE
    from mos_cli.training.sources import Reports
    from mos_cli.training.stages import curriculum
    from mos_cli.utils.files import LOCK, check_folder, sole_user

    for each in tracker or ():
        check_tracker(each)
    main_process = os.environ.get("RANK", "0") == "0"
    if main_process:
        check_folder(folder, RECIPE, LOCK)
        if export is not None and loaded.lora is None:
            check_folder(export, INDEX, "card.md")
    with (
        sole_user(folder, "another training", needed=main_process),
        _progress(main_process) as show_progress,
        stop_between_steps() as check_interrupt,
    ):
        display = _Display(show_progress, check_interrupt, curriculum(loaded).steps, loaded.train.time)
        reports = Reports(
            say=lambda line: _say(line) if main_process else None,
            progress=lambda done, total: display.advance("checking the pictures", done, total),
            unused=print_unused if main_process else lambda _: None,
        )
        reports.say(f"training {loaded.bundle.name} in {folder}")
        try:
            trainer = run_training(
                loaded,
                art or data_folder(),
                folder,
                display.log,
                extend=extend,
                strict=strict,
                trackers=tracker or (),
                reports=reports,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the same command goes on") from None
        made = export_bundle(trainer, target)
    trainer.accelerator.end_training()
    if made is not None:
        stdout.print(f"{made}", soft_wrap=True)


ShowProgress = Callable[[str, int, int, str], None]
"""Shows what is done, how much of it, of how much, and a text beside it."""


class _Display:
    """Shows how far a training is, and stops it between steps.

    Args:
        steps: of the run.
        time: seconds of the run, where it ends by the clock.
    """

    def __init__(self, show: ShowProgress, check_interrupt: Callable[[], None], steps: int, time: float | None) -> None:
        self.show, self.check_interrupt, self.steps, self.time = show, check_interrupt, steps, time
        self._validation = ""

    def advance(self, what: str, done: int, total: int, shown: str = "") -> None:
        """Raises KeyboardInterrupt after Ctrl-C."""
        self.show(what, done, total, shown)
        self.check_interrupt()

    def log(self, metrics: "Metrics") -> None:
        """Shows the metrics of a step, with the newest validation loss."""
        if metrics.validation_loss is not None:
            self._validation = f"  validation {metrics.validation_loss:.4f}"
        left = "" if metrics.seconds_left is None else f"  {as_clock(metrics.seconds_left)} left"
        shown = f"loss {metrics.loss:.4f}{self._validation}  {metrics.images_per_second:.3g} images/s{left}"
        if self.time is None:
            self.advance("training", metrics.step, self.steps, shown)
        elif metrics.seconds_left is not None:
            used = round(self.time - metrics.seconds_left)
            self.advance("seconds of training", used, round(self.time), f"step {metrics.step}  {shown}")


@contextmanager
def _progress(main_process: bool) -> Iterator[ShowProgress]:
    """Shows how far work is: in a terminal as bars, else in a line every few seconds."""
    if not main_process:
        yield lambda what, done, total, shown: None
        return
    if not stderr.is_terminal:
        said: dict[str, float] = {}

        def line(what: str, done: int, total: int, shown: str) -> None:
            now = time.monotonic()
            if what not in said or now - said[what] >= LINE_INTERVAL or done == total:
                said[what] = now
                _say(f"{what} {done}/{total}  {shown}".rstrip())

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[shown]}"))
    with Progress(*columns, console=stderr) as bars:
        tasks: dict[str, TaskID] = {}

        def bar(what: str, done: int, total: int, shown: str) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total, shown="")
            bars.update(tasks[what], completed=done, shown=shown)

        yield bar


def _say(line: str) -> None:
    stderr.print(line, markup=False, highlight=False, soft_wrap=True)


def _seconds(duration: str | None) -> float | None:
    """The value of --time; raises UsageError if it is no time."""
    try:
        return None if duration is None else parse_duration(duration)
    except ValueError as error:
        raise UsageError(f"--time: {error}") from None
