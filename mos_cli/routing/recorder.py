"""Recording routes, probabilities and attention while a picture is drawn.

The data stays on the device and is copied once, at the end.

Shapes: S steps, J generation blocks, T context tokens, K kept layers, M understanding layers, N patches, R patches of
the references, L queries of an attention.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mos_cli.routing.trace import RecordOptions, RegionGrid, Routes
from mos_cli.sampling.sampler import Step
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.layers import VariableLengths
from mos_cli.towers.router import Route


@dataclass
class Recorder:
    """An observer of the sampler that keeps every route of one picture, and what the options request.

    Args:
        place, pictures: which picture of a batch it is, of how many.
    """

    record_options: RecordOptions
    place: int = 0
    pictures: int = 1
    times: list[float] = field(default_factory=list)
    steps: dict[str, list[int]] = field(default_factory=dict)
    x_hats: list[Tensor] = field(default_factory=list)
    grid: RegionGrid | None = None
    _routes: dict[str, list[Route]] = field(default_factory=dict)
    _probabilities: dict[str, list[Tensor]] = field(default_factory=dict)
    _regions: dict[str, Tensor] = field(default_factory=dict)
    _passes: list["_Pass"] = field(default_factory=list)

    def __call__(self, step: Step) -> None:
        self.times.append(step.t)
        if self.record_options.previews:
            self.x_hats.append(step.x_hat_BCHW)
        for name, route in step.routes.items():
            self.steps.setdefault(name, []).append(step.index)
            self._routes.setdefault(name, []).append(route)
        # The tower computed the branches in this order, each of all pictures. Without hooks there are no passes.
        rows = [row for one in self._passes for row in one.rows][self.place :: self.pictures]
        for name, row in zip(step.routes, rows, strict=True) if rows else ():
            if row.probabilities_JTM is not None:
                self._probabilities.setdefault(name, []).append(row.probabilities_JTM)
            if row.attention_weights:
                weights_JTN = torch.stack(row.attention_weights)
                self._regions[name] = self._regions.get(name, torch.zeros_like(weights_JTN)) + weights_JTN
        self._passes.clear()

    @contextmanager
    def attached(self, tower: GenerationTower) -> Iterator[None]:
        """Adds the hooks that the options need to a tower within the context."""
        handles = []
        if self.record_options.probabilities or self.record_options.regions:
            handles.append(tower.register_forward_pre_hook(self._begin_pass))
        if self.record_options.probabilities and tower.router is not None:
            handles.append(tower.router.register_forward_hook(self._record_logits))
        if self.record_options.regions:
            for block in tower.blocks:
                attention: Any = block.cross if hasattr(block, "cross") else block.attention
                handles.append(attention.register_forward_pre_hook(self._record_attention))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def routes(self) -> dict[str, Routes]:
        """The decisions of the picture, [S, J, T, K] per branch, in the types of the trace file."""
        routes = {}
        for name, kept in self._routes.items():
            tokens = kept[0].ids_BTJK.shape[1]
            probabilities, regions = self._probabilities.get(name), self._regions.get(name)
            if probabilities is not None:
                # With routing per sample, the one decision is written for every token.
                probabilities = torch.stack(probabilities).expand(-1, -1, tokens, -1).cpu().numpy()
            routes[name] = Routes(
                torch.stack([route.ids_BTJK[0].transpose(0, 1) for route in kept]).to(torch.uint8).cpu().numpy(),
                torch.stack([route.weights_BTJK[0].transpose(0, 1) for route in kept]).half().cpu().numpy(),
                probabilities,
                None if regions is None else (regions / len(kept)).half().cpu().numpy(),
                _slots(kept),
            )
        return routes

    def changed(self, name: str) -> int | None:
        """The number of a branch's decisions in which rules changed the router's choice; None without rules."""
        changed = [route.changed_BTJ for route in self._routes[name] if route.changed_BTJ is not None]
        return int(torch.stack([each.sum() for each in changed]).sum()) if changed else None

    def _begin_pass(self, tower: nn.Module, inputs: tuple[Any, ...]) -> None:
        z_BCHW, _, bank = inputs
        rows, columns = (side // tower.patch for side in z_BCHW.shape[-2:])
        self.grid = RegionGrid(rows=rows, columns=columns) if self.record_options.regions else None
        self._passes.append(
            _Pass(rows * columns, bank.bank_BTMD.shape[1], bank.padding or VariableLengths((bank.bank_BTMD.shape[1],)))
        )

    def _record_logits(self, router: nn.Module, inputs: tuple[Any, ...], logits_BTMJ: Tensor) -> None:
        self._passes[-1].record_logits(logits_BTMJ)

    def _record_attention(self, attention: Any, inputs: tuple[Any, ...]) -> None:
        self._passes[-1].record_attention(attention.attention_weights(*inputs))


def _slots(kept: Sequence[Route]) -> np.ndarray | None:
    """The slots of the kept layers, [S, J, T, K]; None in models without slots."""
    slots = [route.slots_BTJK[0].transpose(0, 1) for route in kept if route.slots_BTJK is not None]
    return torch.stack(slots).to(torch.uint8).cpu().numpy() if slots else None


@dataclass
class _Row:
    """What was recorded of one branch in a pass; the attention weights of each block are [T, N]."""

    probabilities_JTM: Tensor | None = None
    attention_weights: list[Tensor] = field(default_factory=list)


class _Pass:
    """One call of the tower: the number of its patches, and what was recorded of each row."""

    def __init__(self, patches: int, tokens: int, padding: VariableLengths) -> None:
        self.patches, self.padding = patches, padding
        self.tokens = [tokens - padding.longest + length for length in padding.lengths]
        self.rows = [_Row() for _ in padding.lengths]

    def record_logits(self, logits_BTMJ: Tensor) -> None:
        """Keeps the probabilities of all layers."""
        shared = logits_BTMJ.shape[1] == 1
        for number, row in enumerate(self.rows):
            logits_1TMJ = logits_BTMJ[number : number + 1] if shared else self.padding.row(logits_BTMJ, number)
            row.probabilities_JTM = logits_1TMJ[0].float().softmax(dim=1).permute(2, 0, 1).half()

    def record_attention(self, attention_weights: Sequence[Tensor]) -> None:
        """Keeps the part of a block's attention weights [queries, keys] that patches give to the context.

        The keys are [patches; context; references], or the context alone in cross-attention.
        """
        for weights_LK, row, tokens in zip(attention_weights, self.rows, self.tokens, strict=True):
            first = 0 if weights_LK.shape[1] == tokens else self.patches
            row.attention_weights.append(weights_LK[: self.patches, first : first + tokens].T)
