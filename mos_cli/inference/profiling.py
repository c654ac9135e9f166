"""Measuring a loaded pipeline: seconds of its parts, peak memory, energy.

Times are taken on the device's own clock, so that measuring does not synchronise host and device within a picture.
"""

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor

from mos_cli.config.recipe import Recipe
from mos_cli.inference.pipeline import MoSPipeline

_EVERY = 0.005
"""Seconds between two readings of the memory of the process."""


@dataclass(frozen=True)
class Timing:
    """Medians over pictures, in seconds; `joules` is the mean of a picture, None where the driver does not report it.

    Args:
        first_picture: as `picture`, of the first one after loading, which is in no median. Libraries set themselves up
            then, and `--compile` compiles.
        first_step: from a new prompt to the end of the first step.
        step: of one step, its guidance included; over all steps of all pictures.
        router_share: the router's part of the time of the steps; None where there is no router. Measured in one more
            picture where passes are replayed as CUDA graphs, since it is not seen in these.
        decode: from the latent to pixels.
        picture: from a new prompt to the picture with its record.
        graphs: how many passes were replayed as CUDA graphs, or why none; None for base models.
    """

    first_picture: float
    first_step: float
    step: float
    router_share: float | None
    decode: float
    picture: float
    joules: float | None
    graphs: str | None

    @property
    def pictures_per_minute(self) -> float:
        return 60 / self.picture


class PeakMemory:
    """The peak memory within the context, in bytes.

    On CUDA that of tensors, by torch's allocator. On a CPU the growth of the process, read every 5 ms.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0
        self._over = threading.Event()
        self._poller = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            # There are no statistics before the first use of the GPU.
            torch.cuda.init()
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._before = psutil.Process().memory_info().rss
            self._poller.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            self._over.set()
            self._poller.join()

    def _poll(self) -> None:
        process, over = psutil.Process(), False
        while not over:
            over = self._over.wait(_EVERY)
            self.bytes = max(self.bytes, process.memory_info().rss - self._before)


def measure(pipeline: MoSPipeline, recipe: Recipe, rounds: int) -> Timing:
    """Draws a first picture, and `rounds` whose parts are measured, each with the next seed and no cached prompt.

    Raises what `MoSPipeline.draw` does.
    """
    joules = _energy_meter(pipeline.device)
    started = time.perf_counter()
    pipeline.draw(recipe)
    first_picture = time.perf_counter() - started
    eager = pipeline.graphs is None or pipeline.graphs.reason is not None
    before = joules() if joules else 0.0
    moments = [
        _timed(pipeline, recipe.model_copy(update={"seed": recipe.seed + n}), inside=eager) for n in range(rounds)
    ]
    spent = (joules() - before) / rounds if joules else None
    clock = Clock(pipeline.device)

    def step_seconds(moments: Sequence[_Moments]) -> list[float]:
        return [
            clock.between(a, b) for m in moments for a, b in zip([m.entered[0], *m.stepped], m.stepped, strict=False)
        ]

    # Before a picture without them.
    note = None if pipeline.graphs is None else pipeline.graphs.note
    inside = moments if eager else [_timed(pipeline, recipe, inside=True)]
    steps, routed = step_seconds(moments), [clock.between(a, b) for m in inside for a, b in m.routed]
    return Timing(
        first_picture=first_picture,
        first_step=statistics.median(clock.between(m.began, m.stepped[0]) for m in moments),
        step=statistics.median(steps),
        router_share=sum(routed) / sum(step_seconds(inside)) if routed else None,
        decode=statistics.median(clock.between(*m.decoded[-1]) for m in moments),
        picture=statistics.median(m.seconds for m in moments),
        joules=spent,
        graphs=note,
    )


@dataclass
class _Moments:
    """Times of the events of one picture; pairs are a start and an end."""

    began: Any
    entered: list[Any] = field(default_factory=list)
    stepped: list[Any] = field(default_factory=list)
    routed: list[tuple[Any, Any]] = field(default_factory=list)
    decoded: list[tuple[Any, Any]] = field(default_factory=list)
    seconds: float = 0.0


class Clock:
    """The clock of a device: CUDA events, or on a CPU the time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def between(self, first: Any, then: Any) -> float:
        """The seconds between two times of this clock."""
        if self.device.type != "cuda":
            return then - first
        then.synchronize()
        return first.elapsed_time(then) / 1000


def _timed(pipeline: MoSPipeline, recipe: Recipe, *, inside: bool) -> _Moments:
    """The times of a picture; with `inside` those of the router, too."""
    clock, entered = Clock(pipeline.device), []
    pipeline.prompt_encoder.clear_cache()
    started, moments = time.perf_counter(), _Moments(began=clock.now())
    hooks = [pipeline.tower.register_forward_pre_hook(lambda *_: moments.entered.append(clock.now()))]
    if inside and (router := pipeline.router) is not None:
        hooks.append(router.register_forward_pre_hook(lambda *_: entered.append(clock.now())))
        hooks.append(router.register_forward_hook(lambda *_: moments.routed.append((entered.pop(), clock.now()))))
    try:
        with _decoding(pipeline, clock, moments):
            pipeline.draw(recipe, [lambda step: moments.stepped.append(clock.now())])
    finally:
        for hook in hooks:
            hook.remove()
    moments.seconds = time.perf_counter() - started
    return moments


@contextmanager
def _decoding(pipeline: MoSPipeline, clock: Clock, moments: _Moments) -> Iterator[None]:
    """Times every call of the autoencoder's `decode`, which is not `forward` and has no hooks."""
    decode: Callable[..., Any] = pipeline.autoencoder.decode

    def marked(z_BCHW: Tensor, **options: Any) -> Any:
        began = clock.now()
        pictures = decode(z_BCHW, **options)
        moments.decoded.append((began, clock.now()))
        return pictures

    pipeline.autoencoder.decode = marked  # type: ignore[method-assign]
    try:
        yield
    finally:
        del pipeline.autoencoder.decode


def _energy_meter(device: torch.device) -> Callable[[], float] | None:
    """The driver's counter of joules; None where there is none."""
    if device.type != "cuda":
        return None
    try:
        import pynvml  # type: ignore[import-not-found]
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        gpu = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu)
    except pynvml.NVMLError:
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1000
