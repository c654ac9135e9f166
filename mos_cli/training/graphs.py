"""Training steps as captured CUDA graphs: the host starts one with a call instead of thousands."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from mos_cli.sampling.graphs import Capture, CudaCapture, Graph, first_cause, mapped
from mos_cli.towers.layers import RotaryTables

WARM_UP = 3
"""Steps of a kind that are computed before one is captured. Libraries and `torch.compile` set themselves up in them."""


class TrainingCapture(CudaCapture):
    """Captures training steps. The next kind of steps is computed beside the memory that a captured one keeps."""

    def check_memory(self) -> None:
        """Raises RuntimeError if two steps do not fit into the memory, by the most that was used so far."""
        step = torch.cuda.max_memory_allocated(self.device) - torch.cuda.memory_allocated(self.device)
        if self.room < 2 * step:
            raise RuntimeError("the memory of the GPU is too small for a step beside a captured one")


def training_capture(accelerator: Accelerator) -> Capture | None:
    """How the steps of a run are captured; None where they are not: on a CPU, and by processes that share a batch."""
    alone = accelerator.num_processes == 1 and not accelerator.is_fsdp2
    return TrainingCapture(accelerator.device) if accelerator.device.type == "cuda" and alone else None


class TrainingGraphs:
    """Replays a function that computes a training step, with a graph for every kind of its inputs.

    Kinds differ in the shapes and types of tensors, and in everything that is no tensor. A capture computes nothing:
    the step is computed by the first replay. Once a step cannot be captured, none is replayed.

    Args:
        compute: changes weights and the states of optimisers in place, and leaves no gradients. It depends on its
            inputs, on these and on the random number generator of the device alone.
        say: takes the line that says why steps are not captured.
    """

    def __init__(self, compute: Callable[..., Tensor], capture: Capture, say: Callable[[str], None]) -> None:
        self.compute, self.capture, self.say = compute, capture, say
        self.failed = False
        self._kinds: dict[object, _Kind] = {}

    def __call__(self, *inputs: Any) -> Tensor:
        """Computes a step; returns what `compute` returns."""
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
            self.say(f"training goes on without CUDA graphs, slower: {first_cause(error)}")


class _Kind:
    """Steps of one kind: their tables, how many were computed without a graph, and the graph."""

    def __init__(self) -> None:
        self.tables, self.computed = RotaryTables(), 0
        self.graph: Graph | None = None
