"""Comparing routes: what counts as agreement, near-tie and real change, and how runs are aligned."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mos_cli.config.recipe import RouteSource
from mos_cli.errors import InputError
from mos_cli.routing.diff import compare
from mos_cli.routing.trace import Routes, Steered, Trace, TraceToken, make_branch
from tests.helpers.traces import BLOCKS, STEPS, make_trace, tokens_of

Run = tuple[Trace, dict[str, Routes]]


def single(
    *decisions: tuple[dict[int, float], ...],
    prompt: str = "dog",
    layers: int = 5,
    probabilities: list[list[list[float]]] | None = None,
    times: tuple[float, ...] | None = None,
) -> Run:
    """A run of one branch and one block, without special tokens: per step, per token, the layers and their weights."""
    trace, _ = make_trace(prompt=prompt, layers=layers, blocks=1)
    ids = [[[list(weights) for weights in step]] for step in decisions]
    weights = [[[list(weights.values()) for weights in step]] for step in decisions]
    routes = Routes(
        np.array(ids, np.uint8),
        np.array(weights, np.float16),
        None if probabilities is None else np.array(probabilities, np.float16)[:, None],
    )
    tokens = tokens_of(prompt)[1:-1]
    branch = make_branch(prompt, tokens, range(len(decisions)), routes, layers)
    update = {"branches": {"positive": branch}, "times": times or trace.times[: len(decisions)]}
    return trace.model_copy(update=update), {"positive": routes}


def counts(a: Run, b: Run) -> tuple[int, int, int]:
    tally = compare(*a, *b).tally
    return tally.agree, tally.near_ties, tally.changes


def test_a_run_is_identical_to_itself():
    run = make_trace()
    difference = compare(*run, *run)
    assert difference.identical
    choices = sum(routes.ids_SJTK.size for routes in run[1].values())
    assert (difference.tally.agree, difference.tally.choices) == (choices, choices)
    assert (difference.tally.distance, difference.tally.first) == (0, None)


@given(st.integers(0, 2**31), st.floats(0, 0.5))
def test_shares_add_up_and_no_side_is_preferred(seed, amount):
    """Overlap and distance are symmetric; flips are counted once; every word's tally is a part of its branch's."""
    trace, routes = make_trace()
    rng = np.random.default_rng(seed)
    other = {}
    for name, branch in routes.items():
        flip = rng.random(branch.ids_SJTK.shape[:3]) < amount
        ids = np.where(flip[..., None], (branch.ids_SJTK + 1) % len(trace.layers), branch.ids_SJTK).astype(np.uint8)
        other[name] = Routes(ids, branch.weights_SJTK)
    there, back = compare(trace, routes, trace, other), compare(trace, other, trace, routes)
    assert replace(there.tally, distance=0) == replace(back.tally, distance=0)
    assert there.tally.distance == pytest.approx(back.tally.distance)
    slow = 0
    for name, branch in routes.items():
        rows = zip(branch.ids_SJTK.reshape(-1, 2).tolist(), other[name].ids_SJTK.reshape(-1, 2).tolist(), strict=True)
        slow += sum(len(set(a) & set(b)) for a, b in rows)
    assert there.tally.agree == slow
    for branch in there.branches.values():
        for field in ("choices", "near_ties", "changes"):
            assert getattr(branch.tally, field) == sum(getattr(word.tally, field) for word in branch.words)
        assert branch.tally.first == min(
            (w.tally.first for w in branch.words if w.tally.first is not None), default=None
        )


def test_the_distance_is_the_total_variation_of_the_weights():
    a = single(({0: 0.75, 1: 0.25},), ({2: 0.5, 3: 0.5},))
    b = single(({1: 0.5, 2: 0.5},), ({3: 0.75, 2: 0.25},))
    # Step 0: 0.75 of layer 0 is gone; step 1: a quarter moves from layer 2 to 3.
    assert compare(*a, *b).tally.distance == pytest.approx((0.75 + 0.25) / 2)
    assert compare(*a, *b).tally.first == 0


def test_the_order_of_the_same_layers_is_no_flip():
    assert counts(single(({0: 0.55, 1: 0.45},)), single(({1: 0.55, 0: 0.45},))) == (2, 0, 0)


def test_a_layer_of_weight_nought_is_not_read():
    """Rules that allow one layer alone leave a place empty."""
    pinned = single(({3: 1.0},))
    padded = (pinned[0], {"positive": Routes(np.array([[[[3, 3]]]], np.uint8), np.array([[[[1, 0]]]], np.float16))})
    assert counts(pinned, padded) == (1, 0, 0)
    assert counts(padded, single(({3: 0.6, 1: 0.4},))) == (1, 0, 1)


@pytest.mark.parametrize(
    ("weight_a", "weight_b", "near"), [(0.05, 0.08, 1), (0.05, 0.3, 0), (0.3, 0.05, 0), (0.45, 0.45, 0)]
)
def test_without_probabilities_only_flips_that_weigh_little_are_near_ties_for_certain(weight_a, weight_b, near):
    a, b = single(({0: 1 - weight_a, 1: weight_a},)), single(({0: 1 - weight_b, 2: weight_b},))
    assert counts(a, b) == (1, near, 1 - near)
    assert not compare(*a, *b).exact


def nearly_tied(layer: int, *, full: bool) -> Run:
    """A run of all steps but the first, in which "dog" reads one of two layers that are nearly equal everywhere."""
    trace, _ = make_trace(prompt="dog")

    def everywhere(values: list[float], kind: type) -> np.ndarray:
        return np.broadcast_to(np.array(values, kind), (STEPS - 1, BLOCKS, 1, len(values)))

    probabilities = everywhere([0.9, 0.05, 0.045, 0.005, 0], np.float16) if full else None
    routes = Routes(everywhere([0, layer], np.uint8), everywhere([0.95, 0.05], np.float16), probabilities)
    branch = make_branch("dog", tokens_of("dog")[1:-1], range(1, STEPS), routes, 5)
    return trace.model_copy(update={"branches": {"positive": branch}}), {"positive": routes}


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("rule", "ruled"),
    [
        ("dog!=1", BLOCKS * (STEPS - 1)),
        ("dog+=2@2", BLOCKS * (STEPS - 1)),
        ("last", BLOCKS * (STEPS - 1)),
        ("dog!=1 blocks 0", STEPS - 1),
        ("dog!=1 steps 0-2", BLOCKS * 2),
        ("dog!=1 blocks 1-2 steps 3", 2),
        ("dog!=1 blocks 1-2 steps 3 slots 0", 2),
    ],
)
def test_what_a_rule_chose_is_a_real_change_and_no_near_tie(full, rule, ruled):
    """Also where the router's own probabilities, before the rule, are nearly equal."""
    a, b = nearly_tied(1, full=full), nearly_tied(2, full=full)
    decisions = BLOCKS * (STEPS - 1)
    assert counts(a, b) == (decisions, decisions, 0)
    trace, routes = b
    done = (Steered(rule=rule, tokens=(0,), decisions=ruled),)
    branch = trace.branches["positive"].model_copy(update={"steered": done})
    steered = trace.model_copy(update={"branches": {"positive": branch}}), routes
    assert counts(a, steered) == counts(steered, a) == (decisions, decisions - ruled, ruled)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("until", "steps"), [(1.0, STEPS - 1), (0.5, 2)])
def test_routes_of_another_run_have_no_near_ties_at_the_steps_that_took_them(full, until, steps):
    a, (trace, routes) = nearly_tied(1, full=full), nearly_tied(2, full=full)
    recipe = trace.recipe.model_copy(update={"route_from": RouteSource(sha256="0" * 64, until=until)})
    _, near, changes = counts(a, (trace.model_copy(update={"recipe": recipe}), routes))
    assert (near, changes) == (BLOCKS * (STEPS - 1 - steps), BLOCKS * steps)


def slotted(ids: list[int], slots: list[int], weights: list[float]) -> Run:
    """A run with one decision of a model with slots."""
    trace, _ = single((dict.fromkeys(range(len(ids)), 1.0),))
    ids_SJTK, slots_SJTK = (np.array(values, np.uint8)[None, None, None] for values in (ids, slots))
    routes = Routes(ids_SJTK, np.array(weights, np.float16)[None, None, None], slots_SJTK=slots_SJTK)
    return trace, {"positive": routes}


def test_a_layer_in_another_slot_is_another_choice():
    a, b = slotted([3, 1], [0, 1], [0.5, 0.5]), slotted([3, 1], [1, 0], [0.5, 0.5])
    assert compare(*a, *a).identical
    difference = compare(*a, *b)
    assert not difference.identical
    assert counts(a, b) == (0, 0, 2)
    assert difference.tally.distance == 1


def test_the_same_layers_of_the_same_slots_agree_in_any_order():
    a, b = slotted([3, 1, 3], [0, 1, 0], [0.6, 0.4, 0]), slotted([1, 3, 1], [1, 0, 1], [0.6, 0.4, 0])
    assert counts(a, b) == (2, 0, 0)
    assert compare(*a, *b).tally.distance == pytest.approx(0.2, abs=1e-3)


@pytest.mark.parametrize(
    ("shares_a", "shares_b", "near"),
    [
        ([0.5, 0.25, 0.24, 0.01, 0], [0.5, 0.24, 0.25, 0.01, 0], 1),
        # Almost equal in one run, far apart in the other.
        ([0.5, 0.25, 0.24, 0.01, 0], [0.5, 0.05, 0.44, 0.01, 0], 0),
        ([0.5, 0.4, 0.09, 0.01, 0], [0.5, 0.24, 0.25, 0.01, 0], 0),
    ],
)
def test_probabilities_tell_near_ties_from_real_changes(shares_a, shares_b, near):
    a = single(({0: 0.66, 1: 0.34},), probabilities=[[shares_a]])
    b = single(({0: 0.66, 2: 0.34},), probabilities=[[shares_b]])
    assert counts(a, b) == (1, near, 1 - near)
    assert compare(*a, *b).exact


@given(st.integers(0, 2**31), st.floats(0.01, 1))
def test_near_ties_found_without_probabilities_are_near_ties(seed, noise):
    """The kept layers alone give a lower bound: whatever they call a near-tie is one when all is known."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(6, 4, 3, 5)) * 2

    def run(logits_SJTM: np.ndarray) -> Routes:
        shares = np.exp(logits_SJTM) / np.exp(logits_SJTM).sum(-1, keepdims=True)
        ids = (-shares).argsort(-1)[..., :2]
        weights = np.take_along_axis(shares, ids, -1)
        return Routes(ids.astype(np.uint8), weights.astype(np.float16), shares.astype(np.float16))

    whole = [run(logits), run(logits + noise * rng.normal(size=logits.shape))]
    trace, _ = make_trace(prompt="a red apple")
    branch = make_branch("a red apple", tokens_of("a red apple")[1:-1], range(STEPS), whole[0], 5)
    trace = trace.model_copy(update={"branches": {"positive": branch}})
    kept = [Routes(routes.ids_SJTK, routes.weights_SJTK) for routes in whole]
    known, bound = (compare(trace, {"positive": a}, trace, {"positive": b}).tally for a, b in (whole, kept))
    assert bound.near_ties <= known.near_ties
    assert bound.agree == known.agree


def test_words_are_aligned_by_text_and_occurrence():
    a = single(({0: 1.0}, {1: 1.0}, {2: 1.0}, {3: 1.0}), prompt="a dog a cat")
    b = single(({2: 1.0}, {0: 1.0}, {4: 1.0}), prompt="Cat A bird")
    branch = compare(*a, *b).branches["positive"]
    assert {(word.label, word.tally.agree) for word in branch.words} == {("a", 1), ("cat", 0)}
    assert (branch.only_a, branch.only_b) == (("dog", "a"), ("bird",))


def test_special_tokens_and_patches_are_aligned_too():
    seen = [TraceToken(text="picture 1", start=0, end=0, patch=(0, row, 0)) for row in range(3)]
    mark = TraceToken(text="[SEP]", start=0, end=0)
    word = TraceToken(text="dog", start=0, end=3)

    def run(tokens: list[TraceToken], layers: list[int]) -> Run:
        routes = Routes(np.array(layers, np.uint8)[None, None, :, None], np.ones((1, 1, len(layers), 1), np.float16))
        trace, _ = make_trace(prompt="dog", blocks=1)
        branch = make_branch("dog", tokens, [0], routes, 5)
        return trace.model_copy(update={"branches": {"positive": branch}}), {"positive": routes}

    a, b = run([word, mark, *seen], [0, 1, 2, 3, 4]), run([mark, word, *reversed(seen[1:])], [1, 0, 4, 2])
    words = {word.text: word.tally for word in compare(*a, *b).branches["positive"].words}
    assert {text: (tally.agree, tally.choices) for text, tally in words.items()} == {
        "dog": (1, 1),
        "[SEP]": (1, 1),
        "picture 1": (1, 2),
    }


def test_steps_are_aligned_by_their_times():
    fine = single(*[({step: 1.0},) for step in range(4)], times=(1.0, 0.75, 0.5, 0.25))
    coarse = single(({0: 1.0},), ({3: 1.0},), times=(1.0, 0.45))
    branch = compare(*fine, *coarse).branches["positive"]
    assert branch.steps == ((0, 0), (2, 1))
    assert branch.time_distance == pytest.approx(0.05)
    assert (branch.tally.agree, branch.tally.first) == (1, 2)


def test_branches_that_both_have_are_compared():
    trace, routes = make_trace()
    alone = trace.model_copy(update={"branches": {"positive": trace.branches["positive"]}})
    difference = compare(trace, routes, alone, {"positive": routes["positive"]})
    assert list(difference.branches) == ["positive"]
    assert not difference.identical


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"layers": 6}, "nano has 5 understanding layers, nano has 6"),
        ({"blocks": BLOCKS + 1}, "nano has 4 generation blocks, nano has 5"),
    ],
)
def test_models_of_other_shapes_are_refused(other, message):
    with pytest.raises(InputError, match=message):
        compare(*make_trace(), *make_trace(**other))


def test_prompts_without_a_word_in_common_are_refused():
    with pytest.raises(InputError, match="no word in common"):
        compare(*single(({0: 1.0},)), *single(({0: 1.0},), prompt="cat"))
