"""The training loop: batches in, a checkpoint folder out, resumable at every saved step.

Shapes: B batch, T context tokens, J generation blocks, K kept layers, M understanding layers.
"""

import csv
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from mos_cli.errors import InputError, UsageError
from mos_cli.runtime.files import atomic_write, make_folder
from mos_cli.sampling.flow import velocity_loss
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.router import Route
from mos_cli.training.batches import Batch, Batches
from mos_cli.training.optimiser import build_optimisers, build_schedule
from mos_cli.training.recipe import TrainRecipe

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.csv"
RECIPE = "recipe.json"
MAY_CHANGE = {"steps", "compile", "save_every", "sample_every", "sample_prompts"}
"""Settings of a run that may differ when it is taken up again."""


@dataclass(frozen=True)
class Metrics:
    """One line of the log. `route_entropy` is that of the layers chosen, in nats; ln(M) = all used alike."""

    step: int
    loss: float
    gradient_norm: float
    images_per_second: float
    route_entropy: float
    layer_use: tuple[float, ...]


class Trainer:
    """A run in a folder: network, optimisers, moving average, and where it stands.

    Args:
        folder: the run's folder; a checkpoint in it is taken up again.

    Raises:
        InputError: the folder holds a run of another recipe, or a damaged checkpoint.
        UsageError: the recipe's network cannot be built.
    """

    def __init__(self, recipe: TrainRecipe, batches: Batches, folder: Path) -> None:
        train = recipe.train
        self.recipe, self.batches, self.folder = recipe, batches, folder
        make_folder(folder)
        self._keep_recipe()
        self.accelerator = Accelerator(mixed_precision="bf16" if train.precision == "bf16" else "no")
        torch.manual_seed(train.seed)
        self.device = self.accelerator.device
        try:
            self.tower = GenerationTower(**recipe.generation)
        except TypeError as error:
            raise UsageError(f"the recipe's [generation] is wrong: {error}") from None
        self.tower.to(self.device)  # type: ignore[arg-type]
        self.ema = EMAModel(self.tower.parameters(), decay=train.ema)
        self.optimisers = build_optimisers(self.tower, train)
        self.schedules = [build_schedule(optimiser, train) for optimiser in self.optimisers]
        self.network = torch.compile(self.tower) if train.compile else self.tower
        self.step = 0
        if (folder / CHECKPOINT).is_file():
            self._load()

    def run(self, log: Callable[[Metrics], None], sample: Callable[["Trainer"], None]) -> None:
        """Trains until the recipe's last step, saving and sampling on the way.

        Args:
            log: called after every step; if it raises KeyboardInterrupt, the run is saved and ends.
            sample: called every `sample_every` steps and after the last.
        """
        train = self.recipe.train
        while self.step < train.steps:
            metrics = self._advance()
            _append(self.folder / METRICS, metrics)
            try:
                log(metrics)
            except KeyboardInterrupt:
                self.save()
                raise
            last = self.step == train.steps
            if last or self.step % train.save_every == 0:
                self.save()
            if last or self.step % train.sample_every == 0:
                sample(self)

    def averaged_tower(self) -> GenerationTower:
        """A copy of the network with the averaged weights: the one to draw with and to ship."""
        tower = GenerationTower(**self.recipe.generation)
        self.ema.copy_to(tower.parameters())
        return tower.eval().to(self.device)  # type: ignore[arg-type, return-value]

    def _keep_recipe(self) -> None:
        """Writes the recipe into the run's folder, or compares: only how long and how often may change on the way."""
        path = self.folder / RECIPE
        mine = self.recipe.model_dump_json(indent=2, exclude={"train": MAY_CHANGE})
        if path.exists() and path.read_text(encoding="utf-8") != mine:
            raise InputError(f"{self.folder} holds a run of another recipe: choose another folder with --run")
        atomic_write(path, mine.encode(), overwrite=True)

    def _advance(self) -> Metrics:
        started = time.perf_counter()
        batch = self.batches.make(self.step).to(self.device)
        # The routes explored depend on the step alone, so that a resumed run equals one never stopped.
        torch.manual_seed(self.recipe.train.seed + self.step)
        loss, route = self._loss(batch)
        self.accelerator.backward(loss)
        norm = nn.utils.clip_grad_norm_(self.tower.parameters(), self.recipe.train.clip)
        for optimiser, schedule in zip(self.optimisers, self.schedules, strict=True):
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
        self.ema.step(self.tower.parameters())
        self.step += 1
        use = _layer_use(route, batch.mask_BT, self.tower.states_shape[0])
        seconds = time.perf_counter() - started
        entropy = float(-(use * use.clamp_min(1e-9).log()).sum())
        return Metrics(self.step, loss.item(), norm.item(), len(batch.t_B) / seconds, entropy, tuple(use.tolist()))

    def _loss(self, batch: Batch) -> tuple[Tensor, Route]:
        with self.accelerator.autocast():
            bank = self.tower.read(batch.states_BTMS, batch.mask_BT)
            x_hat, route = self.network(batch.z_BCHW, batch.t_B, bank, epsilon=self.recipe.train.epsilon)
        return velocity_loss(x_hat, batch.z0_BCHW, batch.t_B), route

    def save(self) -> None:
        """Replaces the checkpoint; the old one stays until the new one is whole."""
        target, fresh = self.folder / CHECKPOINT, self.folder / f"{CHECKPOINT}.new"
        torch.save(
            {
                "step": self.step,
                "tower": self.tower.state_dict(),
                "ema": self.ema.state_dict(),
                "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
                "schedules": [schedule.state_dict() for schedule in self.schedules],
            },
            fresh,
        )
        fresh.replace(target)

    def _load(self) -> None:
        try:
            state = torch.load(self.folder / CHECKPOINT, weights_only=True, map_location=self.device)
            self.tower.load_state_dict(state["tower"])
        except (RuntimeError, KeyError, OSError, EOFError, UnpicklingError) as error:
            raise InputError(f"{self.folder / CHECKPOINT} is damaged: {error}") from None
        self.ema.load_state_dict(state["ema"])
        for optimiser, kept in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(kept)
        for schedule, kept in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(kept)
        self.step = state["step"]
        _forget_after(self.folder / METRICS, self.step)


def _layer_use(route: Route, mask_BT: Tensor, layers: int) -> Tensor:
    """Share of the choices that fell on each layer, [M]."""
    return torch.bincount(route.ids_BTJK[mask_BT].flatten(), minlength=layers).float() / (
        mask_BT.sum() * route.ids_BTJK[0, 0].numel()
    )


def _forget_after(path: Path, step: int) -> None:
    """Drops the lines a killed run wrote after its last checkpoint: those steps are about to be made again."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if not line[0].isdigit() or int(line.split(",")[0]) <= step]
    if kept != lines:
        atomic_write(path, "".join(kept).encode(), overwrite=True)


def _append(path: Path, metrics: Metrics) -> None:
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            layers = [f"layer_{index}" for index in range(len(metrics.layer_use))]
            writer.writerow(["step", "loss", "gradient_norm", "images_per_second", "route_entropy", *layers])
        values = [metrics.loss, metrics.gradient_norm, metrics.images_per_second, metrics.route_entropy]
        writer.writerow([metrics.step, *(f"{value:.5g}" for value in [*values, *metrics.layer_use])])
