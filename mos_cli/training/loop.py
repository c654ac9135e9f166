"""The training loop: batches in, checkpoints and metrics out, resumable at every saved step.

Shapes: M understanding layers, J generation blocks.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import register_fsdp_forward_method

from mos_cli.errors import DivergenceError, InputError, UsageError
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.lora import add_lora, merge_lora
from mos_cli.training import checkpoint
from mos_cli.training.batches import Batch, Batches
from mos_cli.training.divergence import DivergenceMonitor
from mos_cli.training.ema import PowerEMA
from mos_cli.training.graphs import TrainingGraphs, batch_capture, training_capture
from mos_cli.training.metrics import Journal, Metrics
from mos_cli.training.objective import Objective
from mos_cli.training.optimiser import build_optimisers, rates_at, set_rates, start_states
from mos_cli.training.pace import Pace
from mos_cli.training.recipe import TrainRecipe
from mos_cli.training.run_recipe import keep_recipe
from mos_cli.training.sharding import full_tensor, local_part
from mos_cli.training.stages import Curriculum
from mos_cli.training.start import guidance_teacher, start_tower
from mos_cli.training.timer import Timer, TimeUsed
from mos_cli.utils.counts import counted
from mos_cli.utils.durations import as_clock
from mos_cli.utils.threads import device_threads


class Trainer:
    """A training run in a folder: network, optimisers, moving averages and the current step. Every process has one.

    Args:
        folder: the run's folder, shared by all processes; a run with a checkpoint in it is resumed.
        extend: go on from the last state before the learning rates fell, so that a run with more steps is the same as
            if it had been planned so.
        say: takes lines for the user.

    Raises:
        InputError: the folder holds a run of another recipe, its checkpoints are damaged, or there is none to extend.
        UsageError: the recipe's network cannot be built, or the run has done more steps, or used more time, than the
            recipe says.
    """

    def __init__(
        self,
        recipe: TrainRecipe,
        batches: Batches,
        folder: Path,
        accelerator: Accelerator,
        *,
        extend: bool = False,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.recipe, self.batches, self.folder, self.accelerator = recipe, batches, folder, accelerator
        self.say = say if accelerator.is_main_process else lambda _: None
        self.device = accelerator.device
        self.timer = None if recipe.train.time is None else Timer(self.curriculum, accelerator)
        keep_recipe(recipe, folder, accelerator)
        torch.manual_seed(recipe.train.seed)
        self.tower = start_tower(recipe)
        if recipe.lora is not None:
            add_lora(self.tower, recipe.lora.rank, recipe.lora.scaling)
        objective = Objective(self.tower, recipe.train.epsilon, guidance_teacher(recipe))
        self.graphs = self._make_graphs()
        if (capture := batch_capture(accelerator)) is not None:
            batches.replay(capture, lambda line: self.say(line))
        optimisers = build_optimisers(self.tower, capturable=self.graphs is not None)
        if recipe.train.compile:
            # Shapes of stages and numbers of threads are compiled apart; past the limit nothing is.
            torch._dynamo.config.recompile_limit = 64
            (objective.compile_blocks if accelerator.is_fsdp2 else objective.compile_whole)()
        self.network, *self.optimisers = accelerator.prepare(objective, *optimisers)
        start_states(self._bare_optimisers())
        if accelerator.is_fsdp2:
            for network in (self.tower, objective.teacher):
                for block in () if network is None else network.blocks:
                    register_fsdp_forward_method(block, "cache_reference")
        self.ema = PowerEMA(self._parameters())
        self.step = 0
        self.rates = (0.0, 0.0)
        self._resume(extend)
        self.journal = Journal(folder, self.step, accelerator, self.tower.states_shape[0], recipe.bundle.name)
        self._divergence = DivergenceMonitor(self.journal.losses())

    @property
    def curriculum(self) -> Curriculum:
        """The curriculum of the batches; in a run with a time its stages begin one by one."""
        return self.batches.curriculum

    def run(
        self,
        log: Callable[[Metrics], None],
        sample: Callable[["Trainer"], None],
        set_threads: Callable[[], None] = lambda: None,
    ) -> None:
        """Trains to the last step, or until its time is over, saving and sampling on the way.

        Args:
            log: called for every step, `log_every` at a time; if it raises KeyboardInterrupt in any process, the run
                is saved and ends.
            sample: called every `sample_every` steps and after the last.
            set_threads: called at the start and after every report; it may set the number of CPU threads.

        Raises:
            DivergenceError: the loss or the weights are no longer finite, or the loss is far above its start. The last
                checkpoint is from before.
            InputError: a checkpoint cannot be written. Those before it are whole.
        """
        set_threads()
        train, timer, pending, rates = self.recipe.train, self.timer, [], []
        pace = Pace(self.curriculum, train.seed, self.step)
        batches = self._stream()
        batch = next(batches, None)
        started = time.perf_counter()
        while batch is not None:
            pending.append(self.advance(batch))
            rates.append(self.rates)
            # Made while the GPU still computes the step: nothing since has waited for it.
            batch = next(batches, None)
            last = batch is None
            saves, samples = (last or self.step % every == 0 for every in (train.save_every, train.sample_every))
            saves = saves or (timer is None and self.step == self.curriculum.decay_from)
            if saves or samples or self.step % train.log_every == 0:
                seconds, validation = time.perf_counter() - started, self.validate() if saves else None
                left = pace.seconds_left(self.step) if timer is None else timer.seconds_left
                interrupted = self._report(pending, rates, seconds, validation, left, log)
                pending, rates = [], []
                if saves or interrupted:
                    self.save()
                if interrupted:
                    raise KeyboardInterrupt
                if samples:
                    sample(self)
                set_threads()
                started = time.perf_counter()

    def _stream(self) -> Iterator[Batch]:
        """The batches to the last step, or until the time is over; the clock is read before each is handed out."""
        if (timer := self.timer) is None:
            yield from self.batches.stream(self.step)
            return
        timer.start()
        while not timer.is_over:
            # Batches are picked ahead, for a stage that may be over by then.
            self.batches.follow(timer.curriculum)
            for batch in self.batches.stream(self.step):
                yield batch
                if timer.read(self.step):
                    break

    def advance(self, batch: Batch) -> Tensor:
        """Computes one step; returns its loss, gradient norm and layer use [2 + J * M], on the device."""
        # The random routes depend on the step alone, so that a resumed run equals an uninterrupted one.
        torch.manual_seed(Random(f"{self.recipe.train.seed}/{self.step}/{self.batches.share.rank}").getrandbits(63))
        self.rates = rates_at(self.curriculum, self.step, 0.0 if self.timer is None else self.timer.used)
        stage = self.curriculum.stage_at(self.step)
        self.tower.patch_spacing = stage.patch_spacing
        if self.graphs is not None and stage.first == self.step and not self.graphs.failed:
            # None of the kinds of the stage before comes again.
            self.graphs = self._make_graphs()
        if self.graphs is None:
            numbers = self._learn(batch, self.rates)
        else:
            # Filled, not copied from the host, which would make it wait.
            numbers = self.graphs(batch, tuple(torch.full((), rate, device=self.device) for rate in self.rates))
        self.step += 1
        self.ema.update(self._parameters(), self.step)
        return numbers

    def _make_graphs(self) -> TrainingGraphs | None:
        capture = training_capture(self.accelerator)
        if capture is None:
            return None
        return TrainingGraphs(
            self._learn, capture, lambda cause: self.say(f"training goes on without CUDA graphs, slower: {cause}")
        )

    def _learn(self, batch: Batch, rates: Sequence[float | Tensor]) -> Tensor:
        """The part of a step that a CUDA graph may be captured of: loss, gradients and new weights."""
        set_rates(self.optimisers, rates)
        try:
            loss, use_JM = self.network(batch)
            self.accelerator.backward(loss)
            norm: Any = self.accelerator.clip_grad_norm_(self.network.parameters(), self.recipe.train.clip)
            for optimiser in self.optimisers:
                optimiser.step()
        finally:
            for optimiser in self.optimisers:
                optimiser.zero_grad()
        return torch.cat([loss.detach()[None], full_tensor(norm)[None], use_JM.detach().flatten()])

    def validate(self) -> float | None:
        """The mean loss of the held-out pictures, at four times each; None without any. All processes compute it."""
        losses = []
        for batch in self.batches.validation(self.step):
            with torch.no_grad():
                losses.append((self.network(batch, validate=True)[0], len(batch.t_B)))
        count = sum(weight for _, weight in losses)
        return sum(loss.item() * weight for loss, weight in losses) / count if losses else None

    def averaged_tower(self) -> GenerationTower:
        """The network with the moving average of its weights that the recipe chooses, for drawing and for export.

        All processes call it, and each gets the complete network.
        """
        tower = GenerationTower(**self.recipe.generation)
        weights = self.averaged_weights()
        if (lora := self.recipe.lora) is not None:
            frozen = {name: full_tensor(weight) for name, weight in self.tower.state_dict().items()}
            weights = merge_lora(frozen | weights, lora.rank, lora.scaling)
        tower.load_state_dict(weights)
        tower.patch_spacing = self.tower.patch_spacing
        return tower.eval().to(self.device)  # type: ignore[arg-type, return-value]

    def averaged_weights(self) -> dict[str, Tensor]:
        """The moving average of the weights that learn, by their names; all processes call it."""
        return {name: full_tensor(weights) for name, weights in self.ema.averages[self.recipe.train.ema].items()}

    def save(self) -> None:
        """Writes a checkpoint beside those that are kept. All processes call it; raises as `run` does."""
        self._check_weights()
        if self.timer is None:
            plan = checkpoint.Plan(steps=self.curriculum.steps, decay_from=self.curriculum.decay_from)
        else:
            plan = checkpoint.Plan(steps=0, decay_from=0, time=self.timer.state)
        checkpoint.save(self.folder, self.step, self._state(), plan, self.accelerator)
        self.journal.plot()

    def _resume(self, extend: bool) -> None:
        """Loads the newest checkpoint that is whole, or to `extend` the last before the learning rates fell."""
        paths = checkpoint.found(self.folder)
        if extend:
            plans = checkpoint.plans(self.folder).items()
            paths = [path for path, plan in plans if plan and checkpoint.step_of(path) <= plan.decay_from]
            if not paths:
                raise InputError(
                    f"{self.folder} has no state from before its learning rates fell: leave out --extend, "
                    "or begin anew with --run"
                )
        path = checkpoint.load_newest(paths, self._load, self.say)
        if path is None:
            return
        plan = checkpoint.plan_of(path)
        if self.timer is not None:
            if plan is not None and plan.time is not None:
                self._resume_time(self.timer, plan.time)
            return
        steps = self.curriculum.steps
        if self.step > steps:
            raise UsageError(
                f"the run in {self.folder} is at step {self.step}, past the {counted(steps, 'step')} asked for: "
                "ask for more, or begin anew with --run"
            )
        if plan is not None and plan.steps != steps and self.step > min(plan.decay_from, self.curriculum.decay_from):
            self.say(
                f"planned for {counted(plan.steps, 'step')}, this run lowered its learning rates from step "
                f"{plan.decay_from} on: it will differ from one planned for {steps:,} (to have that one, pass --extend)"
            )

    def _resume_time(self, timer: Timer, before: TimeUsed) -> None:
        """Goes on with the time that a checkpoint has used, of as much or another."""
        time, used = timer.state.time, before.used
        if before.time != time and used > time:
            raise UsageError(
                f"the run in {self.folder} has used {as_clock(used)}, and a time of {as_clock(time)} is asked for: "
                "ask for more, or begin anew with --run"
            )
        whole = 1 - self.curriculum.decay
        if before.time != time and used > whole * min(before.time, time):
            self.say(
                f"planned for {as_clock(before.time)}, this run lowered its learning rates from "
                f"{as_clock(whole * before.time)} on: it will differ from one planned for {as_clock(time)}"
            )
        timer.resume(before)
        self.batches.follow(timer.curriculum)

    def _check_weights(self) -> None:
        weights = [local_part(weight) for weight in self._parameters().values()]
        finite = torch.stack([weight.isfinite().all() for weight in weights]).all()
        if not self.accelerator.gather(finite[None].to(self.device)).all():  # type: ignore[union-attr]
            raise self._diverged(f"the weights are no longer finite after step {self.step}", self.step)

    def _diverged(self, what: str, step: int) -> DivergenceError:
        states = checkpoint.found(self.folder)
        kept = f"the state of step {checkpoint.step_of(states[0])} is kept" if states else "no state was saved before"
        pictures = "; ".join(self.batches.names(step - 1))
        return DivergenceError(f"{what}: {kept}. Lower muon_lr and adamw_lr. The pictures of that step: {pictures}")

    def _load(self, path: Path) -> None:
        state = checkpoint.load(path, self._state(), self.accelerator.num_processes)
        settings = [dict(group) for optimiser in self._bare_optimisers() for group in optimiser.param_groups]
        set_state_dict(
            self.tower,
            self._bare_optimisers(),
            model_state_dict=state["tower"],
            optim_state_dict=state["optimisers"],
            options=self._state_options(),
        )
        groups = [group for optimiser in self._bare_optimisers() for group in optimiser.param_groups]
        for group, setting in zip(groups, settings, strict=True):
            # Those of this run: another device may have another kind of AdamW.
            group.update(setting)
        self.step = checkpoint.step_of(path)

    def _state(self) -> dict[str, Any]:
        """The content of a checkpoint. Loading fills its tensors in place, those of the averages included."""
        # Numbers, on whatever device the run goes on.
        set_rates(self.optimisers, self.rates)
        tower, optimisers = get_state_dict(self.tower, self._bare_optimisers(), options=self._state_options())
        return {"tower": tower, "optimisers": optimisers, "ema": self.ema.averages}

    def _state_options(self) -> StateDictOptions:
        """With a LoRA the weights of the model are not a part of the state."""
        alone = self.recipe.lora is not None
        return StateDictOptions(ignore_frozen_params=alone, strict=not alone)

    def _bare_optimisers(self) -> list[torch.optim.Optimizer]:
        return [optimiser.optimizer for optimiser in self.optimisers]

    def _parameters(self) -> dict[str, Tensor]:
        """The weights that learn."""
        return {name: weight for name, weight in self.tower.named_parameters() if weight.requires_grad}

    def _report(
        self,
        pending: list[Tensor],
        rates: list[tuple[float, float]],
        seconds: float,
        validation: float | None,
        left: float | None,
        log: Callable[[Metrics], None],
    ) -> bool:
        """Passes the numbers and rates of several steps to the journal and to `log`; whether a process was interrupted.

        The validation loss and the seconds left are those after the last of the steps.
        """
        layers, interrupted = self.tower.states_shape[0], False
        rows = self.accelerator.reduce(torch.stack(pending), "mean").cpu()  # type: ignore[union-attr]
        stages = [self.curriculum.stage_at(self.step - 1 - back) for back in range(len(pending))]
        speed = sum(stage.batch for stage in stages) / seconds
        lines = []
        steps = range(self.step - len(pending) + 1, self.step + 1)
        for step, row, (muon, adamw) in zip(steps, rows, rates, strict=True):
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
                    muon_lr=muon if self.recipe.lora is None else None,
                    adamw_lr=adamw,
                    validation_loss=validation if step == self.step else None,
                    seconds_left=left if step == self.step else None,
                )
            )
        self.journal.write(lines)
        for line in lines:
            if (what := self._divergence.check(line)) is not None:
                raise self._diverged(what, line.step)
        try:
            for line in lines:
                log(line)
        except KeyboardInterrupt:
            interrupted = True
        # All processes end together: otherwise the others would wait for the interrupted one.
        flags = self.accelerator.gather(torch.tensor([interrupted], device=self.device))
        return bool(flags.any())  # type: ignore[union-attr]
