"""The training loop: batches in, checkpoints and metrics out, resumable at every saved step.

Shapes: M understanding layers, J generation blocks.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from mos_cli.errors import InputError
from mos_cli.towers.generation import GenerationTower
from mos_cli.training import checkpoint
from mos_cli.training.batches import Batch, Batches
from mos_cli.training.ema import PowerEMA
from mos_cli.training.metrics import Journal, Metrics
from mos_cli.training.objective import Objective
from mos_cli.training.optimiser import build_optimisers, set_rates, start_states
from mos_cli.training.recipe import TrainRecipe
from mos_cli.training.stages import curriculum
from mos_cli.training.start import start_tower
from mos_cli.utils.files import atomic_write, make_folder
from mos_cli.utils.migration import current_recipe
from mos_cli.utils.threads import device_threads

RECIPE = "recipe.json"
MAY_CHANGE = {"steps", "compile", "ema", "log_every", "save_every", "sample_every", "sample_prompts"}
"""Settings that may differ when a run is resumed; so may the steps of its last stage."""


class Trainer:
    """A training run in a folder: network, optimisers, moving averages and the current step. Every process has one.

    Args:
        folder: the run's folder, shared by all processes; a run with a checkpoint in it is resumed.

    Raises:
        InputError: the folder holds a run of another recipe, or a damaged checkpoint.
        UsageError: the recipe's network cannot be built.
    """

    def __init__(self, recipe: TrainRecipe, batches: Batches, folder: Path, accelerator: Accelerator) -> None:
        self.recipe, self.batches, self.folder, self.accelerator = recipe, batches, folder, accelerator
        self.curriculum, self.device = curriculum(recipe), accelerator.device
        self._keep_recipe()
        torch.manual_seed(recipe.train.seed)
        self.tower = start_tower(recipe)
        objective, optimisers = Objective(self.tower, recipe.train.epsilon), build_optimisers(self.tower)
        if recipe.train.compile:
            # Shapes of stages and numbers of threads are compiled apart; past the limit nothing is.
            torch._dynamo.config.recompile_limit = 64
            (objective.compile_blocks if accelerator.is_fsdp2 else objective.compile_whole)()
        self.network, *self.optimisers = accelerator.prepare(objective, *optimisers)
        start_states(self._bare_optimisers())
        if accelerator.is_fsdp2:
            for block in self.tower.blocks:
                register_fsdp_forward_method(block, "cache_reference")
        self.ema = PowerEMA(self._parameters())
        self.step = 0
        if found := checkpoint.newest(folder):
            self._load(found)
        self.journal = Journal(folder, self.step, accelerator)

    def run(
        self,
        log: Callable[[Metrics], None],
        sample: Callable[["Trainer"], None],
        set_threads: Callable[[], None] = lambda: None,
    ) -> None:
        """Trains to the last step, saving and sampling on the way.

        Args:
            log: called for every step, `log_every` at a time; if it raises KeyboardInterrupt in any process, the run
                is saved and ends.
            sample: called every `sample_every` steps and after the last.
            set_threads: called at the start and after every report; it may set the number of CPU threads.
        """
        set_threads()
        train, steps, pending = self.recipe.train, self.curriculum.steps, []
        batches = self.batches.stream(self.step)
        batch = next(batches, None)
        started = time.perf_counter()
        while batch is not None:
            pending.append(self.advance(batch))
            # Made while the GPU still computes the step: nothing since has waited for it.
            batch = next(batches, None)
            last = self.step == steps
            saves, samples = (last or self.step % every == 0 for every in (train.save_every, train.sample_every))
            if saves or samples or self.step % train.log_every == 0:
                interrupted = self._report(pending, time.perf_counter() - started, log)
                pending = []
                if saves or interrupted:
                    self.save()
                if interrupted:
                    raise KeyboardInterrupt
                if samples:
                    sample(self)
                set_threads()
                started = time.perf_counter()

    def advance(self, batch: Batch) -> Tensor:
        """Computes one step; returns its loss, gradient norm and layer use [2 + J * M], on the device."""
        # The random routes depend on the step alone, so that a resumed run equals an uninterrupted one.
        torch.manual_seed(Random(f"{self.recipe.train.seed}/{self.step}/{self.batches.share.rank}").getrandbits(63))
        set_rates(self.optimisers, self.curriculum, self.step)
        self.tower.patch_spacing = self.curriculum.stage_at(self.step).patch_spacing
        loss, use_JM = self.network(batch)
        self.accelerator.backward(loss)
        norm: Any = self.accelerator.clip_grad_norm_(self.network.parameters(), self.recipe.train.clip)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad()
        self.step += 1
        self.ema.update(self._parameters(), self.step)
        return torch.cat([loss.detach()[None], _full(norm)[None], use_JM.detach().flatten()])

    def averaged_tower(self) -> GenerationTower:
        """The network with the moving average of its weights that the recipe chooses, for drawing and for export.

        All processes call it, and each gets the complete network.
        """
        tower = GenerationTower(**self.recipe.generation)
        average = self.ema.averages[self.recipe.train.ema]
        tower.load_state_dict({name: _full(weights) for name, weights in average.items()})
        tower.patch_spacing = self.tower.patch_spacing
        return tower.eval().to(self.device)  # type: ignore[arg-type, return-value]

    def save(self) -> None:
        """Writes a checkpoint; the previous one is kept until the new one is complete. All processes call it."""
        checkpoint.save(self.folder, self.step, self._state(), self.accelerator)
        self.journal.plot()

    def _load(self, path: Path) -> None:
        state = checkpoint.load(path, self._state(), self.accelerator)
        set_state_dict(
            self.tower, self._bare_optimisers(), model_state_dict=state["tower"], optim_state_dict=state["optimisers"]
        )
        self.step = int(path.name)

    def _state(self) -> dict[str, Any]:
        """The content of a checkpoint. Loading fills its tensors in place, those of the averages included."""
        tower, optimisers = get_state_dict(self.tower, self._bare_optimisers())
        return {"tower": tower, "optimisers": optimisers, "ema": self.ema.averages}

    def _bare_optimisers(self) -> list[torch.optim.Optimizer]:
        return [optimiser.optimizer for optimiser in self.optimisers]

    def _parameters(self) -> dict[str, Tensor]:
        return dict(self.tower.named_parameters())

    def _keep_recipe(self) -> None:
        """Writes the recipe into the run's folder, or compares it with the one there, apart from `MAY_CHANGE`."""
        path, kept = self.folder / RECIPE, self.recipe.model_dump(mode="json", exclude={"train": MAY_CHANGE})
        for stage in kept["stages"][-1:]:
            del stage["steps"]
        if self.accelerator.is_main_process and not path.exists():
            make_folder(self.folder)
            atomic_write(path, json.dumps(kept, indent=2).encode())
        self.accelerator.wait_for_everyone()
        if current_recipe(json.loads(path.read_bytes())) != kept:
            raise InputError(f"{self.folder} holds a run of another recipe: choose another folder with --run")

    def _report(self, pending: list[Tensor], seconds: float, log: Callable[[Metrics], None]) -> bool:
        """Passes the numbers of several steps to the journal and to `log`; whether a process was interrupted."""
        layers, interrupted = self.tower.states_shape[0], False
        rows = self.accelerator.reduce(torch.stack(pending), "mean").cpu()  # type: ignore[union-attr]
        stages = [self.curriculum.stage_at(self.step - 1 - back) for back in range(len(pending))]
        speed = sum(stage.batch for stage in stages) / seconds
        lines = []
        for step, row in enumerate(rows, start=self.step - len(pending) + 1):
            use_JM = row[2:].unflatten(0, (-1, layers))
            entropy_J = -(use_JM * use_JM.clamp_min(1e-9).log()).sum(dim=1)
            lines.append(
                Metrics(
                    step=step,
                    loss=row[0].item(),
                    gradient_norm=row[1].item(),
                    threads=device_threads(self.device),
                    images_per_second=speed,
                    route_entropy=entropy_J.mean().item(),
                    layer_use=tuple(use_JM.mean(dim=0).tolist()),
                    block_entropy=tuple(entropy_J.tolist()),
                )
            )
        self.journal.write(lines)
        try:
            for line in lines:
                log(line)
        except KeyboardInterrupt:
            interrupted = True
        # All processes end together: otherwise the others would wait for the interrupted one.
        flags = self.accelerator.gather(torch.tensor([interrupted], device=self.device))
        return bool(flags.any())  # type: ignore[union-attr]


def _full(tensor: Tensor) -> Tensor:
    """A sharded tensor, gathered."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
