"""The number of operations of a sampling step: on a GPU each is a launch, on a CPU each costs time of its own."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mos_cli.bundles.bundle import find_bundle
from mos_cli.sampling.guidance import NEGATIVE, POSITIVE, Branches
from mos_cli.towers.quantized import load_generation

OPERATIONS, COMPUTING = 914, 386
"""Of a step of the default model with both branches in one batch: all, and those that compute; the others are views."""


class Operations(TorchDispatchMode):
    """Counts the ATen operations within the context by name.

    Attributes:
        counts: all of them.
        computing: without those whose results are the memory of their inputs, unchanged: views, and casts to the type
            that a tensor has. They start no kernel on a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.computing: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        result = operation(*arguments, **(named or {}))
        self.counts[str(operation)] += 1
        before = set(_memory((arguments, named)))
        if operation._schema.is_mutable or not before.issuperset(_memory(result)):
            self.computing[str(operation)] += 1
        return result


def _memory(values: Any) -> Iterator[int]:
    return (x.untyped_storage().data_ptr() for x in tree_leaves(values) if isinstance(x, Tensor))


@torch.inference_mode()
def test_a_step_of_the_default_model_has_as_few_operations_as_before() -> None:
    """At most a tenth more; whoever needs fewer lowers the numbers."""
    tower = load_generation(find_bundle("emoji").folder / "generation", device=torch.device("cpu"), dtype=torch.float32)
    noise = torch.Generator().manual_seed(0)
    states = {POSITIVE: torch.randn(1, 5, *tower.states_shape, generator=noise)}
    states[NEGATIVE] = torch.randn(1, 2, *tower.states_shape, generator=noise)
    predict = Branches(tower, {name: tower.project_states(of) for name, of in states.items()}, batched_guidance=True)

    def step(t: float) -> None:
        predict((POSITIVE, NEGATIVE), torch.randn(1, 3, 64, 64, generator=noise), t, lambda _: None)

    step(1.0)  # What is computed once for all steps.
    with Operations() as operations:
        step(0.9)
    assert sum(operations.counts.values()) <= 1.1 * OPERATIONS, operations.counts.most_common(12)
    assert sum(operations.computing.values()) <= 1.1 * COMPUTING, operations.computing.most_common(12)
