"""Comparing the routes of two runs, choice by choice: agreements, near-ties and real changes.

A decision is made for one token in one block at one step; its choices are the layers that are kept, in models with
slots each in its slot. A choice that only one run makes is a flip: one is exchanged for another, the strongest for the
strongest.

A flip is a near-tie if the weights of the two layers differ by at most NEAR in both runs, as shares of the decision's
weight; otherwise it is a real change. The weight of a layer that was not kept is known only if all probabilities were
recorded. Without them it lies between 0 and the weight of the layer it is exchanged for, so that near-ties are certain
if that weight is at most NEAR, and there may be more of them. Where a rule or another run decided, a flip is a real
change: the router's probabilities are those before the rule.

Shapes: S steps and T tokens compared, J generation blocks, K kept layers, M understanding layers, F flips at most = K.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mos_cli.errors import InputError
from mos_cli.routing.alignment import keyed_words, nearest_steps, shared_words
from mos_cli.routing.rules import Rule, parse_rule
from mos_cli.routing.trace import Routes, Trace, TraceBranch

NEAR = 0.1


@dataclass(frozen=True)
class Tally:
    """Counts of agreeing and differing choices.

    `distance` is the total variation distance of the weights over the layers, mean over decisions: 0 = equal, 1 = no
    common layer. `first` is the first step, by its number in the first run, at which a choice differs.
    """

    choices: int
    near_ties: int
    changes: int
    distance: float
    first: int | None

    @property
    def agree(self) -> int:
        return self.choices - self.near_ties - self.changes


@dataclass(frozen=True)
class WordDifference:
    """A word that both prompts have; `nth` (from 1) is its occurrence."""

    text: str
    nth: int
    special: bool
    tally: Tally

    @property
    def label(self) -> str:
        return self.text if self.nth == 1 else f"{self.text}#{self.nth}"


@dataclass(frozen=True)
class BranchDifference:
    """A guidance branch that both runs have.

    `steps` are the compared steps, by their numbers in both runs, and `time_distance` is the largest distance of the
    times of such a pair. `only_a` and `only_b` are the words that only one prompt has.
    """

    words: tuple[WordDifference, ...]
    tally: Tally
    steps: tuple[tuple[int, int], ...]
    time_distance: float
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]


@dataclass(frozen=True)
class Difference:
    """The comparison of two runs. With `exact` all near-ties are known; otherwise there may be more of them."""

    branches: dict[str, BranchDifference]
    tally: Tally
    identical: bool
    exact: bool


def compare(a: Trace, routes_a: Mapping[str, Routes], b: Trace, routes_b: Mapping[str, Routes]) -> Difference:
    """Compares the branches that both runs have.

    Words are aligned by their text and occurrence, special tokens by their name, image tokens by their cell, and steps
    by their times, as mutually nearest pairs.

    Raises:
        InputError: the models have different layers or blocks, or the prompts no word in common.
    """
    for what, count_a, count_b in (
        ("understanding layers", len(a.layers), len(b.layers)),
        ("generation blocks", a.blocks, b.blocks),
    ):
        if count_a != count_b:
            raise InputError(
                f"these runs cannot be compared: {a.recipe.model} has {count_a} {what}, {b.recipe.model} has {count_b}"
            )
    branches, parts = {}, []
    for name in (name for name in a.branches if name in b.branches):
        compared = _compare_branch(a, a.branches[name], routes_a[name], b, b.branches[name], routes_b[name])
        if compared is not None:
            branches[name], part = compared
            parts.append(part)
    if all(word.special for branch in branches.values() for word in branch.words):
        raise InputError("these runs cannot be compared: their prompts have no word in common")
    identical = (a.times, a.branches.keys()) == (b.times, b.branches.keys()) and all(
        branch.tokens == b.branches[name].tokens and _equal(a, routes_a[name], routes_b[name])
        for name, branch in a.branches.items()
    )
    exact = all(routes[name].probabilities_SJTM is not None for routes in (routes_a, routes_b) for name in branches)
    return Difference(branches, _tally(parts), identical, exact)


@dataclass(frozen=True)
class _Counts:
    """Per decision [S, J, T]: choices, flips of both kinds, distance of the weights; and A's step numbers."""

    steps: tuple[int, ...]
    choices_SJT: np.ndarray
    near_SJT: np.ndarray
    real_SJT: np.ndarray
    distance_SJT: np.ndarray

    def of(self, columns: Sequence[int]) -> "_Counts":
        cut = (self.choices_SJT, self.near_SJT, self.real_SJT, self.distance_SJT)
        return _Counts(self.steps, *(counts[:, :, columns] for counts in cut))


def _tally(parts: Sequence[_Counts]) -> Tally:
    differs = [
        step
        for part in parts
        for step, flips in zip(part.steps, (part.near_SJT + part.real_SJT).sum(axis=(1, 2)), strict=True)
        if flips
    ]
    return Tally(
        choices=sum(int(part.choices_SJT.sum()) for part in parts),
        near_ties=sum(int(part.near_SJT.sum()) for part in parts),
        changes=sum(int(part.real_SJT.sum()) for part in parts),
        distance=float(np.concatenate([part.distance_SJT.ravel() for part in parts]).mean()),
        first=min(differs, default=None),
    )


def _compare_branch(
    a: Trace, branch_a: TraceBranch, routes_a: Routes, b: Trace, branch_b: TraceBranch, routes_b: Routes
) -> tuple[BranchDifference, _Counts] | None:
    """None if the prompts have no word in common."""
    words_a, words_b = keyed_words(branch_a), keyed_words(branch_b)
    shared = shared_words(words_a, words_b)
    if not shared:
        return None
    tokens = [pair for pairs in shared.values() for pair in pairs]
    times_a, times_b = ([trace.times[n] for n in side.steps] for trace, side in ((a, branch_a), (b, branch_b)))
    steps = nearest_steps(times_a, times_b)
    side_a = _cut(a, branch_a, routes_a, [i for i, _ in steps], [i for i, _ in tokens])
    side_b = _cut(b, branch_b, routes_b, [i for _, i in steps], [i for _, i in tokens])
    pairs = tuple((branch_a.steps[i], branch_b.steps[j]) for i, j in steps)
    counts = _count(side_a, side_b, tuple(step for step, _ in pairs))
    words, first = [], 0
    for key, matched in shared.items():
        columns = range(first, first + len(matched))
        words.append(WordDifference(key.text, key.nth, key.kind == "special", _tally([counts.of(columns)])))
        first += len(matched)
    return BranchDifference(
        words=tuple(words),
        tally=_tally([counts]),
        steps=pairs,
        time_distance=max(abs(times_a[i] - times_b[j]) for i, j in steps),
        only_a=tuple(key.text for key in words_a if key not in shared),
        only_b=tuple(key.text for key in words_b if key not in shared),
    ), counts


@dataclass(frozen=True)
class _Side:
    """The compared decisions of one run; weights are shares of a decision's, 0 where there is no layer.

    `choices` are those of `_choices`. `ruled`: rules or another run may have decided.
    """

    choices_SJTK: np.ndarray
    weights_SJTK: np.ndarray
    probabilities_SJTM: np.ndarray | None
    ruled_SJT: np.ndarray

    def padded(self, kept: int) -> "_Side":
        """Padded to the number of kept layers of the other run."""
        more = [(0, 0)] * 3 + [(0, kept - self.choices_SJTK.shape[-1])]
        return replace(self, choices_SJTK=np.pad(self.choices_SJTK, more), weights_SJTK=np.pad(self.weights_SJTK, more))


def _choices(routes: Routes, layers: int) -> np.ndarray:
    """The layers that are kept, [S, J, T, K], as slot * M + layer in models with slots."""
    if routes.slots_SJTK is None:
        return routes.ids_SJTK
    return routes.slots_SJTK.astype(np.int32) * layers + routes.ids_SJTK


def _ruled(trace: Trace, branch: TraceBranch) -> np.ndarray:
    """Whether rules or another run may have chosen the layers of each decision of a branch, [S, J, T]."""
    ruled_SJT = np.zeros((len(branch.steps), trace.blocks, len(branch.tokens)), dtype=bool)
    if (source := trace.recipe.route_from) is not None:
        ruled_SJT[np.array(branch.steps) / len(trace.times) < source.until] = True
    for steered in branch.steered or ():
        rule = parse_rule(steered.rule)
        steps, blocks = (rule.steps, rule.blocks) if isinstance(rule, Rule) else (None, None)
        rows = [row for row, step in enumerate(branch.steps) if steps is None or step in steps]
        columns = [block for block in range(trace.blocks) if blocks is None or block in blocks]
        ruled_SJT[np.ix_(rows, columns, steered.tokens)] = True
    return ruled_SJT


def _cut(trace: Trace, branch: TraceBranch, routes: Routes, steps: list[int], tokens: list[int]) -> _Side:
    def cut(array: np.ndarray) -> np.ndarray:
        return array[steps][:, :, tokens]

    weights = cut(routes.weights_SJTK).astype(np.float32)
    weights /= weights.sum(axis=-1, keepdims=True)
    probabilities = None if routes.probabilities_SJTM is None else cut(routes.probabilities_SJTM).astype(np.float32)
    return _Side(cut(_choices(routes, len(trace.layers))), weights, probabilities, cut(_ruled(trace, branch)))


def _count(a: _Side, b: _Side, steps: tuple[int, ...]) -> _Counts:
    kept = max(a.choices_SJTK.shape[-1], b.choices_SJTK.shape[-1])
    a, b = a.padded(kept), b.padded(kept)
    reads_a, reads_b = a.weights_SJTK > 0, b.weights_SJTK > 0
    same = a.choices_SJTK[..., :, None] == b.choices_SJTK[..., None, :]
    same &= reads_a[..., :, None] & reads_b[..., None, :]
    lost, gained = reads_a & ~same.any(axis=-1), reads_b & ~same.any(axis=-2)
    in_b = (same * b.weights_SJTK[..., None, :]).sum(axis=-1)
    distance = np.abs(a.weights_SJTK - in_b).sum(axis=-1) + (b.weights_SJTK * gained).sum(axis=-1)

    # Layers are in order of strength: the strongest lost one is exchanged for the strongest gained one.
    went, came = np.argsort(~lost, axis=-1, kind="stable"), np.argsort(~gained, axis=-1, kind="stable")
    lost_F, gained_F = np.take_along_axis(lost, went, -1), np.take_along_axis(gained, came, -1)
    ids_a, ids_b = np.take_along_axis(a.choices_SJTK, went, -1), np.take_along_axis(b.choices_SJTK, came, -1)
    near_F = lost_F & gained_F & _close(a, went, ids_a, ids_b) & _close(b, came, ids_b, ids_a)
    return _Counts(
        steps=steps,
        choices_SJT=np.maximum(reads_a.sum(axis=-1), reads_b.sum(axis=-1)),
        near_SJT=near_F.sum(axis=-1),
        real_SJT=((lost_F | gained_F) & ~near_F).sum(axis=-1),
        distance_SJT=distance / 2,
    )


def _close(side: _Side, places_SJTF: np.ndarray, own_SJTF: np.ndarray, other_SJTF: np.ndarray) -> np.ndarray:
    """Whether the weights of these layers differ by at most NEAR from those that the other run reads instead."""
    free_SJT1 = ~side.ruled_SJT[..., None]
    if side.probabilities_SJTM is None:
        return free_SJT1 & (np.take_along_axis(side.weights_SJTK, places_SJTF, -1) <= NEAR)
    own, other, kept = (
        np.take_along_axis(side.probabilities_SJTM, ids.astype(np.intp), -1)
        for ids in (own_SJTF, other_SJTF, side.choices_SJTK)
    )
    whole = (kept * (side.weights_SJTK > 0)).sum(axis=-1, keepdims=True)
    return free_SJT1 & (np.abs(own - other) <= NEAR * whole)


def _equal(trace: Trace, a: Routes, b: Routes) -> bool:
    choices_a, choices_b = (_choices(routes, len(trace.layers)) for routes in (a, b))
    return np.array_equal(choices_a, choices_b) and np.array_equal(a.weights_SJTK, b.weights_SJTK)
