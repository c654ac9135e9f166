"""Where the parts of a model lie, and when they move: on the device while they are needed, else in main memory.

Copies stay in main memory, so that nothing travels back. diffusers' group offloading is not used: it leaves the scales
of quantised weights where they are, and moves blocks for `forward` alone, which references do not pass.
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


def cap(device: torch.device, gib: float) -> None:
    """Lets this process use so many GiB of a CUDA device, or all of it where it has less."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / total), device.index)


def card(device: torch.device) -> float:
    """The GiB of a CUDA device that this process may use."""
    fraction = torch.cuda.get_per_process_memory_fraction(device.index)
    return torch.cuda.get_device_properties(device).total_memory * fraction / GIB


class Part:
    """The tensors of networks that come and go together, those that quantised layers keep beside their weights too.

    Args:
        owners: networks, or what holds some in its attributes: they are looked up anew whenever the part leaves.
        pinned: the copies in main memory are such that the device fetches them while it computes.
    """

    def __init__(self, *owners: object, device: torch.device, pinned: bool = False) -> None:
        self.owners, self.device, self.pinned = owners, device, pinned
        self.here = True
        self._copies: dict[tuple[object, ...], Tensor] = {}

    def offload(self) -> None:
        """Frees the device; what has no copy in main memory yet gets one."""
        if not self.here:
            return
        for tensor, put in list(_held(self.owners)):
            key = _key(tensor)
            if key not in self._copies:
                copy = tensor.to(_CPU)
                self._copies[key] = copy.pin_memory() if self.pinned else copy
            put(self._copies[key])
        self.here = False

    def onload(self) -> None:
        """Copies the part to the device; where that has too little memory, the part stays where it was."""
        if self.here:
            return
        held, moved = list(_held(self.owners)), {}
        # Made in inference mode, a tensor could not be used outside of it.
        with torch.inference_mode(False):
            for tensor, _ in held:
                if _key(tensor) not in moved:
                    moved[_key(tensor)] = tensor.to(self.device, non_blocking=self.pinned, copy=True)
        self._copies = {_key(moved[_key(tensor)]): tensor for tensor, _ in held}
        for tensor, put in held:
            put(moved[_key(tensor)])
        self.here = True


class StreamedBlocks(nn.ModuleList):
    """Blocks of which two are on the device at a time: while one computes, the next is fetched.

    To go through them in their order is all that can be done with them.
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
                    # The device is busy with this block meanwhile: only what has computed is let go.
                    self._let_go(number - 1, done)
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

    def _let_go(self, number: int, done: list[Any]) -> None:
        if done:
            done[number].synchronize()
        self.parts[number].offload()


class Offloader:
    """What is on the device when: the understanding tower while it reads, the rest while a picture is drawn.

    Args:
        offload: "none" leaves all on the device; "blocks" fetches the generation tower's blocks one by one, too, and
            the autoencoder and the eyes only when they are used.
    """

    def __init__(self, device: torch.device, offload: Offload) -> None:
        self.device, self.offload = device, offload
        self.understanding: Part | None = None
        self.drawing: list[Part] = []
        self.others: list[Part] = []

    @property
    def loading(self) -> torch.device:
        """Where the generation tower is loaded to: with "blocks" it may be too large for the device as a whole."""
        return _CPU if self.offload == "blocks" else self.device

    @contextmanager
    def briefly_onloaded(self, tower: GenerationTower) -> Iterator[None]:
        """What `choose_attention` looks at is on the device within the block, wherever the tower was loaded to."""
        if self.offload != "blocks":
            yield
            return
        norms = Part(*(module for module in tower.modules() if isinstance(module, nn.RMSNorm)), device=self.device)
        norms.offload()
        norms.onload()
        yield
        norms.offload()

    def add_understanding(self, understanding: UnderstandingTower) -> None:
        """Takes over an understanding tower that is on the device."""
        if self.offload != "none":
            self.understanding = Part(understanding, device=self.device)
            self._offload([self.understanding])

    def add_tower(self, tower: GenerationTower) -> None:
        """Takes over a generation tower that was loaded to `loading`."""
        if self.offload == "blocks":
            tower.blocks = StreamedBlocks(list(tower.blocks), self.device)
            rest = [child for child in tower.children() if child is not tower.blocks]
            self.drawing.append(Part(*rest, device=self.device))
        elif self.offload == "understanding":
            self.drawing.append(Part(tower, device=self.device))
        self._offload(self.drawing)

    def add_other(self, other: object) -> None:
        """Takes over an autoencoder or eyes on the device."""
        if self.offload != "none":
            part = Part(other, device=self.device)
            (self.others if self.offload == "blocks" else self.drawing).append(part)
            self._offload([part])

    @contextmanager
    def understanding_onloaded(self) -> Iterator[None]:
        """The understanding tower is on the device within the block, alone; after it, what draws is there."""
        if self.understanding is None:
            yield
            return
        after = [*self.drawing, *(part for part in self.others if part.here)]
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
        """Autoencoder and eyes are on the device within the block."""
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
            # What comes next has tensors of other sizes, and finds no room between the pieces that are kept.
            torch.cuda.empty_cache()


class OffloadedTower:
    """An understanding tower that comes to the device when there is something to read.

    What it reads ahead is kept in main memory: for a long run of prompts, one visit.
    """

    def __init__(self, understanding: UnderstandingTower, offloader: Offloader) -> None:
        self.understanding, self.offloader = understanding, offloader
        self._encoded: dict[str, HiddenStates] = {}

    def encode_ahead(self, prompts: Sequence[str]) -> None:
        """Reads prompts; one that cannot be read is left to `read`, which says why."""
        unread = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._encoded]
        if not unread:
            return
        with self.offloader.understanding_onloaded():
            for prompt in unread:
                try:
                    states = self.understanding.encode([prompt])
                except MosError:
                    continue
                self._encoded[prompt] = _on(states, _CPU)

    def encode(self, prompts: list[str], pictures: Sequence[Sequence[ImageInput]] = ()) -> HiddenStates:
        """Reads as the tower does, with the same result."""
        if len(prompts) == 1 and prompts[0] in self._encoded and not any(pictures):
            return _on(self._encoded[prompts[0]], self.offloader.device)
        with self.offloader.understanding_onloaded():
            return self.understanding.encode(prompts, pictures)


def _on(understanding_onloaded: HiddenStates, device: torch.device) -> HiddenStates:
    return replace(
        understanding_onloaded,
        states_BTMS=understanding_onloaded.states_BTMS.to(device),
        mask_BT=understanding_onloaded.mask_BT.to(device),
    )


def _held(owners: Sequence[object]) -> Iterator[tuple[Tensor, Callable[[Tensor], None]]]:
    """Every tensor of the networks, with what puts another in its place."""
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
    """Tensors with equal keys are one piece of memory: bitsandbytes has several names for a weight."""
    place = (tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset())
    return (*place, tensor.dtype, tensor.shape, tensor.stride())
