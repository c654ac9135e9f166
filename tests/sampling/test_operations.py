"""The number of operations of a sampling step: on a GPU each is a launch, on a CPU each costs time of its own."""

import torch
from paired_steps import Operations, default_step

OPERATIONS, COMPUTING = 914, 386
"""Of a step of the default model with both branches in one batch: all, and those that compute; the others are views."""


@torch.inference_mode()
def test_a_step_of_the_default_model_has_as_few_operations_as_before() -> None:
    """At most a tenth more; whoever needs fewer lowers the numbers."""
    step = default_step(torch.float32)
    with Operations() as operations:
        step()
    assert operations.counts.total() <= 1.1 * OPERATIONS, operations.counts.most_common(12)
    assert operations.computing.total() <= 1.1 * COMPUTING, operations.computing.most_common(12)
