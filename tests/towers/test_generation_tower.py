"""The generation tower: the bank is exact, every parameter learns, prompts of a batch do not affect each other."""

import pytest
import torch
import torch.nn.functional as F

from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.layers import EPS, patchify, unpatchify
from mos_cli.towers.router import choose_route
from tests.helpers.generation_towers import B, J, K, M, S, T, inputs, small_tower


def test_the_bank_equals_mixing_raw_states_and_then_projecting() -> None:
    tower = small_tower()
    _, _, states = inputs()
    bank = tower.project_states(states)
    route = choose_route(torch.randn(B, T, M, J), K, renormalise=True)
    for block in range(J):
        slow = torch.zeros(B, T, 32)
        for b in range(B):
            for token in range(T):
                mixed = torch.zeros(S)
                for kept in range(K):
                    state = states[b, token, route.ids_BTJK[b, token, block, kept]]
                    normalised = state / (state.square().mean() + EPS).sqrt()
                    mixed += route.weights_BTJK[b, token, block, kept] * normalised
                slow[b, token] = F.linear(mixed, tower.states_in.weight)
        torch.testing.assert_close(bank.mix(route)[:, :, block], slow, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("context", ["kv", "tokens"])
def test_a_prompt_draws_the_same_whatever_else_is_in_the_batch(context: str) -> None:
    tower = small_tower(context=context)
    z, t, states = inputs()
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    with torch.no_grad():
        batched, route = tower(z, t, tower.project_states(states, mask))
        alone, route_alone = tower(z[:1], t[:1], tower.project_states(states[:1, :3]))
    torch.testing.assert_close(batched[:1], alone, atol=1e-4, rtol=1e-4)
    assert torch.equal(route.ids_BTJK[:1, :3], route_alone.ids_BTJK)


@pytest.mark.parametrize("context", ["kv", "tokens"])
def test_every_parameter_learns(context: str) -> None:
    tower = small_tower(context=context)
    z, t, states = inputs()
    x_hat, _ = tower(z, t, tower.project_states(states))
    x_hat.square().mean().backward()
    still = [name for name, parameter in tower.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert still == []


def test_a_fresh_tower_is_grey_and_routes_evenly() -> None:
    tower = GenerationTower(width=32, depth=J, heads=2, hidden=48, router_width=32, states_layers=M, states_width=S)
    z, t, states = inputs()
    x_hat, route = tower(z, t, tower.project_states(states))
    assert x_hat.abs().max() == 0
    assert route.weights_BTJK.min() > 0.3


@pytest.mark.parametrize(
    ("sizes", "parameters"),
    [
        ({"width": 192, "depth": 8, "heads": 3, "hidden": 512, "router_width": 96}, 5e6),
        (
            {
                **{"width": 3072, "depth": 32, "heads": 24, "hidden": 8192, "channels": 16, "patch": 2},
                **{"states_layers": 33, "states_width": 4096, "router_width": 1024, "router_heads": 16},
            },
            5e9,
        ),
    ],
)
def test_one_class_builds_five_million_and_five_billion(sizes: dict, parameters: float) -> None:
    with torch.device("meta"):
        tower = GenerationTower(**sizes)
    assert sum(p.numel() for p in tower.parameters()) == pytest.approx(parameters, rel=0.15)


def test_patches_come_back() -> None:
    z = torch.randn(2, 3, 32, 48)
    assert patchify(z, 8).shape == (2, 24, 192)
    assert torch.equal(unpatchify(patchify(z, 8), 8, (32, 48)), z)


def test_a_saved_tower_is_the_same(tmp_path) -> None:
    tower = small_tower(context="tokens")
    tower.save_pretrained(tmp_path)
    loaded = GenerationTower.from_pretrained(tmp_path)
    z, t, states = inputs()
    with torch.no_grad():
        assert torch.equal(tower(z, t, tower.project_states(states))[0], loaded(z, t, loaded.project_states(states))[0])


def test_eyes_apart_and_a_tower_that_sees_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="image_state_widths are for"):
        GenerationTower(states_layers=2, image_state_widths=(8, 8), has_vision=True)
