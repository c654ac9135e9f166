"""Training steps and their batches as captured CUDA graphs: the host starts each with a call instead of hundreds."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from mos_cli.sampling.graphs import Capture, CudaCapture, Graph, first_cause, mapped
from mos_cli.towers.layers import RotaryTables

WARM_UP = 3
"""Calls of a kind that are computed before one is captured. Libraries and `torch.compile` set themselves up in them."""


class TrainingCapture(CudaCapture):
    """Captures training steps. The next kind of steps is computed beside the memory that a captured one keeps."""

    random, fitting = True, 2

    def check_memory(self) -> None:
        """Raises RuntimeError if `fitting` steps do not fit into the memory, by the most that was used so far."""
        step = torch.cuda.max_memory_allocated(self.device) - torch.cuda.memory_allocated(self.device)
        if self.room < self.fitting * step:
            raise RuntimeError(f"the memory of the GPU is too small for {self.fitting} steps at once")


class BatchCapture(TrainingCapture):
    """Captures how batches are made, on the stream where they are made, beside the steps.

    What they keep is less than a step needs, so that two steps still fit: captured steps gain more.
    """

    random, fitting = False, 3


def training_capture(accelerator: Accelerator) -> Capture | None:
    """How the steps of a run are captured; None where they are not: on a CPU, and by processes that share a batch."""
    return TrainingCapture(accelerator.device) if _captures(accelerator) else None


def batch_capture(accelerator: Accelerator) -> Callable[[Any], Capture] | None:
    """How batches are captured, from the stream on which they are made; None where steps are not captured either."""
    return partial(BatchCapture, accelerator.device) if _captures(accelerator) else None


def _captures(accelerator: Accelerator) -> bool:
    return accelerator.device.type == "cuda" and accelerator.num_processes == 1 and not accelerator.is_fsdp2


class TrainingGraphs:
    """Replays a function of a training, with a graph for every kind of its inputs.

    Kinds differ in the shapes and types of tensors, and in everything that is no tensor. A capture computes nothing:
    that is done by the first replay. Once an input cannot be captured, none is replayed.

    Args:
        compute: may change weights and states in place, and leaves no gradients. It depends on its inputs, on these
            and, with a capture that is `random`, on the random number generator of the device alone.
        say: takes the reason, a line, if inputs cannot be captured.
    """

    def __init__(self, compute: Callable[..., Any], capture: Capture, say: Callable[[str], None]) -> None:
        self.compute, self.capture, self.say = compute, capture, say
        self.failed = False
        self._kinds: dict[object, _Kind] = {}

    def __call__(self, *inputs: Any) -> Any:
        """Computes; returns what `compute` returns, in memory that nothing else writes."""
        kind = self._kinds.setdefault(mapped(inputs, lambda tensor: (tensor.shape, tensor.dtype)), _Kind())
        if kind.graph is None and kind.computed >= WARM_UP and not self.failed:
            self._record(kind, inputs)
        if kind.graph is not None:
            return kind.graph(inputs)
        kind.computed += 1
        # In the layout of a graph's inputs: for another one a step would be compiled once more, within the capture.
        laid_out = mapped(inputs, lambda tensor: tensor.clone(memory_format=torch.contiguous_format))
        with kind.tables:
            return self.capture.warm_up(lambda: self.compute(*laid_out))

    def _record(self, kind: "_Kind", inputs: tuple[Any, ...]) -> None:
        try:
            with kind.tables:
                kind.graph = Graph(self.capture, lambda given: self.compute(*given), inputs, kind.tables)
        except RuntimeError as error:
            self.failed = True
            self._kinds.clear()
            self.say(first_cause(error))


class _Kind:
    """Inputs of one kind: their tables, how often they were computed without a graph, and the graph."""

    def __init__(self) -> None:
        self.tables, self.computed = RotaryTables(), 0
        self.graph: Graph | None = None
