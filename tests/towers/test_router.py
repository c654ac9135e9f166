"""Choosing routes: what is kept, with which weights, and what the choice depends on."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mos_cli.towers.router import choose_route
from tests.helpers.generation_towers import inputs, small_tower


@given(st.integers(1, 6), st.booleans(), st.integers(0, 2**31))
def test_every_column_keeps_exactly_k_layers(top_k: int, renormalise: bool, seed: int) -> None:
    logits = torch.randn(2, 3, 6, 4, generator=torch.Generator().manual_seed(seed))
    route = choose_route(logits, top_k, renormalise=renormalise)
    assert route.ids_BTJK.shape == route.weights_BTJK.shape == (2, 3, 4, top_k)
    kept = torch.zeros(2, 3, 4, 6).scatter_(-1, route.ids_BTJK, 1)
    assert (kept.sum(-1) == top_k).all()
    probabilities = logits.softmax(dim=2).transpose(2, 3)
    # The kept layers are the likeliest, and best first.
    left_out = probabilities.masked_fill(kept.bool(), -1).amax(-1)
    assert (probabilities.gather(-1, route.ids_BTJK).amin(-1) >= left_out).all()
    assert (route.weights_BTJK.diff(dim=-1) <= 1e-7).all()
    if renormalise:
        torch.testing.assert_close(route.weights_BTJK.sum(-1), torch.ones(2, 3, 4))
    else:
        torch.testing.assert_close(route.weights_BTJK, probabilities.gather(-1, route.ids_BTJK))


def test_exploration_happens_as_often_as_epsilon_says_and_never_at_zero() -> None:
    logits = torch.randn(50, 20, 8, 10)
    best = choose_route(logits, 2, renormalise=True).ids_BTJK
    explored = choose_route(logits, 2, renormalise=True, epsilon=0.3).ids_BTJK
    # A random pair is the best pair, in order, once in 8 * 7 times.
    share = (explored != best).any(-1).float().mean().item()
    assert share == pytest.approx(0.3 * (1 - 1 / 56), abs=0.02)
    assert torch.equal(choose_route(logits, 2, renormalise=True, epsilon=0.0).ids_BTJK, best)


def test_extreme_logits_give_weights_that_are_numbers() -> None:
    logits = torch.tensor([0.0, -300.0, -300.0, -300.0])[:, None].expand(1, 50, 4, 3)
    for renormalise in (True, False):
        route = choose_route(logits, 2, renormalise=renormalise, epsilon=1.0)
        assert route.weights_BTJK.isfinite().all()


@pytest.mark.parametrize("context", ["kv", "tokens"])
def test_what_renormalising_does_reaches_the_picture(context: str) -> None:
    z, t, states = inputs()
    pictures = []
    for renormalise in (True, False):
        tower = small_tower(context=context, renormalise=renormalise)
        with torch.no_grad():
            pictures.append(tower(z, t, tower.project_states(states))[0])
    assert (pictures[0] - pictures[1]).abs().mean() > 5e-4 * pictures[0].abs().mean()


def test_a_router_that_keeps_one_layer_can_learn() -> None:
    tower = small_tower(top_k=1, renormalise=False)
    z, t, states = inputs()
    tower(z, t, tower.project_states(states))[0].square().mean().backward()
    assert tower.router is not None
    assert tower.router.head.weight.grad is not None
    assert tower.router.head.weight.grad.abs().max() > 1e-4


def test_the_route_depends_on_prompt_picture_and_time() -> None:
    tower = small_tower()
    z, t, states = inputs(batch=1)

    def weights(z: torch.Tensor, t: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return tower(z, t, tower.project_states(states))[1].weights_BTJK

    base = weights(z, t, states)
    assert not torch.allclose(base, weights(z + 1, t, states), atol=1e-4)
    assert not torch.allclose(base, weights(z, t / 2, states), atol=1e-4)
    changed = states.clone()
    changed[:, 0] = -changed[:, 0]
    # The router's attention carries a changed token's meaning to the others.
    assert not torch.allclose(base[:, 1:], weights(z, t, changed)[:, 1:], atol=1e-4)
