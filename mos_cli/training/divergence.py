"""When a run has diverged."""

import math
from collections import deque
from collections.abc import Sequence

from mos_cli.training.metrics import Metrics

WINDOW, FAR_ABOVE = 10, 10.0
"""A run has diverged when the mean loss of so many steps is so many times that of the first ones."""


class DivergenceMonitor:
    """Tells from the metrics of a run whether it has diverged.

    Args:
        losses: those of all steps before.
    """

    def __init__(self, losses: Sequence[float]) -> None:
        self._first = list(losses[:WINDOW])
        self._last = deque(losses[-WINDOW:], maxlen=WINDOW)

    def check(self, line: Metrics) -> str | None:
        """Takes the metrics of the next step; returns how they show a divergence, or None."""
        if not math.isfinite(line.loss) or not math.isfinite(line.gradient_norm):
            what = "loss" if not math.isfinite(line.loss) else "gradient"
            return f"the {what} of step {line.step} is not finite"
        if len(self._first) < WINDOW:
            self._first.append(line.loss)
        self._last.append(line.loss)
        first, last = (sum(losses) / len(losses) for losses in (self._first, self._last))
        if last <= FAR_ABOVE * first:
            return None
        return (
            f"at step {line.step} the loss of the last {WINDOW} steps is {last:.3g} on average, "
            f"that of the first was {first:.3g}"
        )
