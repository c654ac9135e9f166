"""The curriculum of a run: the stage of each step, its settings and its learning rate."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, count

from mos_cli.datasets.tables import CaptionedTable, DataTable, edit_share
from mos_cli.training.recipe import TrainRecipe


@dataclass(frozen=True)
class Stage:
    """A stage with all its settings; `first` is its first step, counted over the whole run.

    In a run with a time `steps` is the part of the time that the stage has, in proportion, and `first` is `NOT_BEGUN`
    until it begins.
    """

    name: str
    first: int
    steps: int
    canvas: int
    batch: int
    muon_lr: float
    adamw_lr: float
    time_mean: float
    data: DataTable | CaptionedTable
    patch_spacing: float = 1.0

    @property
    def edits(self) -> float:
        """The share of its steps that train edits."""
        return edit_share(self.data)


NOT_BEGUN = sys.maxsize


@dataclass(frozen=True)
class Curriculum:
    """All stages of a run, in order.

    `time` are the seconds after which the run ends, instead of its steps; None if it ends by its steps.
    """

    stages: tuple[Stage, ...]
    warmup: int
    decay: float
    time: float | None = None

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def steps_from(self, first: int) -> Iterable[int]:
        """The steps from `first` on; with a time there is no last one."""
        return count(first) if self.time is not None else range(first, self.steps)

    @property
    def decay_from(self) -> int:
        """The number of steps whose learning rates do not depend on the number of steps of the run."""
        return int((1 - self.decay) * self.steps) + 1

    def stage_at(self, step: int) -> Stage:
        """The stage of a step; the last stage for the end of the run."""
        return next(stage for stage in reversed(self.stages) if stage.first <= step)

    def rate(self, step: int, used: float = 0.0) -> float:
        """The factor of a stage's learning rates at a step: a warm-up, then 1, then linear to 0 at the end.

        Args:
            used: the seconds that a run with a time has used before the step.
        """
        whole, done = (self.steps, step) if self.time is None else (self.time, used)
        return max(0.0, min(1.0, (step + 1) / max(1, self.warmup), (whole - done) / (self.decay * whole)))

    def stages_begun(self, used: float) -> int:
        """The number of stages that have begun in a run with a time when `used` seconds of it are over."""
        assert self.time is not None
        ends = list(accumulate(stage.steps for stage in self.stages))
        return 1 + sum(used * self.steps >= end * self.time for end in ends[:-1])

    def begun_at(self, firsts: Sequence[int]) -> "Curriculum":
        """With the first steps of the stages that have begun, of a run with a time."""
        every = [*firsts, *[NOT_BEGUN] * (len(self.stages) - len(firsts))]
        stages = (replace(stage, first=first) for stage, first in zip(self.stages, every, strict=True))
        return replace(self, stages=tuple(stages))


def curriculum(recipe: TrainRecipe) -> Curriculum:
    """The recipe's stages; without [[stages]] the [train] table is the only one, at the bundle's own size."""
    train, stages, first = recipe.train, [], 0
    if not recipe.stages:
        native, steps = recipe.bundle.canvas.native[0], train.steps or 1
        only = Stage(
            "train", 0, steps, native, train.batch, train.muon_lr, train.adamw_lr, train.time_mean, recipe.data
        )
        return Curriculum((only,), train.warmup, train.decay, train.time)
    for table in recipe.stages:
        stage = Stage(
            name=table.name,
            first=first,
            steps=table.steps,
            canvas=table.canvas,
            batch=table.batch or train.batch,
            muon_lr=table.muon_lr or train.muon_lr,
            adamw_lr=table.adamw_lr or train.adamw_lr,
            time_mean=train.time_mean if table.time_mean is None else table.time_mean,
            data=table.data or recipe.data,
            patch_spacing=table.patch_spacing,
        )
        stages.append(stage)
        first += table.steps
    whole = Curriculum(tuple(stages), train.warmup, train.decay, train.time)
    return whole if train.time is None else whole.begun_at([0])
