"""Offloading: the parts of a model are on the device while they are needed, else in main memory.

Copies stay in main memory, so that nothing is copied back. diffusers' group offloading is not used: it does not move
the scales of quantised weights, and it moves blocks only for `forward`, which references do not use.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mos_cli.errors import MosError
from mos_cli.planning.memory import GIB, Offload
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.understanding import HiddenStates, ImageInput, UnderstandingTower

_CPU = torch.device("cpu")


def limit_memory(device: torch.device, gib: float) -> None:
    """Limits this process to `gib` GiB of a CUDA device, or to all of its memory where it has less."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / total), device.index)


def memory_limit(device: torch.device) -> float:
    """The GiB of a CUDA device that this process may use."""
    fraction = torch.cuda.get_per_process_memory_fraction(device.index)
    return torch.cuda.get_device_properties(device).total_memory * fraction / GIB


class Part:
    """The tensors of networks that are moved together, including those that quantised layers keep beside their weights.

    Args:
        owners: networks, or objects with networks as attributes, which are looked up again at every move.
        pinned: whether the copies are in pinned memory, so that the device fetches them while it computes.
    """

    def __init__(self, *owners: object, device: torch.device, pinned: bool = False) -> None:
        self.owners, self.device, self.pinned = owners, device, pinned
        self.on_device = True
        self._copies: dict[tuple[object, ...], Tensor] = {}

    def offload(self) -> None:
        """Frees the device. Tensors without a copy in main memory are copied."""
        if not self.on_device:
            return
        for tensor, put in list(_held(self.owners)):
            key = _key(tensor)
            if key not in self._copies:
                copy = tensor.to(_CPU)
                self._copies[key] = copy.pin_memory() if self.pinned else copy
            put(self._copies[key])
        self.on_device = False

    def onload(self) -> None:
        """Copies the part to the device. If it has too little memory, the part stays in main memory."""
        if self.on_device:
            return
        held, moved = list(_held(self.owners)), {}
        # A tensor created in inference mode cannot be used outside of it.
        with torch.inference_mode(False):
            for tensor, _ in held:
                if _key(tensor) not in moved:
                    moved[_key(tensor)] = tensor.to(self.device, non_blocking=self.pinned, copy=True)
        self._copies = {_key(moved[_key(tensor)]): tensor for tensor, _ in held}
        for tensor, put in held:
            put(moved[_key(tensor)])
        self.on_device = True


class StreamedBlocks(nn.ModuleList):
    """Blocks of which two are on the device at a time: while one computes, the next is copied.

    They can only be iterated over, in order.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device) -> None:
        super().__init__(blocks)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.parts = [Part(block, device=device, pinned=self.stream is not None) for block in blocks]
        for part in self.parts:
            part.offload()

    def __iter__(self) -> Iterator[nn.Module]:
        fetched = self._fetch(0)
        done: list[Any] = []
        try:
            for number, block in enumerate(self._modules.values()):
                if self.stream is not None:
                    torch.cuda.current_stream(self.stream.device).wait_event(fetched)
                yield block  # type: ignore[misc]
                if self.stream is not None:
                    done.append(torch.cuda.current_stream(self.stream.device).record_event())
                if number:
                    # The device computes this block meanwhile; the one before is finished.
                    self._release(number - 1, done)
                if number + 1 < len(self.parts):
                    fetched = self._fetch(number + 1)
        finally:
            if self.stream is not None:
                torch.cuda.synchronize(self.stream.device)
            for part in self.parts:
                part.offload()

    def _fetch(self, number: int) -> Any:
        with torch.cuda.stream(self.stream):
            self.parts[number].onload()
        return None if self.stream is None else self.stream.record_event()

    def _release(self, number: int, done: list[Any]) -> None:
        if done:
            done[number].synchronize()
        self.parts[number].offload()


class Offloader:
    """Moves the parts of a model: the understanding tower is on the device while it encodes, the rest while it draws.

    Args:
        offload: "none" keeps all on the device; "blocks" also copies the generation tower's blocks one by one, and the
            autoencoder and the image encoder only when they are used.
    """

    def __init__(self, device: torch.device, offload: Offload) -> None:
        self.device, self.offload = device, offload
        self.understanding: Part | None = None
        self.drawing: list[Part] = []
        self.others: list[Part] = []

    @property
    def loading(self) -> torch.device:
        """The device to load the generation tower to; with "blocks" it may be too large for the GPU."""
        return _CPU if self.offload == "blocks" else self.device

    @contextmanager
    def briefly_onloaded(self, tower: GenerationTower) -> Iterator[None]:
        """Puts the weights that `choose_attention` inspects on the device within the context."""
        if self.offload != "blocks":
            yield
            return
        norms = Part(*(module for module in tower.modules() if isinstance(module, nn.RMSNorm)), device=self.device)
        norms.offload()
        norms.onload()
        yield
        norms.offload()

    def add_understanding(self, understanding: UnderstandingTower) -> None:
        """Adds an understanding tower that is on the device."""
        if self.offload != "none":
            self.understanding = Part(understanding, device=self.device)
            self._offload([self.understanding])

    def add_tower(self, tower: GenerationTower) -> None:
        """Adds a generation tower that was loaded to `loading`."""
        if self.offload == "blocks":
            tower.blocks = StreamedBlocks(list(tower.blocks), self.device)
            rest = [child for child in tower.children() if child is not tower.blocks]
            self.drawing.append(Part(*rest, device=self.device))
        elif self.offload == "understanding":
            self.drawing.append(Part(tower, device=self.device))
        self._offload(self.drawing)

    def add_other(self, other: object) -> None:
        """Adds an autoencoder or image encoder that is on the device."""
        if self.offload != "none":
            part = Part(other, device=self.device)
            (self.others if self.offload == "blocks" else self.drawing).append(part)
            self._offload([part])

    @contextmanager
    def understanding_onloaded(self) -> Iterator[None]:
        """Only the understanding tower is on the device within the context; afterwards the other parts are."""
        if self.understanding is None:
            yield
            return
        after = [*self.drawing, *(part for part in self.others if part.on_device)]
        self._offload([*self.drawing, *self.others])
        try:
            self.understanding.onload()
            yield
        finally:
            self._offload([self.understanding])
            for part in after:
                part.onload()

    @contextmanager
    def others_onloaded(self) -> Iterator[None]:
        """Autoencoder and image encoder are on the device within the context."""
        for part in self.others:
            part.onload()
        try:
            yield
        finally:
            self._offload(self.others)

    def _offload(self, parts: Sequence[Part]) -> None:
        for part in parts:
            part.offload()
        if parts and self.device.type == "cuda":
            # The next part has tensors of other sizes, which do not fit into the cached blocks of memory.
            torch.cuda.empty_cache()


class OffloadedTower:
    """An understanding tower that is moved to the device to encode prompts.

    Prompts encoded ahead are kept in main memory, so that a run of many prompts moves the tower once.
    """

    def __init__(self, understanding: UnderstandingTower, offloader: Offloader) -> None:
        self.understanding, self.offloader = understanding, offloader
        self._encoded: dict[str, HiddenStates] = {}

    def encode_ahead(self, prompts: Sequence[str]) -> None:
        """Encodes prompts. One that fails is left to `encode`, which raises its error."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._encoded]
        if not new:
            return
        with self.offloader.understanding_onloaded():
            for prompt in new:
                try:
                    states = self.understanding.encode([prompt])
                except MosError:
                    continue
                self._encoded[prompt] = _on(states, _CPU)

    def encode(self, prompts: list[str], pictures: Sequence[Sequence[ImageInput]] = ()) -> HiddenStates:
        """As `UnderstandingTower.encode`, with the same result."""
        if len(prompts) == 1 and prompts[0] in self._encoded and not any(pictures):
            return _on(self._encoded[prompts[0]], self.offloader.device)
        with self.offloader.understanding_onloaded():
            return self.understanding.encode(prompts, pictures)


def _on(states: HiddenStates, device: torch.device) -> HiddenStates:
    return replace(states, states_BTMS=states.states_BTMS.to(device), mask_BT=states.mask_BT.to(device))


def _held(owners: Sequence[object]) -> Iterator[tuple[Tensor, Callable[[Tensor], None]]]:
    """Every tensor of the networks, with the function that replaces it."""
    for owner in owners:
        networks = [owner] if isinstance(owner, nn.Module) else vars(owner).values()
        for module in (part for network in networks if isinstance(network, nn.Module) for part in network.modules()):
            for weight in module._parameters.values():
                if weight is not None:
                    yield weight.data, partial(setattr, weight, "data")
                    yield from _beside(vars(weight))
            yield from _beside(module._buffers)
            yield from _beside(vars(module))


def _beside(values: dict[str, Any]) -> Iterator[tuple[Tensor, Callable[[Tensor], None]]]:
    """The tensors among attributes, and those in the states that bitsandbytes keeps beside a weight."""
    for name, value in values.items():
        if type(value) is Tensor:
            yield value, partial(values.__setitem__, name)
        elif type(value).__module__.startswith("bitsandbytes") and not isinstance(value, Tensor | nn.Module):
            yield from _beside(vars(value))


def _key(tensor: Tensor) -> tuple[object, ...]:
    """Equal for tensors that are one piece of memory: bitsandbytes has several names for a weight."""
    place = (tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset())
    return (*place, tensor.dtype, tensor.shape, tensor.stride())
