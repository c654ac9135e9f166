"""Replayed training steps are the steps themselves.

`Restored` stands in for CUDA graphs; the test marked `cuda` captures them.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mos_cli.datasets.art.file import Art
from mos_cli.sampling.graphs import Capture, CudaCapture
from mos_cli.training import loop
from mos_cli.training.batches import Batch
from mos_cli.training.graphs import WARM_UP, TrainingCapture, TrainingGraphs
from mos_cli.training.loop import Trainer
from mos_cli.training.objective import Objective
from mos_cli.training.optimiser import build_optimisers, set_rates, start_states
from tests.helpers import edit_training
from tests.helpers import tiny_training as tiny
from tests.helpers.generation_towers import WIDTHS, M, S, V, small_tower
from tests.helpers.recomputed import Recomputed, Restored

STAGES = tuple({**stage, "steps": WARM_UP + 3, "patch_spacing": 2 - n} for n, stage in enumerate(tiny.STAGES))
REFUSED = "operation not permitted when stream is capturing"


class Refused(Restored):
    """Captures one kind of steps or batches, then fails as CUDA does: within a capture, and again at its end."""

    state = list

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], object]]:
        recorded = super().record(function)
        if self.captured == 1:
            return recorded
        try:
            raise RuntimeError(REFUSED)
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")


def changed_by(optimisers: list[torch.optim.Optimizer]) -> list[torch.Tensor]:
    """All that a step changes: weights, and the states of the optimisers."""
    weights = [weight for optimiser in optimisers for group in optimiser.param_groups for weight in group["params"]]
    states = [state for optimiser in optimisers for kept in optimiser.state.values() for state in kept.values()]
    return [*weights, *states]


@pytest.fixture(params=["stages", "edits"])
def make(request: pytest.FixtureRequest, understanding, art: Art, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a trainer in a folder, whose steps and batches are captured as told; None computes them as on a CPU."""

    def made(folder: Path, capture: Restored | None, batches: Recomputed | None = None, **train: Any) -> Trainer:
        monkeypatch.setattr(loop, "training_capture", lambda _: capture)
        monkeypatch.setattr(loop, "batch_capture", lambda _: None if batches is None else lambda _: batches)
        if request.param == "stages":
            trainer = tiny.trainer(tiny.recipe(STAGES, steps=None, **train), understanding, folder)
        else:
            trainer = edit_training.trainer(edit_training.recipe(steps=12, **train), understanding, art, folder)
        if capture is not None:
            capture.state = lambda: changed_by(trainer._bare_optimisers())
        return trainer

    return made


def check_same(one: Trainer, other: Trainer) -> None:
    for mine, theirs in zip(*(changed_by(each._bare_optimisers()) for each in (one, other)), strict=True):
        assert torch.equal(mine, theirs)
    for width, average in one.ema.averages.items():
        assert all(torch.equal(weights, other.ema.averages[width][name]) for name, weights in average.items())


def test_replayed_steps_give_the_losses_and_weights_of_computed_ones(make, tmp_path: Path, monkeypatch) -> None:
    one = make(tmp_path / "one", graphs := Restored(), batches := Recomputed())
    losses = tiny.run(one)
    # The two stages, or drawings and edits: each once.
    assert graphs.captured == batches.captured == 2
    monkeypatch.setattr("mos_cli.training.graphs.WARM_UP", 100)
    other = make(tmp_path / "other", Restored(), Recomputed())
    assert tiny.run(other) == losses
    check_same(one, other)


def test_where_a_step_cannot_be_captured_the_run_goes_on_and_says_so_once(make, tmp_path: Path) -> None:
    lines: list[str] = []
    losses = tiny.run(one := make(tmp_path / "one", Restored(), Recomputed()))
    other = make(tmp_path / "other", capture := Refused(), batches := Recomputed())
    other.say = lines.append
    assert tiny.run(other) == losses
    check_same(one, other)
    assert lines == [f"training goes on without CUDA graphs, slower: {REFUSED}"]
    assert capture.captured == batches.captured == 2
    # The random number generator is another one than that of the first kind's graph.
    assert other.graphs.failed
    assert all(kind.graph is None for kind in other.graphs._kinds.values())


@pytest.mark.parametrize("make", ["stages"], indirect=True)
def test_where_batches_cannot_be_captured_steps_still_are(make, tmp_path: Path) -> None:
    lines: list[str] = []
    losses = tiny.run(one := make(tmp_path / "one", Restored(), Recomputed()))
    other = make(tmp_path / "other", steps := Restored(), batches := Refused())
    other.say = lines.append
    assert tiny.run(other) == losses
    check_same(one, other)
    assert lines == [f"batches are made without CUDA graphs, slower: {REFUSED}"]
    assert (steps.captured, batches.captured) == (2, 2)
    assert not other.graphs.failed


def test_a_run_stopped_and_taken_up_is_the_same(make, tmp_path: Path) -> None:
    whole = make(tmp_path / "whole", Restored(), Recomputed(), save_every=5)
    losses = tiny.run(whole)

    def stop(metrics) -> None:
        if metrics.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "parts", Restored(), Recomputed(), save_every=5).run(stop, lambda _: None)
    resumed = make(tmp_path / "parts", Restored(), Recomputed(), save_every=5)
    assert resumed.step == 5
    assert tiny.run(resumed) == losses[5:]
    check_same(whole, resumed)


@pytest.mark.parametrize("first", ["computed", "captured"])
def test_a_run_goes_on_where_steps_are_captured_and_where_they_are_not(make, tmp_path: Path, first: str) -> None:
    """As from a CPU to a GPU, and back: AdamW is of another kind there, which rounds otherwise."""
    captures = [None, Restored()] if first == "computed" else [Restored(), None]
    losses = tiny.run(make(tmp_path / "whole", None))

    def stop(metrics) -> None:
        if metrics.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "parts", captures[0], save_every=5).run(stop, lambda _: None)
    resumed = make(tmp_path / "parts", captures[1], save_every=5)
    (group,) = resumed._bare_optimisers()[1].param_groups
    assert group["capturable"] == (captures[1] is not None)
    assert tiny.run(resumed) == pytest.approx(losses[5:], rel=1e-2)


class Devices(TorchDispatchMode):
    """Notes the operations with a tensor on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.on_the_cpu: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "_fused_adamw_" in str(func):
            # It has no version for tensors without values.
            return None
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        if any(tensor.device.type == "cpu" for tensor in tensors):
            self.on_the_cpu.append(str(func))
        return result


@pytest.mark.parametrize("fusion", ["routed", "last", "aligned", "mean"])
def test_a_step_is_computed_on_the_device_alone(fusion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture allows nothing else. Here tensors have no values, so that reading one fails."""
    with torch.device("meta"):
        tower = small_tower(image_state_widths=WIDTHS, fusion=fusion)
        objective, optimisers = Objective(tower, 0.05), build_optimisers(tower, capturable=True)
        start_states(optimisers)
        pictures = [torch.randn(4, 3, 32, 24) for _ in range(3)]
        states, seen = torch.randn(4, 6, M, S), torch.randn(4, V, M, max(WIDTHS))
        mask = torch.ones(4, 6, dtype=torch.bool)
        batch = Batch(*pictures[:2], torch.rand(4), states, mask, pictures[2], seen)

        def on_the_cpu() -> list[str]:
            with Devices() as devices:
                learn(objective, optimisers, batch, [torch.full((), 0.1)] * 2)
            return devices.on_the_cpu

        # The first step makes the tables of positions, which are kept.
        on_the_cpu()
        assert not on_the_cpu()
        # In a compiled step nothing is kept.
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not on_the_cpu()


def test_steps_before_a_capture_have_the_inputs_of_those_after() -> None:
    """Their layout in memory too: a compiled step of another one would be compiled again, within the capture."""
    seen: list[tuple[int, ...]] = []

    def compute(pictures: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        seen.append((*pictures.stride(), *states.stride()))
        return pictures.sum() + states.sum()

    graphs = TrainingGraphs(compute, Recomputed(), lambda _: None)
    for step in range(WARM_UP + 2):
        pictures = torch.full((2, 3, 4, 4), float(step)).contiguous(memory_format=torch.channels_last)
        assert graphs(pictures, torch.ones(1, 5).expand(2, 5)) == 96 * step + 10
    assert len(seen) > WARM_UP
    assert set(seen) == {(48, 16, 4, 1, 5, 1)}


def learn(
    objective: Objective,
    optimisers: list[torch.optim.Optimizer],
    batch: Batch,
    rates: Sequence[torch.Tensor],
) -> torch.Tensor:
    """A step as `Trainer` computes it."""
    set_rates(optimisers, rates)
    loss, use_JM = objective(batch)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
    for optimiser in optimisers:
        optimiser.step()
        optimiser.zero_grad()
    return torch.cat([loss.detach()[None], norm[None], use_JM.flatten()])


@pytest.mark.cuda
@pytest.mark.parametrize("compiled", [False, True])
def test_captured_steps_are_the_steps_themselves(compiled: bool) -> None:
    """Losses and weights, of steps with random routes and of two sizes in turn."""
    device = torch.device("cuda")

    def trained(capture: Capture | None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        torch.manual_seed(0)
        tower = small_tower().to(device)
        objective, optimisers = Objective(tower, 0.3), build_optimisers(tower, capturable=True)
        start_states(optimisers)
        if compiled:
            objective.compile_whole()

        lines: list[str] = []
        compute = partial(learn, objective, optimisers)
        step = compute if capture is None else TrainingGraphs(compute, capture, lines.append)
        results = []
        for number in range(4 * WARM_UP):
            torch.manual_seed(number)
            tokens = 4 + 2 * (number % 2)
            pair = torch.randn(2, 8, 3, 32, 24, device=device)
            z0, z = (each.contiguous(memory_format=torch.channels_last) for each in pair)
            mask = torch.ones(8, tokens, dtype=torch.bool, device=device)
            batch = Batch(z0, z, torch.rand(8, device=device), torch.randn(8, tokens, M, S, device=device), mask)
            rates = tuple(torch.full((), 1e-3 / (1 + number), device=device) for _ in range(2))
            results.append(step(batch, rates))
        assert not lines
        return results, changed_by(optimisers)

    capture = TrainingCapture(device)
    capture.check_memory = lambda: None
    captured, computed = trained(capture), trained(None)
    # Sums of gradients may be taken in another order, and a compiled step be another one.
    for ours, theirs in zip(captured, computed, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", [CudaCapture, TrainingCapture])
def test_a_capture_that_failed_leaves_nothing_begun(kind: type[CudaCapture]) -> None:
    device = torch.device("cuda")

    def waits() -> torch.Tensor:
        values = torch.rand(8, device=device)
        return values * values.sum().item()

    capture = kind(device)
    capture.check_memory = lambda: None
    with pytest.raises(RuntimeError):
        capture.record(waits)
    assert torch.rand(8, device=device).isfinite().all()
    # Memory that another stream used is free again.
    other, before = torch.cuda.Stream(device), torch.cuda.memory_allocated(device)
    used = torch.zeros(2**20, device=device)
    used.record_stream(other)
    del used
    torch.cuda.synchronize(device)
    torch.zeros(8, device=device)
    assert torch.cuda.memory_allocated(device) < before + 2**20
