"""The log of a run: a CSV of every step, TensorBoard, and a plot of the loss.

Shapes: M understanding layers, J generation blocks.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from PIL.Image import Image

from mos_cli.utils.files import atomic_file, atomic_write

COLUMNS = (
    *("step", "loss", "gradient_norm", "muon_lr", "adamw_lr", "images_per_second"),
    *("validation_loss", "route_entropy"),
)
"""The columns of the CSV before the layers' shares."""
METRICS, PLOT, TENSORBOARD = "metrics.csv", "loss.png", "tensorboard"


@dataclass(frozen=True)
class Metrics:
    """The numbers of a step, over all processes.

    `route_entropy` is the entropy of the layers that a block chose, in nats, mean over blocks (0: always the same
    layer, ln(M): all equally often); `block_entropy` has it for each block. `layer_use` are the layers' shares over all
    blocks. `threads` is the number of CPU threads, on which the rounding depends; None on a GPU. `muon_lr` is None with
    a LoRA. `validation_loss` is that of the held-out pictures after the step, None where it was not measured.
    `seconds_left` is how long the rest of the run is expected to take.
    """

    step: int
    loss: float
    gradient_norm: float
    threads: int | None
    images_per_second: float
    route_entropy: float
    layer_use: tuple[float, ...]
    block_entropy: tuple[float, ...]
    muon_lr: float | None = None
    adamw_lr: float | None = None
    validation_loss: float | None = None
    seconds_left: float | None = None


class Journal:
    """Writes the metrics of the run in `folder`. All processes make one, and only the main one writes.

    Args:
        step: the step at which the run is resumed; lines of later steps are removed.
        layers: the number M of understanding layers.
        project: the name of the run for the trackers that the accelerator has beside TensorBoard.
    """

    def __init__(self, folder: Path, step: int, accelerator: Accelerator, layers: int, project: str) -> None:
        self.folder, self.accelerator = folder, accelerator
        self.columns = [*COLUMNS, *(f"layer_{index}" for index in range(layers)), "threads"]
        if accelerator.is_main_process:
            _drop_after(folder / METRICS, step, self.columns)
        # The others read the losses as well, and not those of steps that were given up.
        accelerator.wait_for_everyone()
        self._tensorboard = TensorBoardTracker(TENSORBOARD, folder, purge_step=step + 1)
        accelerator.log_with = [self._tensorboard, *accelerator.log_with]
        accelerator.init_trackers(project)

    def write(self, lines: list[Metrics]) -> None:
        """Adds steps to the CSV, to TensorBoard and to the other trackers."""
        if not self.accelerator.is_main_process:
            return
        path = self.folder / METRICS
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(self.columns)
            for line in lines:
                values = [getattr(line, name) for name in COLUMNS[1:]]
                shown = ("" if value is None else f"{value:.6g}" for value in (*values, *line.layer_use))
                writer.writerow([line.step, *shown, line.threads])
        for line in lines:
            scalars = {name: value for name in COLUMNS[1:] if (value := getattr(line, name)) is not None}
            scalars |= {f"layer_use/{layer}": share for layer, share in enumerate(line.layer_use)}
            scalars |= {f"block_entropy/{block}": nats for block, nats in enumerate(line.block_entropy)}
            self.accelerator.log(scalars, step=line.step)

    def show(self, drawn: Sequence[tuple[Image, str]], step: int) -> None:
        """Adds samples to TensorBoard, each under its prompt or, without one, its place."""
        for index, (picture, prompt) in enumerate(drawn):
            name = f"samples/{index} {prompt}".strip()
            self._tensorboard.log_images({name: np.asarray(picture.convert("RGB"))[None]}, step, dataformats="NHWC")

    def losses(self) -> list[float]:
        """The losses of all steps so far."""
        path = self.folder / METRICS
        if not path.exists():
            return []
        with path.open(encoding="utf-8") as file:
            return [float(row["loss"]) for row in csv.DictReader(file)]

    def plot(self) -> None:
        """Draws the losses so far, and their running mean, on a logarithmic scale."""
        if not self.accelerator.is_main_process:
            return
        from matplotlib.figure import Figure

        with (self.folder / METRICS).open(encoding="utf-8") as file:
            points = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
        smooth = [points[0][1]]
        for step, loss in points[1:]:
            # Averages about the last tenth of the run so far.
            smooth.append(smooth[-1] + 10 / (10 + step) * (loss - smooth[-1]))
        steps, losses = zip(*points, strict=True)
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(steps, losses, linewidth=0.5, alpha=0.4)
        axes.plot(steps, smooth)
        axes.set(xlabel="step", ylabel="loss", yscale="log")
        with atomic_file(self.folder / PLOT, overwrite=True) as path:
            figure.savefig(path, dpi=120)


def _drop_after(path: Path, step: int, columns: list[str]) -> None:
    """Removes the lines of later steps; those of an earlier version of mos get the present columns."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    # The last line of a run that was killed, or had no more room, may be cut.
    whole = [line for line in lines if line.endswith("\n")]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(row for row in csv.DictReader(whole) if int(row["step"]) <= step)
    if (kept := text.getvalue()) != "".join(lines):
        atomic_write(path, kept.encode(), overwrite=True)
