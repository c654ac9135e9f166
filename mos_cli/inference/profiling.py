"""What a loaded pipeline takes: seconds of its parts, memory at the peak, energy.

Moments are marked on the device's own clock, so that measuring never makes the host wait within a picture.
"""

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch import Tensor

from mos_cli.config.recipe import Recipe
from mos_cli.inference.pipeline import MoSPipeline

_EVERY = 0.005
"""Seconds between two looks at the memory of the process."""


@dataclass(frozen=True)
class Timing:
    """Medians over pictures, in seconds; `joules` is the mean of a picture, None where no driver tells.

    Args:
        first_step: from a prompt that was not read before to the end of the first step.
        step: of one step, its guidance included; over all steps of all pictures.
        router_share: part of the steps that the router's network takes; None where there is no router.
        decode: from the latent to pixels.
        picture: from a prompt that was not read before to the picture with its record.
    """

    first_step: float
    step: float
    router_share: float | None
    decode: float
    picture: float
    joules: float | None

    @property
    def pictures_per_minute(self) -> float:
        return 60 / self.picture


class PeakMemory:
    """The most memory taken within the block, in bytes.

    On CUDA what tensors took at once, by torch's allocator. On a CPU the growth of the process, looked at every 5 ms.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0
        self._over = threading.Event()
        self._looking = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            # There are no statistics of a card that this process has not touched.
            torch.cuda.init()
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._before = psutil.Process().memory_info().rss
            self._looking.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            self._over.set()
            self._looking.join()

    def _look(self) -> None:
        process, over = psutil.Process(), False
        while not over:
            over = self._over.wait(_EVERY)
            self.bytes = max(self.bytes, process.memory_info().rss - self._before)


def measure(pipeline: MoSPipeline, recipe: Recipe, rounds: int) -> Timing:
    """Draws one picture to warm up and `rounds` that count, each with the next seed and its prompt read anew.

    Raises what `MoSPipeline.draw` does.
    """
    joules = _energy_meter(pipeline.device)
    pipeline.draw(recipe)
    before = joules() if joules else 0.0
    moments = [_watched(pipeline, recipe.model_copy(update={"seed": recipe.seed + n})) for n in range(rounds)]
    spent = (joules() - before) / rounds if joules else None
    clock = Clock(pipeline.device)
    steps = [clock.between(a, b) for m in moments for a, b in zip([m.asked[0], *m.stepped], m.stepped, strict=False)]
    routed = [clock.between(a, b) for m in moments for a, b in m.routed]
    return Timing(
        first_step=statistics.median(clock.between(m.began, m.stepped[0]) for m in moments),
        step=statistics.median(steps),
        router_share=sum(routed) / sum(steps) if routed else None,
        decode=statistics.median(clock.between(*m.decoded[-1]) for m in moments),
        picture=statistics.median(m.seconds for m in moments),
        joules=spent,
    )


@dataclass
class _Moments:
    """When things happened in one picture, by its clock; pairs are a beginning and an end."""

    began: Any
    asked: list[Any] = field(default_factory=list)
    stepped: list[Any] = field(default_factory=list)
    routed: list[tuple[Any, Any]] = field(default_factory=list)
    decoded: list[tuple[Any, Any]] = field(default_factory=list)
    seconds: float = 0.0


class Clock:
    """Moments of a device: CUDA events, which the device stamps when it gets there, or the time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def between(self, first: Any, then: Any) -> float:
        """Seconds."""
        if self.device.type != "cuda":
            return then - first
        then.synchronize()
        return first.elapsed_time(then) / 1000


def _watched(pipeline: MoSPipeline, recipe: Recipe) -> _Moments:
    clock, entered = Clock(pipeline.device), []
    pipeline.prompt_encoder.forget()
    started, moments = time.perf_counter(), _Moments(began=clock.now())
    hooks = [pipeline.tower.register_forward_pre_hook(lambda *_: moments.asked.append(clock.now()))]
    if (router := pipeline.tower.router) is not None:
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
    """Marks every call of the autoencoder's `decode`, which is no forward and takes no hooks."""
    decode: Callable[[Tensor], Tensor] = pipeline.autoencoder.decode

    def marked(z_BCHW: Tensor) -> Tensor:
        began = clock.now()
        pictures = decode(z_BCHW)
        moments.decoded.append((began, clock.now()))
        return pictures

    pipeline.autoencoder.decode = marked  # type: ignore[method-assign]
    try:
        yield
    finally:
        del pipeline.autoencoder.decode


def _energy_meter(device: torch.device) -> Callable[[], float] | None:
    """The driver's count of joules since it was loaded; None where there is no such count."""
    if device.type != "cuda":
        return None
    try:
        import pynvml  # type: ignore[import-not-found]
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        card = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(card)
    except pynvml.NVMLError:
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(card) / 1000
