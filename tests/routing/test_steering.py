"""What rules do to routes: they hold in every decision, cost nothing when absent, and are replayed exactly."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mos_cli.errors import UsageError
from mos_cli.routing.rules import parse_rules
from mos_cli.routing.steering import Steerer
from mos_cli.routing.trace import Recording, Routes, Trace, TraceBranch, TraceToken
from mos_cli.routing.transfer import transfer_routes
from mos_cli.towers.router import Route, Steering, choose_route

PROMPT = "a red apple"
BLOCKS, LAYERS, STEPS = 3, 5, 4
WORDS = [(0, 0), (0, 1), (2, 5), (6, 11)]
TOKENS = tuple(TraceToken(text=PROMPT[a:b] or "[CLS]", start=a, end=b) for a, b in WORDS)
APPLE = 3


class Reading:
    prompt, tokens = PROMPT, TOKENS


def steer(*rules: str, step: int = 0) -> Steering | Route | None:
    return steerer(*rules)(step, "positive")


def steerer(*rules: str) -> Steerer:
    sizes = {"steps": STEPS, "blocks": BLOCKS, "layers": LAYERS}
    computed = {"positive": range(STEPS)}
    return Steerer(parse_rules(rules), {"positive": Reading()}, computed, **sizes, device=torch.device("cpu"))


def logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, len(TOKENS), LAYERS, BLOCKS, generator=torch.Generator().manual_seed(seed)) * 2


def choose(seed: int, steering, *, renormalise: bool = True) -> Route:
    return choose_route(logits(seed), 2, renormalise=renormalise, steering=steering)


LISTS = st.lists(st.integers(0, LAYERS - 1), min_size=1, max_size=LAYERS - 1, unique=True)


@given(st.integers(0, 999), LISTS, st.booleans())
def test_a_pin_holds_in_every_decision(seed: int, layers: list[int], renormalise: bool) -> None:
    route = choose(seed, steer(f"apple={','.join(map(str, layers))}"), renormalise=renormalise)
    assert set(route.ids_BTJK[0, APPLE].flatten().tolist()) <= set(layers)
    if renormalise:
        torch.testing.assert_close(route.weights_BTJK.sum(dim=-1), torch.ones(1, len(TOKENS), BLOCKS))
    assert (route.weights_BTJK[0, APPLE, :, 1] == 0).all() == (len(layers) == 1)
    others = [number for number in range(len(TOKENS)) if number != APPLE]
    free = choose(seed, None, renormalise=renormalise)
    assert torch.equal(route.ids_BTJK[:, others], free.ids_BTJK[:, others])
    assert torch.equal(route.weights_BTJK[:, others], free.weights_BTJK[:, others])


@given(st.integers(0, 999), LISTS, st.booleans())
def test_a_ban_holds_in_every_decision_and_spares_what_it_need_not_touch(seed, layers, renormalise) -> None:
    route = choose(seed, steer(f"apple!={','.join(map(str, layers))}"), renormalise=renormalise)
    free = choose(seed, None, renormalise=renormalise)
    assert not set(route.ids_BTJK[0, APPLE].flatten().tolist()) & set(layers)
    assert route.changed_BTJ is not None
    for block in range(BLOCKS):
        mine, own = (r.ids_BTJK[0, APPLE, block].tolist() for r in (route, free))
        assert bool(route.changed_BTJ[0, APPLE, block]) == bool(set(own) & set(layers))
        if not set(own) & set(layers):
            assert mine == own


@given(st.integers(0, 999), st.integers(0, LAYERS - 1))
def test_a_bias_grows_the_share_of_its_layer(seed: int, layer: int) -> None:
    def share(rule: str | None) -> float:
        route = choose_route(logits(seed), LAYERS, renormalise=True, steering=None if rule is None else steer(rule))
        return route.weights_BTJK[0, APPLE, 0][route.ids_BTJK[0, APPLE, 0] == layer].item()

    assert share(f"apple-=1@{layer}") < share(None) < share(f"apple+=1@{layer}")


def test_ranges_say_where_a_rule_holds() -> None:
    whole = steerer("apple=1 blocks 0,2 steps 1-2", "red!=3 steps 3")
    assert whole(0, "positive") is None
    assert whole(1, "positive") is whole(2, "positive")
    route, free = choose(1, whole(1, "positive")), choose(1, None)
    assert route.ids_BTJK[0, APPLE].tolist() == [[1, 1], free.ids_BTJK[0, APPLE, 1].tolist(), [1, 1]]
    first, second = whole.done("positive") or ()
    assert (first.tokens, first.decisions) == ((APPLE,), 4)
    assert (second.tokens, second.decisions) == ((2,), 3)


def test_a_rule_that_is_given_twice_holds_twice() -> None:
    twice = steerer("apple+=1@2", "apple+=1@2")
    first, second = twice.done("positive") or ()
    assert first == second
    assert first.decisions == BLOCKS * STEPS
    route, other = choose(1, twice(0, "positive")), choose(1, steer("apple+=2@2"))
    assert torch.equal(route.ids_BTJK, other.ids_BTJK)
    assert torch.equal(route.weights_BTJK, other.weights_BTJK)


def test_baselines_ask_no_router() -> None:
    for rule, layers in {"last": [4], "uniform": [0, 1, 2, 3, 4], "fixed:1-2": [1, 2]}.items():
        route = steer(rule)
        assert isinstance(route, Route)
        assert route.ids_BTJK.tolist() == [[[layers] * BLOCKS]]
        torch.testing.assert_close(route.weights_BTJK.sum(dim=-1), torch.ones(1, 1, BLOCKS))


def test_a_shuffle_exchanges_layers_block_by_block_and_keeps_the_weights() -> None:
    free, route = choose(2, None), choose(2, steer("shuffle:5"))
    torch.testing.assert_close(route.weights_BTJK, free.weights_BTJK)
    for block in range(BLOCKS):
        pairs = zip(
            free.ids_BTJK[:, :, block].flatten().tolist(), route.ids_BTJK[:, :, block].flatten().tolist(), strict=True
        )
        exchange = dict(pairs)
        assert len(set(exchange.values())) == len(exchange)
    assert not torch.equal(route.ids_BTJK, free.ids_BTJK)
    assert torch.equal(route.ids_BTJK, choose(2, steer("shuffle:5")).ids_BTJK)


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (["dog=1"], "its words are a, red, apple, \\[CLS\\]"),
        (["apple#2=1"], "finds nothing"),
        (["apple=5"], "layers that are not there: they are 0 to 4"),
        (["apple=1 blocks 3"], "blocks that are not there: they are 0 to 2"),
        (["apple=1 steps 2-4"], "steps that are not there: they are 0 to 3"),
        (["apple=1", "apple!=0-2 steps 3"], "leave 'apple' no layer to read"),
        (["fixed:7"], "layers that are not there"),
    ],
)
def test_rules_that_cannot_hold_are_refused_before_the_first_step(rules: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        steerer(*rules)


@pytest.mark.parametrize("steps", [25, 50, 100])
def test_a_share_of_the_steps_is_rounded_up_and_never_too_far(steps: int) -> None:
    branch = TraceBranch.model_construct(prompt=PROMPT, tokens=TOKENS, steps=(0,))
    ids = np.zeros((1, BLOCKS, len(TOKENS), 2), np.uint8)
    trace = Trace.model_construct(layers=("a", "b", "c"), top_k=2, times=(1.0,), branches={"positive": branch})
    recording = Recording(Path("x"), trace, {"positive": Routes(ids, ids)}, None, None)
    for percent in range(1, 101):
        given = transfer_routes(recording, {"positive": Reading()}, [1.0] * steps, percent / 100)
        assert len(given["positive"].steps) == -(-percent * steps // 100)
