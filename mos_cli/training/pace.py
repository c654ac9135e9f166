"""How long the rest of a run takes, from the steps that it has done."""

import time
from collections.abc import Callable

from mos_cli.training.picks import kind_of
from mos_cli.training.stages import Curriculum

EDIT = 2.0
"""The work of a step that trains edits, of one that does not: the pictures before pass the network as well."""


class Pace:
    """Expects the rest of a run to go as fast as the steps since its first report; those before compile and warm up.

    The work of a step grows with its pictures and their pixels, and with edits. What the run does between its steps
    counts as well.

    Args:
        step: the number of steps done before.
        clock: seconds that only grow.
    """

    def __init__(
        self, curriculum: Curriculum, seed: int, step: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._curriculum, self._seed, self._step, self._clock = curriculum, seed, step, clock
        self._started: float | None = None
        self._done = 0.0

    def seconds_left(self, step: int) -> float | None:
        """Seconds to the end of the run, after `step` steps; None as long as nothing is known."""
        now = self._clock()
        if self._started is None:
            self._started, self._step = now, step
            return None
        for number in range(self._step, step):
            stage = self._curriculum.stage_at(number)
            edits = kind_of(self._curriculum, self._seed, number)[1]
            self._done += stage.batch * stage.canvas**2 * (EDIT if edits else 1.0)
        self._step = step
        return None if not self._done else (now - self._started) * self._left(step) / self._done

    def _left(self, step: int) -> float:
        return sum(
            max(0, stage.first + stage.steps - max(step, stage.first))
            * stage.batch
            * stage.canvas**2
            * (1 + (EDIT - 1) * stage.edits)
            for stage in self._curriculum.stages
        )
