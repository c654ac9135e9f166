"""The log of a run: a CSV of every step, TensorBoard, and a plot of the loss.

Shapes: M understanding layers, J generation blocks.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from mos_cli.utils.files import atomic_file, atomic_write

METRICS, PLOT, TENSORBOARD = "metrics.csv", "loss.png", "tensorboard"


@dataclass(frozen=True)
class Metrics:
    """The numbers of a step, over all processes.

    `route_entropy` is the entropy of the layers that a block chose, in nats, mean over blocks (0: always the same
    layer, ln(M): all equally often); `block_entropy` has it for each block. `layer_use` are the layers' shares over all
    blocks. `threads` is the number of CPU threads, on which the rounding depends; None on a GPU.
    """

    step: int
    loss: float
    gradient_norm: float
    threads: int | None
    images_per_second: float
    route_entropy: float
    layer_use: tuple[float, ...]
    block_entropy: tuple[float, ...]


class Journal:
    """Writes the metrics of the run in `folder`; only the main process does.

    Args:
        step: the step at which the run is resumed; lines of later steps are removed.
    """

    def __init__(self, folder: Path, step: int, accelerator: Accelerator) -> None:
        self.folder, self.accelerator = folder, accelerator
        if accelerator.is_main_process:
            _drop_after(folder / METRICS, step)
        accelerator.init_trackers(TENSORBOARD, init_kwargs={"tensorboard": {"purge_step": step + 1}})

    def write(self, lines: list[Metrics]) -> None:
        """Adds steps to the CSV and to TensorBoard."""
        if not self.accelerator.is_main_process:
            return
        path = self.folder / METRICS
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                layers = [f"layer_{index}" for index in range(len(lines[0].layer_use))]
                writer.writerow(
                    ["step", "loss", "gradient_norm", "images_per_second", "route_entropy", *layers, "threads"]
                )
            for line in lines:
                values = [line.loss, line.gradient_norm, line.images_per_second, line.route_entropy, *line.layer_use]
                writer.writerow([line.step, *(f"{value:.6g}" for value in values), line.threads])
        for line in lines:
            scalars = {"loss": line.loss, "gradient_norm": line.gradient_norm, "route_entropy": line.route_entropy}
            scalars |= {f"layer_use/{layer}": share for layer, share in enumerate(line.layer_use)}
            scalars |= {f"block_entropy/{block}": nats for block, nats in enumerate(line.block_entropy)}
            scalars["images_per_second"] = line.images_per_second
            self.accelerator.log(scalars, step=line.step)

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


def _drop_after(path: Path, step: int) -> None:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    # The last line of a run that was killed, or had no more room, may be cut.
    whole = [line for line in lines if line.endswith("\n")]
    kept = [line for line in whole if not line[0].isdigit() or int(line.split(",")[0]) <= step]
    if kept != lines:
        atomic_write(path, "".join(kept).encode(), overwrite=True)
