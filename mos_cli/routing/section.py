"""A section of a recording: the routes of one branch, over all steps and blocks or over a range of them.

Shapes: S steps, J generation blocks, T context tokens, K kept layers, M understanding layers, Z slots.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mos_cli.errors import InputError, UsageError
from mos_cli.routing.analysis import Word, agreement, split_words, step_changes, summarise
from mos_cli.routing.prompt_weights import branch_weights, token_weights, weight_text
from mos_cli.routing.rules import Rule, parse_rule
from mos_cli.routing.trace import BranchSummary, Recording, Routes, Steered, TraceBranch


@dataclass(frozen=True)
class Section:
    """One branch over some of its steps and blocks.

    `steps` and `blocks` are the numbers that it covers, both ascending, and `summary` is that of their decisions.
    `routes` are the decisions and `changes` those of `step_changes`; both are None where the trace is a summary.
    `agreement` compares with each other branch, per block, see `analysis.agreement`. `whole`: no range was given.
    """

    recording: Recording
    name: str
    steps: tuple[int, ...]
    blocks: range
    summary: BranchSummary
    routes: Routes | None
    changes: tuple[float, ...] | None
    agreement: dict[str, tuple[float, ...]]
    whole: bool

    @property
    def branch(self) -> TraceBranch:
        return self.recording.trace.branches[self.name]

    @property
    def decisions(self) -> Routes:
        """The routes; raises InputError where the trace is a summary."""
        if self.routes is None:
            raise summary_only(self.recording)
        return self.routes

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the understanding tower's layers."""
        return self.recording.trace.layers

    @property
    def times(self) -> list[float]:
        """The time t of each step: 1 is pure noise, 0 the picture."""
        return [self.recording.trace.times[step] for step in self.steps]

    @property
    def words(self) -> tuple[Word, ...]:
        """The words of the branch's prompt, its pictures, and its special tokens; see `split_words`."""
        return split_words(self.branch.prompt, self.branch.tokens)

    @property
    def steered(self) -> tuple[Steered, ...]:
        """The effect of each rule, as in the branch, with the number of its decisions in this section."""
        steered = self.branch.steered or ()
        return steered if self.whole else tuple(self._within(effect) for effect in steered)

    @property
    def changed(self) -> int | None:
        """The number of decisions that rules changed, as in the branch; None for a part, of which it is not known."""
        return self.branch.changed if self.whole else None

    def _within(self, effect: Steered) -> Steered:
        rule, steps, blocks = parse_rule(effect.rule), set(self.steps), set(self.blocks)
        if isinstance(rule, Rule):
            steps &= steps if rule.steps is None else set(rule.steps)
            blocks &= blocks if rule.blocks is None else set(rule.blocks)
        return effect.model_copy(update={"decisions": len(effect.tokens) * len(steps) * len(blocks)})

    def weight(self, word: Word) -> str | None:
        """The weight of a word in the prompt, as text; None where it is 1."""
        return weight_text(word.tokens, self.weights)

    @property
    def weights(self) -> list[float]:
        """The weight of each token in the prompt."""
        return token_weights(branch_weights(self.recording.trace.recipe, self.name), self.branch.tokens)


def cut(recording: Recording, name: str, steps: str | None = None, blocks: str | None = None) -> Section:
    """The section of branch `name` in the given ranges, see `parse_range`; None stands for all of them.

    Raises:
        UsageError: there is no such branch, a range is wrong, or the branch was not computed at any of the steps.
        InputError: a range is given, and the trace holds a summary only.
    """
    trace = recording.trace
    if name not in trace.branches:
        raise UsageError(f"the trace has no {name!r} branch: it has {', '.join(trace.branches)}")
    step_range = parse_range("--step", steps, len(trace.times))
    block_range = parse_range("--block", blocks, trace.blocks)
    summaries = {other: branch.summary for other, branch in trace.branches.items()}
    whole = steps is None and blocks is None
    routes, acted = recording.routes, trace.branches[name].steps
    if not whole:
        if routes is None:
            raise summary_only(recording)
        acted = tuple(step for step in acted if step in step_range)
        if not acted:
            there = trace.branches[name].steps
            raise UsageError(f"the {name} branch was not computed at step {steps}: it has {there[0]} to {there[-1]}")
        routes = {
            other: _cut(held, trace.branches[other].steps, step_range, block_range) for other, held in routes.items()
        }
        summaries = {
            other: BranchSummary(**summarise(held.ids_SJTK, held.weights_SJTK, len(trace.layers)))
            for other, held in routes.items()
            if len(held.ids_SJTK)
        }
    use_JM = summaries[name].layer_use_JM
    return Section(
        recording=recording,
        name=name,
        steps=acted,
        blocks=block_range,
        summary=summaries[name],
        routes=None if routes is None else routes[name],
        changes=None
        if routes is None
        else step_changes(routes[name].ids_SJTK, routes[name].weights_SJTK, routes[name].slots_SJTK),
        agreement={other: agreement(use_JM, held.layer_use_JM) for other, held in summaries.items() if other != name},
        whole=whole,
    )


def cut_all(recording: Recording, name: str, steps: str | None = None, blocks: str | None = None) -> list[Section]:
    """The section of branch `name` first, then those of the other branches that were computed in these ranges."""
    first = cut(recording, name, steps, blocks)
    return [first, *(cut(recording, other, steps, blocks) for other in first.agreement)]


def parse_range(option: str, text: str | None, count: int) -> range:
    """The numbers that A:B, A, A: or :B stands for, both ends included; None stands for all `count` of them.

    Raises:
        UsageError: it is no such range, or goes beyond the numbers there are.
    """
    if text is None:
        return range(count)
    match = re.fullmatch(r"\s*(\d*)\s*(:?)\s*(\d*)\s*", text)
    if match is None or not (match[1] or match[3]) or (match[3] and not match[2]):
        raise UsageError(f"{option} {text!r} is no range: write A:B (both included), A, A: or :B")
    first = int(match[1] or 0)
    last = int(match[3]) if match[3] else count - 1 if match[2] else first
    if match[3] and last < first:
        raise UsageError(f"{option} {text} ends before it begins")
    if not first <= last < count:
        raise UsageError(f"{option} {text} is out of range: there are {option.strip('-')}s 0 to {count - 1}")
    return range(first, last + 1)


def layer_use(routes: Routes, tokens: Sequence[int], layers: int) -> np.ndarray:
    """The share of each layer in the weights of `tokens`, over all steps and blocks, [M]; sums to 1."""
    ids_SJTK, weights_SJTK = routes.ids_SJTK[:, :, list(tokens)], routes.weights_SJTK[:, :, list(tokens)]
    use_M = np.bincount(ids_SJTK.ravel(), weights_SJTK.ravel().astype(np.float64), minlength=layers)
    return use_M / use_M.sum()


def slot_use(routes: Routes, slots: int, layers: int) -> np.ndarray:
    """The share of each layer in the weights of each slot, over all steps, blocks and tokens, [Z, M]; rows sum to 1.

    `routes` are those of a base model.
    """
    assert routes.slots_SJTK is not None
    places = routes.slots_SJTK.astype(np.intp) * layers + routes.ids_SJTK
    weights = routes.weights_SJTK.ravel().astype(np.float64)
    use_ZM = np.bincount(places.ravel(), weights, minlength=slots * layers).reshape(slots, layers)
    return use_ZM / use_ZM.sum(axis=1, keepdims=True)


def readers(section: Section, requested: Sequence[Word]) -> tuple[Word, ...]:
    """The groups of tokens to show layers of: the instruction and each picture of an edit, then requested words."""
    pictures = tuple(word for word in section.words if section.branch.tokens[word.tokens[0]].patch is not None)
    prompt = [word for word in section.words if not word.special and word not in pictures]
    instruction = Word("instruction", tuple(token for word in prompt for token in word.tokens))
    edit = (instruction, *pictures) if pictures and prompt else pictures
    return (*edit, *(word for word in requested if word not in edit))


def _cut(held: Routes, numbers: Sequence[int], steps: range, blocks: range) -> Routes:
    rows, span = [index for index, number in enumerate(numbers) if number in steps], slice(blocks.start, blocks.stop)
    return Routes(
        held.ids_SJTK[rows, span],
        held.weights_SJTK[rows, span],
        None if held.probabilities_SJTM is None else held.probabilities_SJTM[rows, span],
        None if held.regions_JTN is None else held.regions_JTN[span],
        None if held.slots_SJTK is None else held.slots_SJTK[rows, span],
    )


def summary_only(recording: Recording) -> InputError:
    """The error for a trace without the decisions."""
    return InputError(f"{recording.path} holds a summary only: draw with --trace topk to record every decision")
