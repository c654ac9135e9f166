"""What computes attention: every operator agrees with the plain formula, and none is asked for what it cannot do."""

import pytest
import torch

from mos_cli.errors import DeviceError
from mos_cli.towers.attention import SDPA, XFORMERS, Attention, CrossAttention, choose_attention
from mos_cli.towers.layers import Rotary, TokenGrid, rotary

TOKENS, WIDTH, HEADS, CONTEXT = 12, 64, 2, 5
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest difference, of values of about 1, between an operator and the formula in float64."""


def plain(layer: Attention, x_BLD: torch.Tensor, positions: Rotary, kv: torch.Tensor) -> torch.Tensor:
    """Attention as it is defined, head by head and query by query, in float64."""
    wide = Attention(WIDTH, HEADS).double()
    wide.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    q, k, v = wide._qkv(x_BLD.double(), Rotary(positions.turns_LF2.double()), kv.double())
    rows = []
    for row in range(q.shape[2]):
        heads = []
        for head in range(HEADS):
            scores = (k[0, head] * q[0, head, row]).sum(dim=-1) / (WIDTH // HEADS) ** 0.5
            heads.append((scores.exp() / scores.exp().sum()) @ v[0, head])
        rows.append(torch.cat(heads))
    return wide.to_out(torch.stack(rows)[None])


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def case(request):
    torch.manual_seed(0)
    layer = Attention(WIDTH, HEADS).to(request.param).eval().requires_grad_(False)
    x, kv = torch.randn(1, TOKENS, WIDTH), torch.randn(1, CONTEXT, 2 * WIDTH)
    positions = rotary((TokenGrid(1, CONTEXT + TOKENS),), WIDTH // HEADS, 100.0, torch.device("cpu"))
    return layer, x.to(request.param), positions, kv.to(request.param)


def test_sdpa_is_attention(case) -> None:
    layer, x, positions, kv = case
    expected = plain(layer, x, positions, kv)
    torch.testing.assert_close(layer(x, positions, kv).double(), expected, atol=TOLERANCE[x.dtype], rtol=0)


@pytest.mark.cuda
def test_xformers_is_attention(case) -> None:
    layer, x, positions, kv = case
    expected = plain(layer, x, positions, kv)
    layer, there = layer.cuda(), Rotary(positions.turns_LF2.cuda())
    assert choose_attention(layer, "xformers") == XFORMERS.value
    drawn = layer(x.cuda(), there, kv.cuda()).cpu()
    torch.testing.assert_close(drawn.double(), expected, atol=TOLERANCE[x.dtype], rtol=0)


def test_the_shares_are_those_that_mix_the_values(case) -> None:
    layer, x, positions, kv = case
    (shares,) = layer.attention_weights(x, positions, kv)
    assert shares.shape == (TOKENS, CONTEXT + TOKENS)
    torch.testing.assert_close(shares.sum(dim=-1), torch.ones(TOKENS))
    q, k, _ = layer._qkv(x, positions, kv)
    scores = torch.einsum("bhqe,bhke->bhqk", q.double(), k.double()) / (WIDTH // HEADS) ** 0.5
    torch.testing.assert_close(shares.double(), scores.softmax(dim=-1).mean(dim=1)[0], atol=1e-2, rtol=0)


def test_a_mask_never_reaches_xformers(case) -> None:
    layer, x, positions, kv = case
    mask = torch.ones(1, CONTEXT + TOKENS, dtype=torch.bool)
    mask[:, :2] = False
    expected = layer(x, positions, kv, mask)
    # On a CPU xformers fails, and so does diffusers without it: that it answers shows who was asked.
    layer.backend = XFORMERS
    assert torch.equal(layer(x, positions, kv, mask), expected)
    with pytest.raises((NotImplementedError, RuntimeError, ImportError, AttributeError)):
        layer(x, positions, kv)


def test_a_cpu_computes_with_sdpa_and_xformers_is_refused_there() -> None:
    layers = torch.nn.ModuleList([Attention(WIDTH, HEADS), CrossAttention(WIDTH, HEADS)])
    for asked in ("auto", "sdpa"):
        assert choose_attention(layers, asked) == SDPA.value
    with pytest.raises(DeviceError, match="--attention auto or sdpa"):
        choose_attention(layers, "xformers")


def test_what_was_asked_for_is_said_or_refused(mos, bundle, tmp_path) -> None:
    refused = mos("generate", "a dog", "-o", tmp_path / "a.png", "--attention", "xformers")
    assert refused.exit_code == 6
    assert "--attention auto or sdpa" in refused.stderr
    assert mos("generate", "a dog", "-o", tmp_path / "a.png", "--attention", "flash").exit_code == 2
    assert mos("generate", "a dog", "-o", tmp_path / "a.png", "--attention", "sdpa").exit_code == 0
