"""Training steps as captured CUDA graphs: the host starts one with a call instead of thousands."""

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from mos_cli.sampling.graphs import Capture, CudaCapture, Graph, first_cause, mapped
from mos_cli.towers.layers import RotaryTables

WARM_UP = 3
"""Steps of a kind that are computed before one is captured. Libraries and `torch.compile` set themselves up in them."""


def step_capture(accelerator: Accelerator) -> Capture | None:
    """How the steps of a run are captured; None where they are not: on a CPU, and by processes that share a batch."""
    alone = accelerator.num_processes == 1 and not accelerator.is_fsdp2
    # A step that was computed before needs as much memory.
    return CudaCapture(accelerator.device, free=0.0) if accelerator.device.type == "cuda" and alone else None


class TrainingGraphs:
    """Replays a function that computes a training step, with a graph for every kind of its inputs.

    Kinds differ in the shapes and types of tensors, and in everything that is no tensor. A capture computes nothing:
    the step is computed by the first replay. A function that cannot be captured is called.

    Args:
        compute: changes weights and the states of optimisers in place, and leaves no gradients. It depends on its
            inputs, on these and on the random number generator of the device alone.
        say: takes the line that says why steps are not captured.
    """

    def __init__(self, compute: Callable[..., Tensor], capture: Capture, say: Callable[[str], None]) -> None:
        self.compute, self.capture, self.say = compute, capture, say
        self.failed = False
        self._kinds: dict[object, _Kind] = {}

    def clear(self) -> None:
        """Frees all graphs, when none of their kinds comes again."""
        self._kinds.clear()

    def __call__(self, *inputs: Any) -> Tensor:
        """Computes a step; returns what `compute` returns."""
        kind = self._kinds.setdefault(mapped(inputs, lambda tensor: (tensor.shape, tensor.dtype)), _Kind())
        if kind.graph is None:
            with kind.tables:
                if kind.computed < WARM_UP or self.failed:
                    kind.computed += 1
                    return self.capture.warm_up(lambda: self.compute(*inputs))
                try:
                    kind.graph = Graph(self.capture, lambda given: self.compute(*given), inputs, kind.tables)
                except RuntimeError as error:
                    self.failed = True
                    self.say(f"training goes on without CUDA graphs, slower: {first_cause(error)}")
                    return self.compute(*inputs)
        return kind.graph(inputs)


class _Kind:
    """Steps of one kind: their tables, how many were computed without a graph, and the graph."""

    def __init__(self) -> None:
        self.tables, self.computed = RotaryTables(), 0
        self.graph: Graph | None = None
