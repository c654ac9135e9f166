"""The number of operations of a sampling step: on a GPU each is a launch, on a CPU each costs time of its own."""

import torch
from paired_steps import Operations, default_step

from mos_cli.sampling.graphs import StepGraphs
from mos_cli.sampling.guidance import NEGATIVE, POSITIVE, Branches
from tests.helpers.generation_towers import inputs, small_tower
from tests.helpers.recomputed import Recomputed

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


class NotRun(Recomputed):
    """A graph that is not run: its operations are none of the host's."""

    def record(self, function):
        return super().record(function)[0], lambda: None


@torch.inference_mode()
def test_a_replayed_step_has_few_operations_of_the_host() -> None:
    """Noise and time are copied in, the latents and two tensors of the routes out; the bank is there already."""
    tower = small_tower()
    passes = StepGraphs(NotRun())
    passes.capture.warm_up = lambda function: passes.capture.record(function)[0]
    passes.add_to(tower)
    banks = {name: tower.project_states(inputs(1, tokens)[2]) for name, tokens in ((POSITIVE, 5), (NEGATIVE, 2))}
    predict = Branches(tower, [banks], batched_guidance=True, bucket=16)

    def step() -> None:
        predict((POSITIVE, NEGATIVE), inputs(1)[0], 0.8, lambda *_: None)

    step()
    step()
    assert (passes.failure, len(passes._graphs)) == (None, 1)
    z = inputs(1)[0]
    with Operations() as operations:
        predict((POSITIVE, NEGATIVE), z, 0.8, lambda *_: None)
    assert passes.replayed == 1
    assert operations.counts.total() <= 17, operations.counts
    assert operations.computing.total() <= 6, operations.computing
