"""The network: what a route keeps, that the bank is exact, that nothing leaks between prompts of a batch."""

import pytest
import torch
import torch.nn.functional as F
from conftest import awake
from hypothesis import given
from hypothesis import strategies as st

from mos_cli.errors import InputError
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.layers import EPS, patchify, unpatchify
from mos_cli.towers.router import choose_route
from mos_cli.towers.understanding import UnderstandingTower

B, T, M, S, J, K = 2, 5, 4, 32, 3, 2


def small_tower(**changes) -> GenerationTower:
    sizes = {
        "width": 32,
        "depth": J,
        "heads": 2,
        "hidden": 48,
        "router_width": 32,
        "states_layers": M,
        "states_width": S,
    }
    return awake(GenerationTower(**{**sizes, **changes}))


def inputs(batch: int = B, tokens: int = T) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(batch, 3, 32, 24, generator=generator)
    t = torch.rand(batch, generator=generator)
    # Layers of very different scale, as real ones are.
    states = torch.randn(batch, tokens, M, S, generator=generator) * torch.tensor([0.01, 1.0, 30.0, 500.0])[:, None]
    return z, t, states


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
        torch.testing.assert_close(bank.mix(route, block), slow, atol=1e-5, rtol=1e-5)


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


@pytest.mark.parametrize(("kind", "layers"), [("encoder_folder", 4), ("decoder_folder", 5)])
def test_an_understanding_tower_hands_over_every_layer(kind: str, layers: int, request) -> None:
    tower = UnderstandingTower(request.getfixturevalue(kind))
    reading = tower.encode(["a red apple", "dogs"])
    assert reading.states_BTMS.shape[2:] == (layers, 32) == (tower.layers, tower.width)
    spans = [(t.start, t.end) for t in reading.tokens[0] if t.end]
    assert [reading_text("a red apple", span) for span in spans] == ["a", "red", "apple"]
    assert [t.text for t in reading.tokens[1] if t.end] == ["dog", "##s"]
    assert reading.mask_BT.sum(1).tolist() == [len(tokens) for tokens in reading.tokens]
    # Neither padding nor the other prompt shows in a prompt's states.
    alone = tower.encode(["dogs"]).states_BTMS[0]
    torch.testing.assert_close(reading.states_BTMS[1, : len(alone)], alone, atol=1e-5, rtol=1e-5)


def reading_text(prompt: str, span: tuple[int, int]) -> str:
    return prompt[slice(*span)]


def test_the_last_state_of_a_decoder_is_raw(decoder_folder) -> None:
    tower = UnderstandingTower(decoder_folder)
    states = tower.encode(["a red apple"]).states_BTMS[0]
    ids = tower.tokenizer("a red apple", return_tensors="pt")["input_ids"]
    normed = tower.model(ids).last_hidden_state[0]
    assert not torch.allclose(states[:, -1], normed, atol=1e-3)
    torch.testing.assert_close(tower.model.norm(states[:, -1]), normed)


def test_no_words_is_still_something_to_read(encoder_folder, decoder_folder) -> None:
    for folder in (encoder_folder, decoder_folder):
        reading = UnderstandingTower(folder).encode(["", "a dog"])
        assert len(reading.tokens[0]) >= 1
        assert all((t.start, t.end) == (0, 0) for t in reading.tokens[0])
        assert reading.states_BTMS.isfinite().all()


def test_a_prompt_too_long_is_refused(encoder_folder) -> None:
    with pytest.raises(InputError, match="the model reads 24"):
        UnderstandingTower(encoder_folder).encode(["apple " * 30])
