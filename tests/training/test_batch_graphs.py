"""Replayed batches are the batches themselves.

`Recomputed` stands in for CUDA graphs; the tests marked `cuda` capture them.
"""

from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from paired_steps import Operations
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mos_cli.datasets.art.file import Art
from mos_cli.datasets.captioned import Captioned, bucket_shape
from mos_cli.datasets.captioned_folders import load_captioned
from mos_cli.sampling.graphs import CudaCapture
from mos_cli.towers.autoencoder import Enlarger
from mos_cli.towers.understanding import UnderstandingTower
from mos_cli.training import graphs as training_graphs
from mos_cli.training.batches import Batch, Batches
from mos_cli.training.graphs import WARM_UP, BatchCapture, TrainingCapture, TrainingGraphs
from mos_cli.training.picks import Mixture, kind_of
from mos_cli.training.sources import captioned_source
from tests.helpers import edit_training
from tests.helpers import tiny_training as tiny
from tests.helpers.recomputed import Recomputed

STAGES = tuple({**stage, "steps": WARM_UP + 3} for stage in tiny.STAGES)


@pytest.fixture(params=["stages", "edits"])
def make(request: pytest.FixtureRequest, understanding, art: Art) -> Callable[..., Batches]:
    """Makes the batches of two stages, or of drawings and edits, that are captured as told."""

    def made(capture: Recomputed | None) -> Batches:
        if request.param == "stages":
            batches = tiny.batches(tiny.recipe(STAGES, steps=None), understanding)
        else:
            batches = edit_training.batches(edit_training.recipe(steps=12), understanding, art)
        return captured(batches, capture)

    return made


def captured(batches: Batches, capture: Recomputed | None) -> Batches:
    """The batches, replayed unless there is no capture. None may fail."""
    if capture is not None:
        batches.replay(lambda _: capture, pytest.fail)
    return batches


def step_of(batches: Batches, edits: bool) -> int:
    """The first step that trains edits, or drawing."""
    return next(step for step in range(8) if kind_of(batches.curriculum, 0, step)[1] == edits)


def tensors(batch: Batch) -> dict[str, Tensor]:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def check_same(ours: list[Batch], theirs: list[Batch]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        mine, its = tensors(one), tensors(other)
        assert mine.keys() == its.keys()
        assert all(torch.equal(value, its[name]) for name, value in mine.items())
        assert one.grid == other.grid


def test_replayed_batches_have_the_bits_of_computed_ones(make, monkeypatch: pytest.MonkeyPatch) -> None:
    # All are kept to the end: no replay writes what one before it returned.
    replayed = list(make(capture := Recomputed()).stream(0))
    assert capture.captured == 2
    # As of a run that goes on: which batches are replayed is another matter then.
    check_same(list(make(Recomputed()).stream(5)), replayed[5:])
    monkeypatch.setattr(training_graphs, "WARM_UP", 100)
    check_same(list(make(Recomputed()).stream(0)), replayed)


def test_captions_of_one_length_have_the_states_of_captions_of_their_own(make) -> None:
    for ours, theirs in zip(make(Recomputed()).stream(0), make(None).stream(0), strict=True):
        mine, its = tensors(ours), tensors(theirs)
        for values in (mine, its):
            values["states_BTMS"] = values["states_BTMS"][values["mask_BT"]]
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)


def test_a_tower_that_reads_less_than_there_may_be_is_given_as_much_as_it_reads(understanding) -> None:
    batches = captured(tiny.batches(tiny.recipe(context_tokens=40), understanding), Recomputed())
    assert batches.picks[0].captions.shape == (2, 8, 24)
    assert batches.make(0).states_BTMS.shape[:2] == batches.make(0).mask_BT.shape == (8, 40)


def test_pictures_from_files_are_not_captured(understanding, tmp_path: Path) -> None:
    """Nor scenes in one batch with them: their number differs from step to step."""
    tiny.write_discs(tmp_path)
    own = captioned_source(load_captioned(tmp_path), torch.device("cpu"))
    for source in (own, Mixture(own, tiny.scenes(), 0.5).source()):
        made = []
        for capture in (Recomputed(), None):
            batches = captured(tiny.batches(tiny.recipe(), understanding), capture)
            batches.sources["train", False] = source
            made.append(list(batches.stream(0)))
            assert capture is None or not capture.captured
        check_same(*made)


def test_scenes_in_steps_of_their_own_beside_pictures_from_files_are_captured(
    understanding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, size in enumerate(((80, 40), (40, 80))):
        Image.new("RGB", size, (90 * number, 0, 0)).save(tmp_path / f"{number}.png")
    shape = partial(bucket_shape, canvas=16, multiple=8, smallest=8, largest=32)
    own = captioned_source(load_captioned(tmp_path, caption="a dog"), torch.device("cpu"), shape)
    made = []
    for warm_up in (WARM_UP, 100):
        monkeypatch.setattr(training_graphs, "WARM_UP", warm_up)
        batches = captured(tiny.batches(tiny.recipe(steps=16), understanding), capture := Recomputed())
        batches.sources["train", False] = Mixture(own, tiny.scenes(), 0.5).source()
        made.append(list(batches.stream(0)))
        assert capture.captured == (warm_up == WARM_UP)
    assert {tuple(batch.z0_BCHW.shape[2:]) for batch in made[0]} == {(16, 16), (8, 24), (24, 8)}
    check_same(*made)


class Transfers(TorchDispatchMode):
    """Notes the operations with tensors on the CPU and elsewhere, but for copies for which the host does not wait."""

    def __init__(self) -> None:
        super().__init__()
        self.elsewhere: list[str] = []
        self.mixed: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        places = {leaf.device.type for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)}
        if "meta" in places:
            self.elsewhere.append(str(func))
        if len(places) > 1 and not (kwargs or {}).get("non_blocking"):
            self.mixed.append(str(func))
        return result


@pytest.fixture
def on_meta(art: Art, encoder_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Batches:
    """Batches on a device whose tensors have no values, so that reading one fails, as within a capture."""
    device = torch.device("meta")
    tower = UnderstandingTower(encoder_folder, device="meta")
    batches = edit_training.batches(edit_training.recipe(steps=12), tower, art, device)
    batches.autoencoder = Enlarger().to(device)  # type: ignore[arg-type]
    # transformers looks at no mask within a capture.
    monkeypatch.setattr("transformers.utils.import_utils.is_cuda_stream_capturing", lambda: True)
    real = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": real())
    return batches


@pytest.mark.parametrize("edits", [False, True])
def test_what_is_captured_is_computed_on_the_device_alone(on_meta: Batches, edits: bool) -> None:
    step = step_of(on_meta, edits)
    picked, source = on_meta.picks[step], on_meta.sources["train", edits]
    given = picked.pictures.to("meta"), picked.captions.to("meta")
    with Transfers() as transfers:
        encoded = on_meta._encoded(*given, source.draw, edits, 16)
    assert len(transfers.elsewhere) > 50
    assert not transfers.mixed
    assert tuple(encoded.z0_BCHW.shape) == (8, 3, 8, 8)


@pytest.mark.parametrize("edits", [False, True])
@pytest.mark.parametrize("replayed", [False, True])
def test_no_copy_makes_the_host_wait(on_meta: Batches, edits: bool, replayed: bool) -> None:
    batches = captured(on_meta, (capture := Recomputed()) if replayed else None)
    batches.guidance_max = 4.0
    step = step_of(batches, edits)
    # The states of the empty prompt are kept.
    for _ in range(WARM_UP + 1 if replayed else 1):
        batches.make(step)
    with Transfers() as transfers:
        batches.make(step)
    assert not replayed or capture.captured == 1
    assert len(transfers.elsewhere) > 50
    assert not transfers.mixed


def test_edits_from_files_are_copied_to_the_device_as_they_lie_in_memory() -> None:
    """Other copies are made twice, the first in memory for which the host waits."""
    copied: list[bool] = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            given = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor) and leaf.device.type == "cpu"]
            copied.extend(each.is_contiguous() for each in given if result.device.type == "meta")
            return result

    source = captioned_source(Captioned(()), torch.device("meta"), edits=True)
    with Copies():
        drawn = source.draw(torch.zeros(4, 2, 16, 8, 3, dtype=torch.uint8), 16)
    assert tuple(drawn.shape) == (4, 2, 3, 16, 8)
    assert copied == [True]


class Uncomputed(Recomputed):
    """Replays compute nothing: what is left is what the host starts around them."""

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], object]]:
        return super().record(function)[0], lambda: None


@pytest.mark.parametrize(("edits", "most"), [(False, 15), (True, 17)])
def test_the_process_with_the_gpu_starts_few_operations_for_a_replayed_batch(
    understanding, art: Art, edits: bool, most: int
) -> None:
    """At most a tenth above the count when this was written, beside the replay and three copies to the GPU."""
    batches = captured(edit_training.batches(edit_training.recipe(), understanding, art), Uncomputed())
    picked = batches.picks[step_of(batches, edits)]
    for _ in range(WARM_UP + 1):
        batches.finish(picked)
    with Operations() as operations:
        batches.finish(picked)
    assert operations.computing.total() <= most, operations.computing


@pytest.mark.parametrize(("kind", "steps"), [(TrainingCapture, 2), (BatchCapture, 3)])
def test_what_is_captured_leaves_room_for_steps(kind, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches for one more: so many fit beside what they keep."""
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 110)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 100)
    capture = kind.__new__(kind)
    capture.device = torch.device("cuda")
    monkeypatch.setattr(kind, "room", 10 * steps)
    capture.check_memory()
    monkeypatch.setattr(kind, "room", 10 * steps - 1)
    with pytest.raises(RuntimeError, match=rf"^the memory of the GPU is too small for {steps} steps at once$"):
        capture.check_memory()


class Generator:
    """A random number generator of a device that is not there."""

    def __init__(self, state: object) -> None:
        self.state = state

    def clone_state(self) -> "Generator":
        return Generator(object())

    def graphsafe_get_state(self) -> "Generator":
        return Generator(self.state)

    def graphsafe_set_state(self, other: "Generator") -> None:
        self.state = other.state


class NoGraph:
    """`torch.cuda.graph`, with nothing behind it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("kind", [CudaCapture, TrainingCapture, BatchCapture])
def test_a_capture_that_draws_no_random_numbers_leaves_their_state(kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that fails, which spoils the state that it had: steps that are captured already have the device's."""
    stream, before = SimpleNamespace(device_index=0), object()
    generator = Generator(before)
    for name in ("current_stream", "set_stream", "graph_pool_handle", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: SimpleNamespace(replay=print))
    monkeypatch.setattr(torch.cuda, "graph", NoGraph)
    monkeypatch.setattr(torch.cuda, "default_generators", [generator])
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *_: None, raising=False)
    capture = kind(torch.device("cuda"), stream)
    capture.check_memory = lambda: None
    within, _ = capture.record(lambda: generator.state)
    assert (within is before) == capture.random
    assert generator.state is before

    def refused() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        capture.record(refused)
    assert (generator.state is before) != capture.random


@pytest.mark.cuda
def test_captured_batches_are_the_batches_themselves(encoder_folder: Path, art: Art) -> None:
    """While captured steps with random numbers are replayed on another stream, which are the steps themselves too."""
    device = torch.device("cuda")
    weight = torch.randn(1024, 1024, device=device)

    def step(batch: Batch) -> Tensor:
        """Long enough for the next batch to be made meanwhile."""
        drawn = torch.rand(1024, 1024, device=device)
        for _ in range(50):
            drawn = (drawn @ weight).softmax(dim=1) * torch.rand_like(drawn)
        return torch.stack([*drawn[0, :8].double(), *(value.double().sum() for value in tensors(batch).values())])

    def results(*, replayed: bool) -> list[Tensor]:
        tower = UnderstandingTower(encoder_folder, device="cuda")
        batches = edit_training.batches(edit_training.recipe(steps=12 * WARM_UP), tower, art, device)
        batches.replay(lambda stream: fitting(BatchCapture(device, stream)), pytest.fail)
        steps = TrainingGraphs(step, fitting(TrainingCapture(device)), pytest.fail)
        sums = []
        for number, batch in enumerate(batches.stream(0)):
            torch.manual_seed(number)
            sums.append((steps if replayed else step)(batch))
            if not replayed:
                batches._capture = None
        graphs = [kind.graph for kind in batches._graphs["train"]._kinds.values()]
        assert sum(graph is not None for graph in graphs) == 2 * replayed
        return sums

    for one, other in zip(results(replayed=True), results(replayed=False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.cuda
@pytest.mark.parametrize("edits", [False, True])
def test_the_host_waits_for_no_replayed_batch(encoder_folder: Path, art: Art, edits: bool) -> None:
    device = torch.device("cuda")
    tower = UnderstandingTower(encoder_folder, device="cuda")
    batches = edit_training.batches(edit_training.recipe(steps=12), tower, art, device)
    batches.replay(lambda stream: fitting(BatchCapture(device, stream)), pytest.fail)
    batches.guidance_max = 4.0
    picked = batches.picks[step_of(batches, edits)]
    for _ in range(WARM_UP + 1):
        batches.finish(picked)
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches.finish(picked)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_batches_that_cannot_be_captured_leave_captured_steps_as_they_are() -> None:
    device = torch.device("cuda")
    lines: list[str] = []
    stream = torch.cuda.Stream(device, priority=-1)
    steps = TrainingGraphs(lambda x: x + torch.rand_like(x), fitting(TrainingCapture(device)), lines.append)
    batches = TrainingGraphs(lambda x: x * x.sum().item(), fitting(BatchCapture(device, stream)), lines.append)
    x = torch.ones(8, device=device)
    for number in range(3 * WARM_UP):
        torch.manual_seed(number)
        result = steps(x)
        torch.manual_seed(number)
        assert torch.equal(result, x + torch.rand_like(x))
        if number > WARM_UP:
            with torch.cuda.stream(stream):
                made = batches(x)
            stream.synchronize()
            assert torch.equal(made, 8 * x)
    assert len(lines) == 1
    assert batches.failed
    assert not steps.failed


def fitting(capture: CudaCapture) -> CudaCapture:
    """A small test on a busy card is no reason for the rule about memory."""
    capture.check_memory = lambda: None
    return capture
