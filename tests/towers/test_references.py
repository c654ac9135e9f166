"""Pictures to draw from: remembered once, told apart from what is drawn, seen by the router as tokens like words."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mos_cli.bundles.shapes import IMAGE_GRID
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.layers import Rotary, TokenGrid, TokenSequence, patchify, rotary
from tests.helpers.generation_towers import WIDTHS, B, J, M, S, T, V, inputs, slow_norm, small_tower


def seeing(**choices: Any) -> GenerationTower:
    return small_tower(image_state_widths=WIDTHS, **choices)


def pictures(count: int = 1) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    z = inputs()[0]
    image_states = torch.randn(B, count * V, M, max(WIDTHS) + 3, generator=generator)
    return image_states, [torch.randn(z.shape, generator=generator) for _ in range(count)]


@pytest.fixture(params=["kv", "tokens", "cross"])
def tower(request) -> GenerationTower:
    return seeing(context=request.param)


@torch.no_grad()
def test_memories_are_the_references_own_pass_through_the_blocks_at_time_zero() -> None:
    tower = seeing(fusion="last", context="kv")
    z, t, states = inputs()
    image_states, references = pictures()
    bank = tower.add_image_tokens(tower.project_states(states), image_states, tower.cache_references(references))
    x_hat, _ = tower(z, t, bank)

    # The same by one long masked attention: the references' patches see themselves alone, the others see everything.
    rows, columns = z.shape[2] // tower.patch, z.shape[3] // tower.patch
    places = (
        TokenGrid(rows, columns, -1),
        TokenSequence(T),
        TokenGrid(IMAGE_GRID, IMAGE_GRID, -1, (rows / IMAGE_GRID, columns / IMAGE_GRID)),
    )
    at = rotary((*places, TokenGrid(rows, columns)), tower.head_width, 100.0, z.device)
    clean, noised = (tower.patches_in(patchify(part, tower.patch)) for part in (references[0], z))
    noised = noised + tower.reference_in(patchify(references[0], tower.patch))
    times = [torch.nn.functional.silu(tower.time_in(moment)) for moment in (torch.zeros(B), t)]
    last = torch.cat([tower.states_in(slow_norm(states)), _projected(tower, image_states)], dim=1)[:, :, -1]
    N, C = clean.shape[1], T + V
    for block in tower.blocks:
        h_c, m_c = _modulated(tower, block, clean, times[0])
        h_n, m_n = _modulated(tower, block, noised, times[1])
        q, k, v = block.attention.to_qkv(torch.cat([h_c, h_n], dim=1)).chunk(3, dim=-1)
        k_c, v_c = block.context_kv(slow_norm(last) * block.norm_context.weight).chunk(2, dim=-1)
        k = torch.cat([k[:, :N], k_c, k[:, N:]], dim=1)
        v = torch.cat([v[:, :N], v_c, v[:, N:]], dim=1)
        visible = torch.ones(2 * N, N + C + N, dtype=torch.bool)
        visible[:N, N:] = False
        queries = torch.cat([torch.arange(N), torch.arange(N) + N + C])
        attended = _masked(block.attention, q, k, v, at, queries, visible)
        clean, noised = clean + m_c[2] * attended[:, :N], noised + m_n[2] * attended[:, N:]
        clean = clean + m_c[5] * block.mlp(slow_norm(clean) * (1 + m_c[4]) + m_c[3])
        noised = noised + m_n[5] * block.mlp(slow_norm(noised) * (1 + m_n[4]) + m_n[3])
    shift, scale = tower.modulation_out(times[1])[:, None].chunk(2, -1)
    patches = tower.patches_out(slow_norm(noised) * (1 + scale) + shift)
    torch.testing.assert_close(patchify(x_hat, tower.patch), patches, atol=1e-4, rtol=1e-4)


def _projected(tower: Any, image_states: Tensor) -> Tensor:
    states = [into(slow_norm(image_states[:, :, m, : WIDTHS[m]])) for m, into in enumerate(tower.image_states_in)]
    return torch.stack(states, dim=2)


def _modulated(tower: Any, block: Any, x: Tensor, time: Tensor) -> tuple[Tensor, list[Tensor]]:
    parts = tower.modulation(time).unflatten(-1, (6, -1)) + block.modulation_bias
    m = [parts[:, i, None] for i in range(6)]
    return slow_norm(x) * (1 + m[1]) + m[0], m


def _masked(layer: Any, q: Tensor, k: Tensor, v: Tensor, at: Rotary, queries: Tensor, visible: Tensor) -> Tensor:
    q, k, v = (part.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for part in (q, k, v))
    q = at[queries].rotate(slow_norm(q) * layer.norm_q.weight)
    k = at.rotate(slow_norm(k) * layer.norm_k.weight)
    scores = torch.einsum("bhqe,bhke->bhqk", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return layer.to_out(torch.einsum("bhqk,bhke->bqhe", weights, v).flatten(-2))


@torch.no_grad()
def test_image_tokens_are_routed_like_words(tower: GenerationTower) -> None:
    z, t, states = inputs()
    image_states, references = pictures(2)
    bank = tower.add_image_tokens(tower.project_states(states), image_states, tower.cache_references(references))
    _, route = tower(z, t, bank)
    assert route.ids_BTJK.shape == (B, T + 2 * V, J, 2)
    assert len({tuple(ids) for ids in route.ids_BTJK[0, T:, 0].tolist()}) > 1


@torch.no_grad()
def test_what_is_remembered_depends_on_neither_words_nor_noise(tower: GenerationTower) -> None:
    _, _, states = inputs()
    image_states, references = pictures()
    one = tower.add_image_tokens(
        tower.project_states(states), image_states, tower.cache_references(references)
    ).references
    other = tower.add_image_tokens(
        tower.project_states(torch.randn(B, T, M, S)),
        torch.randn_like(image_states),
        tower.cache_references(references),
    ).references
    assert one is not None
    assert other is not None
    assert len(one.kv) == J
    assert all(torch.equal(mine, yours) for mine, yours in zip(one.kv, other.kv, strict=True))


@torch.no_grad()
def test_the_first_reference_is_not_the_second(tower: GenerationTower) -> None:
    z, t, states = inputs()
    image_states, (a, b) = pictures(2)
    there = tower(
        z, t, tower.add_image_tokens(tower.project_states(states), image_states, tower.cache_references([a, b]))
    )[0]
    back = tower(
        z, t, tower.add_image_tokens(tower.project_states(states), image_states, tower.cache_references([b, a]))
    )[0]
    assert (there - back).abs().max() > 1e-4


@torch.no_grad()
def test_a_picture_does_not_depend_on_the_others_of_its_batch(tower: GenerationTower) -> None:
    z, t, states = inputs()
    image_states, references = pictures()
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    batched, route = tower(
        z,
        t,
        tower.add_image_tokens(tower.project_states(states, mask), image_states, tower.cache_references(references)),
    )
    alone, route_alone = tower(
        z[:1],
        t[:1],
        tower.add_image_tokens(
            tower.project_states(states[:1, :3]), image_states[:1], tower.cache_references([references[0][:1]])
        ),
    )
    torch.testing.assert_close(batched[:1], alone, atol=1e-4, rtol=1e-4)
    real = [0, 1, 2, *range(T, T + V)]
    assert torch.equal(route.ids_BTJK[:1, real], route_alone.ids_BTJK)


def test_everything_that_sees_learns() -> None:
    tower = seeing()
    z, t, states = inputs()
    image_states, references = pictures()
    tower(z, t, tower.add_image_tokens(tower.project_states(states), image_states, tower.cache_references(references)))[
        0
    ].square().mean().backward()
    assert [name for name, p in tower.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_image_states_have_a_width_for_every_layer() -> None:
    with pytest.raises(ValueError, match="image_state_widths"):
        small_tower(image_state_widths=(4, 4))
