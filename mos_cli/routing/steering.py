"""From rules to steering: their effect on the tokens, steps and blocks of one run.

Shapes: T context tokens, J generation blocks, M understanding layers, K kept layers, S steps. In base models with
adapters, J are the blocks times their slots, slot by slot in each block.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from mos_cli.errors import UsageError
from mos_cli.routing.alignment import EncodedPrompt
from mos_cli.routing.rules import AnyRule, BaselineRule, Rule, check_numbers, no_such_word, tokens_of
from mos_cli.routing.trace import Steered
from mos_cli.routing.transfer import SourceRoutes
from mos_cli.towers.router import Route, Steering, uniform_route


class Steerer:
    """The steering of all steps of a run, from its rules. It is computed before the first step.

    Args:
        encodings: the encoded prompt of each branch. A rule applies to every branch that has its word.
        computed: the steps at which each branch is computed.
        steps, blocks, layers: their numbers in the run and the model; rules may not name others.
        transferred: the routes of another run, by branch; rules may only narrow them.
        own_layers: in base models with adapters, the layer that each slot of a block reads itself. Rules open gates
            there, see `Steering.opened_BTJ`.

    Raises:
        UsageError: a rule names a word, a layer, a block or a step that does not exist, leaves no layer to read, or has
            no effect.
    """

    def __init__(
        self,
        rules: Sequence[AnyRule],
        encodings: Mapping[str, EncodedPrompt],
        computed: Mapping[str, Sequence[int]],
        *,
        steps: int,
        blocks: int,
        layers: int,
        device: torch.device,
        transferred: Mapping[str, SourceRoutes] | None = None,
        own_layers: Sequence[int] = (),
    ) -> None:
        self.encodings, self.computed = encodings, computed
        self.steps, self.blocks, self.layers = steps, blocks, layers
        self.device, self.transferred = device, transferred or {}
        self.own_layers, self.slots = tuple(own_layers), max(1, len(own_layers))
        self.rules = tuple(rule for rule in rules if isinstance(rule, Rule))
        self.baseline = next((rule for rule in rules if isinstance(rule, BaselineRule)), None)
        if self.baseline is not None and self.transferred:
            raise UsageError(f"the route rule {self.baseline} is for every token: drop it, or --route-from")
        check_numbers(rules, layers=layers, blocks=blocks, steps=steps, slots=len(own_layers))
        self._tokens = {
            name: {rule: tokens_of(rule, encoding.prompt, encoding.tokens) for rule in self.rules}
            for name, encoding in encodings.items()
        }
        for rule in self.rules:
            if not any(tokens[rule] for tokens in self._tokens.values()):
                first = next(iter(encodings.values()))
                raise no_such_word(rule, first.prompt, first.tokens)
        # Rules apply to ranges of steps, so that most steps have the same steering.
        self._made = lru_cache(maxsize=None)(self._make)
        for name in encodings:
            for step in computed[name]:
                self(step, name)
        for number, rule in enumerate(self.rules):
            if not any((self.done(name) or ())[number].decisions for name in encodings):
                raise UsageError(f"the route rule {rule} has no effect: guidance reads its word at none of its steps")

    def __call__(self, step: int, branch: str) -> Steering | Route | None:
        """The steering of a branch at a step."""
        active = tuple(rule for rule in self.rules if rule.steps is None or step in rule.steps)
        transfers = branch in self.transferred and step in self.transferred[branch].steps
        return self._made(branch, active, step if transfers else None)

    def done(self, branch: str) -> tuple[Steered, ...] | None:
        """The tokens and decisions of each rule in a branch; None without rules."""
        steps = self.computed[branch]
        if self.baseline is not None:
            tokens = tuple(range(len(self.encodings[branch].tokens)))
            return (Steered(rule=str(self.baseline), tokens=tokens, decisions=len(tokens) * self.blocks * len(steps)),)
        done = []
        for rule in self.rules:
            tokens = self._tokens[branch][rule]
            times = len(steps) if rule.steps is None else len(set(rule.steps) & set(steps))
            blocks = self.blocks if rule.blocks is None else len(rule.blocks)
            done.append(Steered(rule=str(rule), tokens=tokens, decisions=len(tokens) * times * blocks))
        return tuple(done) or None

    def _make(self, branch: str, active: tuple[Rule, ...], step: int | None) -> Steering | Route | None:
        if self.baseline is not None:
            return self._baseline(branch, self.baseline)
        if not active and step is None:
            return None
        shape = (len(self.encodings[branch].tokens), self.blocks * self.slots, self.layers)
        allowed_TJM, bias_TJM = torch.ones(shape, dtype=torch.bool), torch.zeros(shape)
        opened_TJ = torch.zeros(shape[:2], dtype=torch.bool)
        own_J = torch.tensor(self.own_layers or (0,)).repeat(self.blocks)
        if step is not None:
            taken_TJM = self._transferred(branch, step)
            allowed_TJM &= taken_TJM
            opened_TJ |= ~taken_TJM.all(dim=2)
        for rule in active:
            named_TJM = self._named(branch, rule, shape)
            # A ban of layers that are not read leaves the gate as it is: they are not read then either.
            opens_TJM = named_TJM[:, torch.arange(shape[1]), own_J, None] if rule.operator == "!=" else named_TJM
            if rule.operator != "+=" or rule.amount:
                opened_TJ |= opens_TJM.any(dim=2)
            if rule.operator == "+=":
                bias_TJM += rule.amount * named_TJM
            elif rule.operator == "!=":
                allowed_TJM &= ~named_TJM
            else:
                allowed_TJM &= named_TJM | ~named_TJM.any(dim=2, keepdim=True)
        if not allowed_TJM.any(dim=2).all():
            token = int((~allowed_TJM.any(dim=2)).nonzero()[0, 0])
            text = self.encodings[branch].tokens[token].text
            raise UsageError(
                f"the route rules leave {text!r} no layer to read: drop one of {', '.join(map(str, active))}"
            )
        biased = any(rule.operator == "+=" for rule in active)
        return Steering(
            allowed_TJM[None].to(self.device),
            bias_TJM[None].to(self.device) if biased else None,
            opened_BTJ=opened_TJ[None].to(self.device) if self.own_layers else None,
        )

    def _named(self, branch: str, rule: Rule, shape: tuple[int, ...]) -> Tensor:
        """The tokens, blocks and layers of a rule as a mask, [T, J, M]."""
        named_TJM = torch.zeros(shape, dtype=torch.bool)
        blocks = range(self.blocks) if rule.blocks is None else rule.blocks
        tokens = self._tokens[branch][rule]
        for slot, layers in self._slots(rule).items():
            columns = [block * self.slots + slot for block in blocks]
            named_TJM[np.ix_(tokens, columns, layers)] = True
        return named_TJM

    def _slots(self, rule: Rule) -> dict[int, list[int]]:
        """The layers that a rule names in each slot."""
        named: dict[int, list[int]] = {}
        for layer in rule.layers:
            slots = range(self.slots) if rule.operator == "!=" else [self._nearest(layer)]
            for slot in rule.slots or slots:
                named.setdefault(slot, []).append(layer)
        return named

    def _nearest(self, layer: int) -> int:
        """The slot whose own layer is nearest to a layer; the first of two."""
        return min(range(len(self.own_layers)), key=lambda slot: abs(self.own_layers[slot] - layer), default=0)

    def _transferred(self, branch: str, step: int) -> Tensor:
        """The layers that the other run kept at a step, [T, J, M]; all layers for tokens that it did not have."""
        source = self.transferred[branch]
        tokens_T = torch.tensor(source.tokens_T)
        ids_JTK = torch.from_numpy(source.ids_SJTK[source.steps[step]].astype(np.int64))
        ids_TJK = ids_JTK.transpose(0, 1)[tokens_T.clamp_min(0)]
        if source.slots_SJTK is not None:
            slots_JTK = torch.from_numpy(source.slots_SJTK[source.steps[step]].astype(np.int64))
            ids_TJK = slots_JTK.transpose(0, 1)[tokens_T.clamp_min(0)] * self.layers + ids_TJK
        kept_TJM = torch.zeros(*ids_TJK.shape[:2], self.slots * self.layers, dtype=torch.bool).scatter(2, ids_TJK, True)
        kept_TJM = kept_TJM.unflatten(2, (self.slots, self.layers)).flatten(1, 2)
        return kept_TJM | (tokens_T < 0)[:, None, None]

    def _baseline(self, branch: str, rule: BaselineRule) -> Steering | Route:
        if rule.name == "shuffle":
            random = torch.Generator().manual_seed(rule.seed)
            columns = self.blocks * self.slots
            order = torch.stack([torch.randperm(self.layers, generator=random) for _ in range(columns)])
            allowed = torch.ones(len(self.encodings[branch].tokens), columns, self.layers, dtype=torch.bool)
            opened = allowed.any(dim=2)[None].to(self.device) if self.own_layers else None
            return Steering(allowed[None].to(self.device), order_JM=order.to(self.device), opened_BTJ=opened)
        kept = {"last": (self.layers - 1,), "uniform": tuple(range(self.layers)), "fixed": rule.layers}[rule.name]
        return uniform_route([kept] * (self.blocks * self.slots), self.device)
