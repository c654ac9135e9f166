"""A capture for machines without CUDA: it reads and writes memory as a CUDA graph does."""

from collections.abc import Callable
from typing import Any

import torch

from mos_cli.sampling.graphs import mapped, tensors_of


class Recomputed:
    """Replays by computing again, from and into the memory that was captured, whatever the inputs of the call are."""

    def __init__(self) -> None:
        self.captured = 0

    def warm_up(self, function: Callable[[], Any]) -> Any:
        return function()

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], object]]:
        self.captured += 1
        # In memory of its own: a fixed route is expanded, and cannot be written.
        result = mapped(function(), torch.clone)

        def replay() -> None:
            for into, tensor in zip(tensors_of(result), tensors_of(function()), strict=True):
                into.copy_(tensor)

        return result, replay


class Restored(Recomputed):
    """For functions that change weights or states in place: a capture leaves them as they were.

    Attributes:
        state: returns all tensors that the function changes.
    """

    state: Callable[[], list[torch.Tensor]]

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], object]]:
        before, random = [tensor.detach().clone() for tensor in self.state()], torch.get_rng_state()
        try:
            return super().record(function)
        finally:
            torch.set_rng_state(random)
            with torch.no_grad():
                for tensor, value in zip(self.state(), before, strict=True):
                    tensor.copy_(value)
