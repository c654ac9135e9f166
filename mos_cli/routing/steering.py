"""From rules to steering: their effect on the tokens, steps and blocks of one run.

Shapes: T context tokens, J generation blocks, M understanding layers, K kept layers, S steps.
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
    ) -> None:
        self.encodings, self.computed = encodings, computed
        self.steps, self.blocks, self.layers = steps, blocks, layers
        self.device, self.transferred = device, transferred or {}
        self.rules = tuple(rule for rule in rules if isinstance(rule, Rule))
        self.baseline = next((rule for rule in rules if isinstance(rule, BaselineRule)), None)
        if self.baseline is not None and self.transferred:
            raise UsageError(f"the route rule {self.baseline} is for every token: drop it, or --route-from")
        check_numbers(rules, layers=layers, blocks=blocks, steps=steps)
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
        for rule, tokens in self._tokens[branch].items():
            times = len(steps) if rule.steps is None else len(set(rule.steps) & set(steps))
            blocks = self.blocks if rule.blocks is None else len(rule.blocks)
            done.append(Steered(rule=str(rule), tokens=tokens, decisions=len(tokens) * times * blocks))
        return tuple(done) or None

    def _make(self, branch: str, active: tuple[Rule, ...], step: int | None) -> Steering | Route | None:
        if self.baseline is not None:
            return self._baseline(branch, self.baseline)
        if not active and step is None:
            return None
        shape = (len(self.encodings[branch].tokens), self.blocks, self.layers)
        allowed_TJM, bias_TJM = torch.ones(shape, dtype=torch.bool), torch.zeros(shape)
        if step is not None:
            allowed_TJM &= self._transferred(branch, step)
        for rule in active:
            named_TJM = self._named(branch, rule, shape)
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
        return Steering(allowed_TJM[None].to(self.device), bias_TJM[None].to(self.device) if biased else None)

    def _named(self, branch: str, rule: Rule, shape: tuple[int, ...]) -> Tensor:
        """The tokens, blocks and layers of a rule as a mask, [T, J, M]."""
        named_TJM = torch.zeros(shape, dtype=torch.bool)
        blocks = range(self.blocks) if rule.blocks is None else rule.blocks
        tokens = self._tokens[branch][rule]
        named_TJM[np.ix_(tokens, tuple(blocks), rule.layers)] = True
        return named_TJM

    def _transferred(self, branch: str, step: int) -> Tensor:
        """The layers that the other run kept at a step, [T, J, M]; all layers for tokens that it did not have."""
        source = self.transferred[branch]
        tokens_T = torch.tensor(source.tokens_T)
        ids_JTK = torch.from_numpy(source.ids_SJTK[source.steps[step]].astype(np.int64))
        ids_TJK = ids_JTK.transpose(0, 1)[tokens_T.clamp_min(0)]
        kept_TJM = torch.zeros(*ids_TJK.shape[:2], self.layers, dtype=torch.bool).scatter(2, ids_TJK, True)
        return kept_TJM | (tokens_T < 0)[:, None, None]

    def _baseline(self, branch: str, rule: BaselineRule) -> Steering | Route:
        if rule.name == "shuffle":
            random = torch.Generator().manual_seed(rule.seed)
            order = torch.stack([torch.randperm(self.layers, generator=random) for _ in range(self.blocks)])
            allowed = torch.ones(len(self.encodings[branch].tokens), self.blocks, self.layers, dtype=torch.bool)
            return Steering(allowed[None].to(self.device), order_JM=order.to(self.device))
        kept = {"last": (self.layers - 1,), "uniform": tuple(range(self.layers)), "fixed": rule.layers}[rule.name]
        return uniform_route([kept] * self.blocks, self.device)
