"""The fusion variants: each is held against a plain slow reference, and keeps what every tower promises."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mos_cli.bundles.bundle import find_bundle
from mos_cli.towers.attention import Attention, CrossAttention
from mos_cli.towers.blocks import GenerationBlock
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.layers import (
    Rotary,
    TokenGrid,
    TokenSequence,
    patchify,
    rotary,
    unpatchify,
)
from mos_cli.towers.router import fixed_route
from mos_cli.utils.migration import current_fields, current_weight
from tests.helpers.generation_towers import FIXED, ROUTED, B, J, M, S, T, inputs, name_of, slow_norm, small_tower


@pytest.fixture(params=FIXED + ROUTED, ids=name_of)
def tower(request) -> GenerationTower:
    return small_tower(**request.param)


def slow_attention(layer: Attention | CrossAttention, q: Tensor, k: Tensor, v: Tensor, at: Rotary) -> Tensor:
    """Head by head; queries are at the first positions, keys at the last."""
    q, k, v = (part.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for part in (q, k, v))
    q = at[: q.shape[2]].rotate(slow_norm(q) * layer.norm_q.weight)
    k = at[-k.shape[2] :].rotate(slow_norm(k) * layer.norm_k.weight)
    heads = []
    for h in range(layer.heads):
        scores = q[:, h] @ k[:, h].mT / q.shape[-1] ** 0.5
        heads.append(scores.softmax(-1) @ v[:, h])
    return layer.to_out(torch.cat(heads, -1))


def slow_block(
    block: GenerationBlock, x: Tensor, stream: Tensor | None, context: Tensor, reads: str, m: Tensor, at: Rotary
) -> tuple[Tensor, Tensor | None]:
    """One block for patches x and, where there is one, the stream of context tokens."""
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (m[:, i, None] + block.modulation_bias[i] for i in range(6))
    attention, tokens = block.attention, context.shape[1]
    if reads == "tokens":
        assert stream is not None
        stream = stream + context
    whole = x if stream is None else torch.cat([x, stream], 1)
    q, k, v = attention.to_qkv(slow_norm(whole) * (1 + scale_a) + shift_a).chunk(3, -1)
    if reads == "kv":
        context_k, context_v = block.context_kv(context).chunk(2, -1)
        k, v = torch.cat([k, context_k], 1), torch.cat([v, context_v], 1)
    grid = at[:-tokens]
    whole = whole + gate_a * slow_attention(attention, q, k, v, grid if reads == "cross" else at)
    if reads == "cross":
        k, v = block.cross.to_kv(context).chunk(2, -1)
        whole = whole + slow_attention(block.cross, block.cross.to_q(slow_norm(whole)), k, v, at)
    whole = whole + gate_m * block.mlp(slow_norm(whole) * (1 + scale_m) + shift_m)
    return (whole, None) if stream is None else (whole[:, :-tokens], whole[:, -tokens:])


def slow_tower(tower: Any, z: Tensor, t: Tensor, states: Tensor, weights_BTJM: Tensor) -> Tensor:
    """The clean latent, given how much of every layer each token reads in each block."""
    kind, tokens = tower.config["context"], states.shape[1]
    x = tower.patches_in(patchify(z, tower.patch))
    stream = torch.zeros(len(z), tokens, x.shape[-1]) if kind in ("tokens", "joint") else None
    time = torch.nn.functional.silu(tower.time_in(t))
    m = tower.modulation(time).unflatten(-1, (6, -1))
    places = (TokenGrid(z.shape[2] // tower.patch, z.shape[3] // tower.patch), TokenSequence(tokens))
    at = rotary(places, tower.head_width, 100.0, z.device)
    for j, block in enumerate(tower.blocks):
        reads = kind if kind != "joint" else "tokens" if j == 0 else "carried"
        context = torch.zeros(len(z), tokens, x.shape[-1])
        if reads != "carried":
            mixed = (weights_BTJM[:, :, j, :, None] * slow_norm(states)).sum(2)
            kept = weights_BTJM[:, :, j].sum(-1, keepdim=True)
            context = slow_norm(tower.states_in(mixed)) * block.norm_context.weight * kept
        x, stream = slow_block(block, x, stream, context, reads, m, at)
    shift, scale = tower.modulation_out(time)[:, None].chunk(2, -1)
    return unpatchify(tower.patches_out(slow_norm(x) * (1 + scale) + shift), tower.patch, (z.shape[2], z.shape[3]))


@torch.no_grad()
def test_every_variant_draws_what_a_slow_reference_draws(tower: GenerationTower) -> None:
    z, t, states = inputs()
    x_hat, route = tower(z, t, tower.project_states(states))
    assert route.ids_BTJK.shape == route.weights_BTJK.shape == (B, T, J, tower.kept_layers)
    weights_BTJM = torch.zeros(B, T, J, M).scatter_(-1, route.ids_BTJK, route.weights_BTJK)
    torch.testing.assert_close(x_hat, slow_tower(tower, z, t, states, weights_BTJM), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_every_variant_draws_the_same_whatever_else_is_in_the_batch(tower: GenerationTower) -> None:
    z, t, states = inputs()
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    batched, route = tower(z, t, tower.project_states(states, mask))
    alone, route_alone = tower(z[:1], t[:1], tower.project_states(states[:1, :3]))
    torch.testing.assert_close(batched[:1], alone, atol=1e-4, rtol=1e-4)
    assert torch.equal(route.ids_BTJK[:1, :3], route_alone.ids_BTJK)
    torch.testing.assert_close(route.weights_BTJK[:1, :3], route_alone.weights_BTJK, atol=1e-5, rtol=1e-5)


def test_every_parameter_of_every_variant_learns(tower: GenerationTower) -> None:
    z, t, states = inputs()
    tower(z, t, tower.project_states(states))[0].square().mean().backward()
    assert [name for name, p in tower.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("variant", FIXED + ROUTED, ids=name_of)
def test_every_block_of_a_fresh_variant_is_the_identity(variant: dict) -> None:
    fresh = GenerationTower(width=32, depth=J, heads=2, hidden=48, states_layers=M, states_width=S, **variant)
    z, t, states = inputs()
    calls = []
    for block in fresh.blocks:
        block.register_forward_hook(lambda _, given, result: calls.append((given[0][:, :12], result[:, :12])))
    fresh(z, t, fresh.project_states(states))
    assert len(calls) == J
    assert all(torch.equal(before, after) for before, after in calls)


@torch.no_grad()
def test_every_variant_is_saved_with_its_choices_and_can_be_counted(tower: GenerationTower, tmp_path) -> None:
    tower.save_pretrained(tmp_path)
    loaded = GenerationTower.from_pretrained(tmp_path)
    z, t, states = inputs()
    assert torch.equal(tower(z, t, tower.project_states(states))[0], loaded(z, t, loaded.project_states(states))[0])
    config = {key: value for key, value in tower.config.items() if not key.startswith("_")}
    with torch.device("meta"):
        counted = [GenerationTower(**{**config, "hidden": hidden}).num_parameters() for hidden in (48, 49)]
    assert counted[0] == tower.num_parameters()
    assert counted[1] - counted[0] == 3 * 32 * J


@pytest.mark.parametrize(
    ("fusion", "layers", "blocks", "read"),
    [
        ("last", 7, 3, [[6], [6], [6]]),
        ("mean", 3, 2, [[0, 1, 2], [0, 1, 2]]),
        ("aligned", 7, 8, [[0], [1], [2], [3], [4], [4], [5], [6]]),
        ("aligned", 31, 4, [[0], [8], [16], [23]]),
        ("aligned", 2, 6, [[0], [0], [1], [1], [1], [1]]),
    ],
)
def test_a_fixed_fusion_reads_its_layers_alike(fusion: str, layers: int, blocks: int, read: list) -> None:
    route = fixed_route(fusion, layers, blocks, torch.device("cpu"))
    assert route.ids_BTJK.tolist() == [[read]]
    torch.testing.assert_close(route.weights_BTJK, torch.full((1, 1, blocks, len(read[0])), 1 / len(read[0])))


@pytest.mark.parametrize("variant", FIXED, ids=name_of)
def test_a_fixed_fusion_has_no_router_and_never_explores(variant: dict) -> None:
    tower = small_tower(**variant)
    assert [name for name, _ in tower.named_parameters() if name.startswith("router")] == []
    z, t, states = inputs()
    bank = tower.project_states(states)
    calm, exploring = tower(z, t, bank)[1], tower(z / 2, t / 2, bank, epsilon=0.9)[1]
    assert torch.equal(calm.ids_BTJK, exploring.ids_BTJK)


@torch.no_grad()
def test_sample_routing_follows_the_mean_of_the_logits_of_the_real_tokens() -> None:
    one, each = small_tower(routing="sample"), small_tower()
    one.load_state_dict(each.state_dict())
    z, t, states = inputs()
    mask = torch.tensor([[True, True, True, False, False], [True, False, False, False, False]])
    seen = each.project_states(states).router_BTR, patchify(z, 8), t, (), TokenGrid(4, 3), mask
    assert one.router is not None
    assert each.router is not None
    logits, every = one.router(*seen), each.router(*seen)
    assert logits.shape == (B, 1, M, J)
    torch.testing.assert_close(logits[0, 0], every[0, :3].mean(0))
    torch.testing.assert_close(logits[1, 0], every[1, 0])


@torch.no_grad()
@pytest.mark.parametrize("epsilon", [0.0, 1.0])
def test_sample_routing_gives_every_token_of_a_prompt_one_route(epsilon: float) -> None:
    tower = small_tower(routing="sample", depth=20)
    z, t, states = inputs()
    for mask in (None, torch.tensor([[True] * 3 + [False] * 2, [True] * 5])):
        _, route = tower(z, t, tower.project_states(states, mask), epsilon=epsilon)
        assert torch.equal(route.ids_BTJK, route.ids_BTJK[:, :1].expand_as(route.ids_BTJK))
        assert torch.equal(route.weights_BTJK, route.weights_BTJK[:, :1].expand_as(route.weights_BTJK))
        assert not torch.equal(route.ids_BTJK[0], route.ids_BTJK[1])


@torch.no_grad()
@pytest.mark.parametrize("seen", [("tokens", "latent", "time"), ("tokens", "latent"), ("time", "tokens"), ("tokens",)])
def test_a_route_depends_on_what_the_router_sees_and_on_nothing_else(seen: tuple[str, ...]) -> None:
    tower = small_tower(router_inputs=seen)
    z, t, states = inputs()
    bank = tower.project_states(states)
    base = tower(z, t, bank)[1].weights_BTJK
    assert torch.equal(base, tower(z + 1, t, bank)[1].weights_BTJK) == ("latent" not in seen)
    assert torch.equal(base, tower(z, t / 2, bank)[1].weights_BTJK) == ("time" not in seen)
    assert not torch.equal(base, tower(z, t, tower.project_states(states.flip(1)))[1].weights_BTJK)
    names = " ".join(name for name, _ in tower.named_parameters() if name.startswith("router"))
    assert ("router.patches_in" in names, "router.norm_patches" in names) == ("latent" in seen,) * 2
    assert ("router.time_in" in names, "router.norm_time" in names) == ("time" in seen,) * 2


@pytest.mark.parametrize(
    ("choices", "complaint"),
    [
        *(({"context": "joint", "fusion": f}, "goes with fusion 'last'") for f in ("routed", "aligned", "mean")),
        ({"fusion": "first"}, "fusion cannot be 'first': choose from routed, last, aligned, mean"),
        ({"context": "kw"}, "context cannot be 'kw'"),
        ({"routing": "word"}, "routing cannot be 'word'"),
        ({"router_inputs": ("tokens", "noise")}, "router_inputs cannot be 'noise'"),
        ({"router_inputs": ("latent", "time")}, "must name 'tokens'"),
        ({"top_k": 0}, "top_k cannot be 0"),
        ({"top_k": M + 1}, f"there are {M} layers"),
        ({"heads": 3}, "width cannot be [0-9]+: with 3 heads it must be a multiple of 48"),
        ({"router_heads": 3}, "router_width cannot be [0-9]+: with 3 heads it must be a multiple of 48"),
    ],
)
def test_choices_that_make_no_sense_are_refused_in_one_line(choices: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as refused:
        small_tower(**choices)
    assert "\n" not in str(refused.value)


def test_the_default_is_routed_and_has_the_parameters_of_the_shipped_weights() -> None:
    config = GenerationTower(states_width=S).config
    assert (config["fusion"], config["context"], config["routing"]) == ("routed", "kv", "token")
    assert set(config["router_inputs"]) == {"tokens", "latent", "time"}
    folder = find_bundle("emoji").folder / "generation"
    shipped: Any = current_fields(GenerationTower.load_config(folder))
    # Configs written before there were rivals have no such fields.
    rivals = {"fusion", "fusion_layers", "router_inputs", "routing"}
    shipped = {name: value for name, value in shipped.items() if name not in rivals}
    with torch.device("meta"):
        expected = {name: list(p.shape) for name, p in GenerationTower(**shipped).state_dict().items()}
    (weights,) = folder.glob("*.safetensors")
    assert {current_weight(name): list(tensor.shape) for name, tensor in load_file(weights).items()} == expected
