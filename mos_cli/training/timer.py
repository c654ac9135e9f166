"""The time of a run that ends by the clock."""

from time import monotonic

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from mos_cli.training.stages import Curriculum
from mos_cli.utils.validation import Frozen


class TimeUsed(Frozen):
    """What a checkpoint says of the time: the whole, the part that was used, in seconds, and the stages' first steps.

    A stage that had not begun has no first step.
    """

    time: float
    used: float
    firsts: tuple[int, ...] = (0,)


class Timer:
    """Reads the clock between the steps of a run with a time, and begins its stages.

    All processes go by the clock of the main one, so that their learning rates and stages are the same.

    Attributes:
        used: the seconds of the run that were over when the clock was last read; those before a resume count.
    """

    def __init__(self, curriculum: Curriculum, accelerator: Accelerator) -> None:
        assert curriculum.time is not None
        self._curriculum, self._accelerator = curriculum, accelerator
        self._time, self._firsts, self._started = curriculum.time, (0,), 0.0
        self.used = 0.0

    @property
    def curriculum(self) -> Curriculum:
        """The run's curriculum, with the first steps of the stages that have begun."""
        return self._curriculum.begun_at(self._firsts)

    @property
    def is_over(self) -> bool:
        return self.used >= self._time

    @property
    def seconds_left(self) -> float:
        return max(0.0, self._time - self.used)

    @property
    def state(self) -> TimeUsed:
        return TimeUsed(time=self._time, used=self.used, firsts=self._firsts)

    def resume(self, state: TimeUsed) -> None:
        """Goes on from the time of a checkpoint."""
        self.used, self._firsts = state.used, state.firsts

    def start(self) -> None:
        """Counts from now on."""
        self._started = monotonic() - self.used

    def read(self, step: int) -> bool:
        """Reads the clock before a step; whether it is the first of a stage, or the time is over."""
        self.used = self._of_main_process(monotonic() - self._started)
        missing = self._curriculum.stages_begun(self.used) - len(self._firsts)
        if self.is_over or missing <= 0:
            return self.is_over
        self._firsts += (step,) * missing
        return True

    def _of_main_process(self, seconds: float) -> float:
        if self._accelerator.num_processes == 1:
            return seconds
        # A GPU's computations are waited for here, which those of one process never are.
        value = torch.tensor(seconds, dtype=torch.float32, device=self._accelerator.device)
        return broadcast(value).item()  # type: ignore[union-attr]
