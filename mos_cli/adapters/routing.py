"""The routing of one drawing: hooks that choose a route at every pass and change what each block reads as text.

In base models whose text evolves, what a block added is taken back in front of the next: over the stream lies the
mixture of the present block alone.

Shapes: Q tokens of a prompt, Z slots, M layers, J blocks, K kept layers, N patches, P values of a patch, D width of the
transformer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mos_cli.adapters.adapter import Adapter, untrained_logits
from mos_cli.adapters.bank import TextBank, effective, routed
from mos_cli.adapters.facts import BaseModel, TextSite, arguments_of
from mos_cli.sampling.guidance import POSITIVE, SteeringInput
from mos_cli.towers.layers import TokenGrid
from mos_cli.towers.router import Route, Steering, choose_route

UNTRAINED_TOP_K = 2
"""Layers that are kept for each token, block and slot where there is no router and rules leave more."""


def no_steering(step: int, branch: str) -> SteeringInput:
    """The steering of a run without rules."""
    return None


@dataclass
class TextRouting:
    """The routing of one drawing.

    Args:
        base: the facts of the base model.
        adapter: None for one without a router: its gates are closed.
        banks: the bank of each branch, the positive one first.
        grid: the noised patches.
        layers, blocks: M, J.
        steer: the steering of a branch at a step.
        begun: called before the first pass with its time.
        epsilon: the share of decisions that are random, in training.
    """

    base: BaseModel
    adapter: Adapter | None
    banks: Mapping[str, TextBank]
    grid: TokenGrid
    layers: int
    blocks: int
    steer: Callable[[int, str], SteeringInput] = no_steering
    begun: Callable[[float], None] = lambda t: None
    epsilon: float = 0.0
    step: int = 0
    t: float = 1.0
    routes: dict[str, Route] = field(default_factory=dict)
    """What was read in the present step, by branch; see `effective`."""
    _passes: int = 0
    _rows: list[tuple[TextBank, list[Tensor | None]]] = field(default_factory=list)

    def end_step(self) -> dict[str, Route]:
        """The routes of the step that ends; branches whose prompt has no tokens are left out."""
        routes, self.routes = self.routes, {}
        self.step += 1
        return routes

    @contextmanager
    def attached(self, transformer: nn.Module) -> Iterator[None]:
        """Within the context the transformer reads as this routing says."""
        handles = [transformer.register_forward_pre_hook(self._begin_pass, with_kwargs=True)]
        number = 0
        for site in self.base.sites:
            for block in transformer.get_submodule(site.blocks):  # type: ignore[union-attr]
                handles.append(block.register_forward_pre_hook(self._entering(number, site), with_kwargs=True))
                number += 1
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin_pass(self, transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = arguments_of(transformer, args, kwargs)
        self.t = self.base.time(arguments)
        if self._passes == 0:
            self.begun(self.t)
        names = self._branches()
        self._passes += 1
        patches_BNP = self.base.patches(arguments, self.grid)
        self._rows = []
        for row, name in enumerate(names):
            bank = self.banks[name]
            changes: list[Tensor | None] = [None] * self.blocks
            if len(bank.positions_Q):
                changes = self._route(name, bank, patches_BNP[row : row + 1])
            self._rows.append((bank, changes))

    def _branches(self) -> Sequence[str]:
        """The branches of the rows of the present pass, known by their positions."""
        if len(self.banks) == 1:
            return (POSITIVE,)
        return self.base.rows or (tuple(self.banks)[self._passes % len(self.banks)],)

    def _route(self, name: str, bank: TextBank, patches_1NP: Tensor) -> list[Tensor | None]:
        """Chooses the route of a branch, keeps it, and returns what each block adds to the text that it is given."""
        tokens, slots, device = len(bank.positions_Q), len(bank.own_layers), bank.rows_QZMD.device
        if self.adapter is None:
            logits, top_k = untrained_logits(bank.own_layers, self.layers, self.blocks, device), UNTRAINED_TOP_K
            gates_1QJZ = torch.zeros(1, tokens, self.blocks, slots, device=device)
        else:
            logits, top_k = self.adapter.logits(bank.states_QS, patches_1NP, self.t, self.grid), self.adapter.top_k
            gates_1QJZ = self.adapter.gates_JZ.expand(1, tokens, -1, -1)
        logits = logits.expand(-1, tokens, -1, -1)
        steering = self.steer(self.step, name)
        own = None
        if isinstance(steering, Route):
            route, opened_1QJZ = steering.shared_by(1, tokens), torch.ones_like(gates_1QJZ)
            own, closed_1QJZ = choose_route(logits, top_k, renormalise=True), gates_1QJZ
        else:
            route = choose_route(logits, top_k, renormalise=True, steering=steering, epsilon=self.epsilon)
            opened_1QJZ = closed_1QJZ = gates_1QJZ
            if isinstance(steering, Steering):
                assert steering.opened_BTJ is not None
                own = choose_route(logits, top_k, renormalise=True)
                opened_1QJZ = torch.where(steering.opened_BTJ.unflatten(2, (-1, slots)), 1.0, gates_1QJZ)
        with torch.no_grad():
            read = effective(route, opened_1QJZ, bank.own_layers, self.layers)
            changed = None
            if own is not None:
                before = effective(own, closed_1QJZ, bank.own_layers, self.layers)
                changed = self._differ(read, before, slots)
        self.routes[name] = Route(read.ids_BTJK, read.weights_BTJK, changed, read.slots_BTJK)
        ids_1QJZK, weights_1QJZK = routed(route, opened_1QJZ)
        return self._changes(bank, ids_1QJZK[0], weights_1QJZK[0])

    def _differ(self, first: Route, second: Route, slots: int) -> Tensor:
        """Whether two mixtures read other layers, [B, Q, J]."""

        def kept(route: Route) -> Tensor:
            assert route.slots_BTJK is not None
            places = route.slots_BTJK * self.layers + route.ids_BTJK
            shares = torch.zeros(*places.shape[:-1], slots * self.layers, device=places.device)
            return shares.scatter_add(-1, places, route.weights_BTJK) > 0

        return (kept(first) != kept(second)).any(-1)

    def _changes(self, bank: TextBank, ids_QJZK: Tensor, weights_QJZK: Tensor) -> list[Tensor | None]:
        """What each block adds to the text, [Q, D]; None where that is nothing."""
        changes: list[Tensor | None] = []
        before: Tensor | None = None
        open_J = [True] * self.blocks
        if not weights_QJZK.requires_grad:
            open_J = (weights_QJZK != 0).any(dim=(0, 2, 3)).tolist()  # type: ignore[arg-type]
        for block in range(self.blocks):
            now = bank.change(ids_QJZK[:, block], weights_QJZK[:, block]) if open_J[block] else None
            if before is None or not self.base.evolves:
                changes.append(now)
            else:
                changes.append(-before if now is None else now - before)
            before = now
        return changes

    def _entering(self, number: int, site: TextSite) -> Callable[..., Any]:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if all(changes[number] is None for _, changes in self._rows):
                return None
            x_BLD = kwargs[site.argument] if site.argument in kwargs else args[site.position]
            changed_BLD = x_BLD.clone()
            start = self.base.text_start(self.grid) if site.joint == "tail" else 0
            for row, (bank, changes) in enumerate(self._rows):
                change_QD = changes[number]
                if change_QD is not None:
                    places_Q = start + bank.positions_Q
                    changed_BLD[row] = changed_BLD[row].index_add(0, places_Q, change_QD.to(x_BLD.dtype))
            if site.argument in kwargs:
                return args, {**kwargs, site.argument: changed_BLD}
            return (*args[: site.position], changed_BLD, *args[site.position + 1 :]), kwargs

        return hook
