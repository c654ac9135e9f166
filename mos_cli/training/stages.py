"""The curriculum of a run: the stage of each step, its settings and its learning rate."""

from dataclasses import dataclass

from mos_cli.datasets.tables import CaptionedTable, DataTable, edit_share
from mos_cli.training.recipe import TrainRecipe


@dataclass(frozen=True)
class Stage:
    """A stage with all its settings; `first` is its first step, counted over the whole run."""

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


@dataclass(frozen=True)
class Curriculum:
    """All stages of a run, in order."""

    stages: tuple[Stage, ...]
    warmup: int
    decay: float

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def decay_from(self) -> int:
        """The number of steps whose learning rates do not depend on the number of steps of the run."""
        return int((1 - self.decay) * self.steps) + 1

    def stage_at(self, step: int) -> Stage:
        """The stage of a step; the last stage for the end of the run."""
        return next(stage for stage in reversed(self.stages) if stage.first <= step)

    def rate(self, step: int) -> float:
        """The factor of a stage's learning rates at a step: a warm-up, then 1, then linear to 0 at the end."""
        left = (self.steps - step) / (self.decay * self.steps)
        return max(0.0, min(1.0, (step + 1) / max(1, self.warmup), left))


def curriculum(recipe: TrainRecipe) -> Curriculum:
    """The recipe's stages; without [[stages]] the [train] table is the only one, at the bundle's own size."""
    train, stages, first = recipe.train, [], 0
    if train.steps is not None:
        native = recipe.bundle.canvas.native[0]
        whole = Stage(
            "train", 0, train.steps, native, train.batch, train.muon_lr, train.adamw_lr, train.time_mean, recipe.data
        )
        return Curriculum((whole,), train.warmup, train.decay)
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
    return Curriculum(tuple(stages), train.warmup, train.decay)
