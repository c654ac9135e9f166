"""Passes of a generation tower as captured CUDA graphs: the host starts one with a call instead of hundreds.

A graph is kept for each key: the shapes and types of all inputs, and everything in them that is no tensor. A graph
reads memory of its own, into which the inputs are copied; what it returns is copied out of it. So a replay is the same
arithmetic as the pass itself, with the same kernels, and a picture does not depend on which passes were replayed.
"""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from typing import Any, Protocol

import torch
from diffusers.hooks.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from mos_cli.towers.attention import SDPA
from mos_cli.towers.bank import StateBank
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.layers import RotaryTables, VariableLengths, mask_of
from mos_cli.towers.router import Route, Steering

BUCKET = 16
"""Prompts are padded to a multiple of so many tokens where a graph shall serve many of them."""
BUCKETED_PATCHES = 1024
"""Up to so many patches. Attention with a mask has slower kernels, and its share grows with the patches."""
KEPT = 4
"""Graphs that are kept. A picture with guidance in an interval needs two, an edit with three branches three."""
LEFT, OFTEN = 4, 8
"""The fewest steps of a picture after a capture, and the passes of a kind after which fewer will do; see `_pays`."""
HOOK = "mos_step_graphs"


def prompt_bucket(device: torch.device, attention: str, patches: int) -> int | None:
    """The bucket of the prompts of a picture; None for rows of their own lengths, whose graphs serve one length each.

    `attention` names the backends that are used, as `choose_attention` does.

    It depends on what is recorded with a picture, not on whether a graph is used: the mask changes the last bits.
    """
    # xformers has another format of masks.
    return BUCKET if device.type == "cuda" and attention == SDPA.value and patches <= BUCKETED_PATCHES else None


class Capture(Protocol):
    """How a function is captured. It reads and writes the same memory at every replay."""

    def warm_up(self, function: Callable[[], Any]) -> Any:
        """Calls the function as `record` will, so that libraries set themselves up before, and returns its result."""
        ...

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], object]]:
        """What the function returns, which a replay overwrites, and the replay. Raises RuntimeError."""
        ...


class CudaCapture:
    """Captures CUDA graphs on one stream, with one pool of memory, as they are not replayed side by side.

    Args:
        stream: where they are captured, and with what priority; one of their own if None.
    """

    random = False
    """Whether replays draw random numbers from the default generator of the device."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if stream is None else stream
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, function: Callable[[], Any]) -> Any:
        before = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(before)
        with torch.cuda.stream(self.stream):
            result = function()
        before.wait_stream(self.stream)
        return result

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], object]]:
        self.check_memory()
        before, graph = torch.cuda.current_stream(self.device), torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[self.stream.device_index]
        state = generator.graphsafe_get_state()
        if not self.random:
            # A state of its own: with torch 2.10, not 2.13, every replay writes the seed of the state that was there at
            # its capture to the GPU, also where it draws nothing, and replays on other streams read it there.
            generator.graphsafe_set_state(generator.clone_state())
        try:
            # Only this thread may do nothing else meanwhile.
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                result = function()
        except RuntimeError:
            if self.random:
                # Every other use of the state would fail. Graphs from before, which have it, must not be replayed.
                state = generator.clone_state()
            # Before torch 2.12 the pool stays in use, and memory that other streams used would never be free again.
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self.stream.device_index, self.pool)  # type: ignore[attr-defined]
            raise
        finally:
            # torch does not go back to it after an error.
            torch.cuda.set_stream(before)
            generator.graphsafe_set_state(state)
        return result, graph.replay

    def check_memory(self) -> None:
        """The memory of a graph is not planned, and nothing else can use it. Raises RuntimeError if it is too much."""
        if self.room < self.limit / 4:
            raise RuntimeError("less than a quarter of the memory of the GPU is free")

    @property
    def limit(self) -> float:
        """The bytes that this process may use."""
        total = torch.cuda.mem_get_info(self.device)[1]
        return total * torch.cuda.get_per_process_memory_fraction(self.device)

    @property
    def room(self) -> float:
        """The bytes of them that hold no tensors."""
        used = torch.cuda.memory_allocated(self.device)
        free = torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device)
        return min(self.limit, free) - used


class StepGraphs(ModelHook):
    """Replays the passes of a generation tower where that pays, as a hook of diffusers on its `forward`.

    The tower must not be changed after `add_to`.

    Args:
        capture: how passes are captured.
        reason: why passes cannot be captured; None where they can.

    Attributes:
        failure: why a capture failed; then nothing more is captured.
        passes, replayed: the number of passes, and of those that were replayed.
    """

    def __init__(self, capture: Capture | None, reason: str | None = None) -> None:
        super().__init__()
        self.capture, self.reason = capture, reason
        self.failure: str | None = None
        self.passes = self.replayed = 0
        self._always = reason
        self._steps: float = math.inf
        self._calls, self._in_picture = Counter[object](), Counter[object]()
        self._graphs: dict[object, Graph] = {}

    @property
    def note(self) -> str:
        """How passes are computed, in words."""
        if self.reason is not None and self.replayed == 0:
            return f"none: {self.reason}"
        failed = "" if self.failure is None else f"; {self.failure}"
        return f"{self.replayed} of {self.passes} passes replayed{failed}"

    def add_to(self, tower: GenerationTower) -> "StepGraphs":
        """Adds the hook to a tower; returns itself."""
        self.tower = tower
        HookRegistry.check_if_exists_or_initialize(tower).register_hook(self, HOOK)
        return self

    def begin(self, steps: int) -> None:
        """A picture of so many steps begins. Call it when its hooks and its cache are in place."""
        self._steps = steps
        self._in_picture.clear()
        self.reason = self._always or self._why_eager()

    def _why_eager(self) -> str | None:
        if self.tower.is_cache_enabled:
            return "feature caching decides at every step what is computed"
        inner = (module for module in self.tower.modules() if module is not self.tower)
        if any(module._forward_hooks or module._forward_pre_hooks for module in inner):
            return "what is recorded within the network is not seen in a graph"
        return None

    def new_forward(self, module: nn.Module, *args: Any, **options: Any) -> Any:
        """A pass, replayed where there is a graph of it."""
        forward: Any = self.fn_ref.original_forward
        self.passes += 1
        if self.reason is not None:
            return forward(*args, **options)

        def run(given: Sequence[Any]) -> Any:
            return forward(*given[: len(args)], **dict(zip(options, given[len(args) :], strict=True)))

        given = (*args, *options.values())
        key = (tuple(options), mapped(given, lambda tensor: (tensor.shape, tensor.dtype)))
        if (graph := self._graphs.pop(key, None)) is not None:
            # The last one is the one used last.
            self._graphs[key] = graph
            self.replayed += 1
            return graph(given)
        return self._capture(key, run, given) if self._pays(key) else run(given)

    def _pays(self, key: object) -> bool:
        """Whether to capture this pass.

        A capture costs the host about what one or two passes cost it. The first pass of a kind is not captured, since a
        picture of one step never pays. Any other is where enough steps of this picture are left, or where the kind has
        come so often that it is likely to come again.
        """
        if len(self._calls) > 64 * KEPT:
            # A server that draws many sizes does not keep them all.
            self._calls.clear()
        self._calls[key] += 1
        self._in_picture[key] += 1
        left = self._steps - self._in_picture[key]
        return self.failure is None and self._calls[key] > 1 and (left >= LEFT or self._calls[key] > OFTEN)

    def _capture(self, key: object, run: Callable[[Sequence[Any]], Any], given: Sequence[Any]) -> Any:
        assert self.capture is not None
        while len(self._graphs) >= KEPT:
            del self._graphs[next(iter(self._graphs))]
        with RotaryTables() as tables:
            result = self.capture.warm_up(lambda: run(given))
            try:
                graph = Graph(self.capture, run, given, tables)
                if not same(graph(given), result):
                    raise RuntimeError("a replay differs from the pass itself")
            except RuntimeError as error:
                self.failure = f"not captured: {first_cause(error)}"
                self._graphs.clear()
                return result
        self._graphs[key] = graph
        return result


class Graph:
    """A captured function, and the memory that it reads.

    Args:
        run: the function, of the inputs as a sequence.
        given: inputs of the same shapes as all later ones.
        tables: what else it reads beside its inputs and the weights.

    Raises:
        RuntimeError: it cannot be captured.
    """

    def __init__(
        self, capture: Capture, run: Callable[[Sequence[Any]], Any], given: Sequence[Any], tables: RotaryTables
    ) -> None:
        # A tensor made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self.inputs = mapped(
                given, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            )
        self.tables = tables
        self._copied: list[weakref.ref[Any] | None] = [None] * len(given)
        self._copy(given)
        self.result, self.replay = capture.record(lambda: run(self.inputs))

    def __call__(self, given: Sequence[Any]) -> Any:
        self._copy(given)
        self.replay()
        # The next replay overwrites its result, which may be kept until the end.
        return mapped(self.result, torch.clone)

    def _copy(self, given: Sequence[Any]) -> None:
        """Tensors are copied every time, banks and steerings, which are never changed, where they are others."""
        for number, (value, into) in enumerate(zip(given, self.inputs, strict=True)):
            if (copied := self._copied[number]) is not None and copied() is value:
                continue
            for source, buffer in zip(tensors_of(value), tensors_of(into), strict=True):
                buffer.copy_(source)
            self._copied[number] = weakref.ref(value) if isinstance(value, StateBank | Steering | Route) else None


def first_cause(error: BaseException) -> str:
    """Why a capture failed, in a line. An error within a capture makes its end fail as well."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return str(error).strip().splitlines()[0]


def mapped(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """The value with the function applied to its tensors, in tuples and dataclasses. A padding is its mask, if any."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, VariableLengths) and (mask := mask_of(value)) is not value:
        return mapped(mask, function)
    if isinstance(value, tuple):
        return tuple(mapped(each, function) for each in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: mapped(getattr(value, field.name), function) for field in fields(value)})
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in a value, in order."""
    found: list[Tensor] = []
    mapped(value, found.append)
    return found


def same(one: Any, other: Any) -> bool:
    """Whether two values have equal tensors."""
    return all(map(torch.equal, tensors_of(one), tensors_of(other)))
