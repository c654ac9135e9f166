"""Building blocks shared by the router and the generation tower.

Shapes: B batch, L sequence, T context tokens, N patches, D width, H heads, E width of a head.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.embeddings import (
    TimestepEmbedding,
    Timesteps,
    apply_rotary_emb,
    get_1d_rotary_pos_embed,
)
from torch import Tensor, nn

EPS = 1e-6
ATTENTION = AttentionBackendName.NATIVE
"""PyTorch's own scaled dot product attention."""


@dataclass(frozen=True)
class Rotary:
    """Cosines and sines of the rotary position embedding, each [L, E]."""

    cos_LE: Tensor
    sin_LE: Tensor

    def __getitem__(self, rows: slice) -> "Rotary":
        return Rotary(self.cos_LE[rows], self.sin_LE[rows])

    def __add__(self, after: "Rotary") -> "Rotary":
        return Rotary(torch.cat([self.cos_LE, after.cos_LE]), torch.cat([self.sin_LE, after.sin_LE]))

    def rotate(self, x_BLHE: Tensor) -> Tensor:
        return apply_rotary_emb(x_BLHE, (self.cos_LE, self.sin_LE), sequence_dim=1)  # type: ignore[arg-type, return-value]


def word_positions(tokens: int) -> Tensor:
    """(order, row, column) of `tokens` tokens of a text, [T, 3]: one after the other from order 1, in the middle."""
    return F.pad(torch.arange(1.0, tokens + 1)[:, None], (0, 2))


def grid_positions(rows: int, columns: int, *, order: int = 0, spacing: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """(order, row, column) of the cells of a grid, [rows * columns, 3].

    The picture being drawn stands at order 0, pictures it is drawn from at -1, -2, ... A grid is centred, so that one
    of another size grows outwards from the middle; `spacing` is the size of a cell, in patches.
    """
    row, column = torch.meshgrid(
        (torch.arange(rows) - (rows - 1) / 2) * spacing[0],
        (torch.arange(columns) - (columns - 1) / 2) * spacing[1],
        indexing="ij",
    )
    return torch.stack([torch.full_like(row, order), row, column], dim=-1).flatten(0, 1)


def rotary(positions_L3: Tensor, head_width: int, theta: float, device: torch.device) -> Rotary:
    """The embedding of (order, row, column): order takes a quarter of a head, row and column share the rest."""
    order_width = head_width // 4
    grid_width = (head_width - order_width) // 2
    axes = zip((order_width, grid_width, grid_width), positions_L3.unbind(1), strict=True)
    tables = [get_1d_rotary_pos_embed(width, position, theta, use_real=True) for width, position in axes]  # type: ignore[arg-type]
    cos, sin = (torch.cat(parts, dim=-1).to(device) for parts in zip(*tables, strict=True))
    return Rotary(cos, sin)


class TimeEmbedding(nn.Module):
    """Sinusoidal embedding of t in [0, 1] (1 = noise), then two linear layers: [B] -> [B, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sinusoid = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.mlp = TimestepEmbedding(256, width)

    def forward(self, t_B: Tensor) -> Tensor:
        # The sinusoid's frequencies are made for 1,000 steps.
        return self.mlp(self.sinusoid(t_B * 1000).to(self.mlp.linear_1.weight.dtype))


class Attention(nn.Module):
    """Self-attention with QK-norm and rotary positions; keys and values of a context may stand in front.

    Attention is unmasked unless a batch holds padded contexts (training), where mask_BL tells the keys to attend to.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        assert width % heads == 0
        assert (width // heads) % 16 == 0, "three rotary axes need heads of a multiple of 16"
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.norm_q = nn.RMSNorm(width // heads, eps=EPS)
        self.norm_k = nn.RMSNorm(width // heads, eps=EPS)

    def forward(
        self,
        x_BLD: Tensor,
        positions: Rotary,
        context_kv: Tensor | None = None,
        mask_BL: Tensor | None = None,
    ) -> Tensor:
        """Attends from x to [context; x]. `positions` and mask cover the keys; context_kv is [B, T, 2 D]."""
        return self.to_out(_attend(*self._qkv(x_BLD, positions, context_kv), mask_BL))

    def shares(self, x_BLD: Tensor, positions: Rotary, context_kv: Tensor | None = None) -> Tensor:
        """How much each query of `forward` attends to each key, [B, L, keys], mean over heads."""
        return _shares(*self._qkv(x_BLD, positions, context_kv)[:2])

    def _qkv(self, x_BLD: Tensor, positions: Rotary, context_kv: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = _heads(self.to_qkv(x_BLD), 3, self.heads)
        if context_kv is not None:
            context_k, context_v = _heads(context_kv, 2, self.heads)
            k, v = torch.cat([context_k, k], dim=1), torch.cat([context_v, v], dim=1)
        return positions[-q.shape[1] :].rotate(self.norm_q(q)), positions.rotate(self.norm_k(k)), v

    def keys_values(self, x_BLD: Tensor) -> Tensor:
        """What others attend to in x, as a `context_kv` [B, L, 2 D]."""
        return F.linear(x_BLD, self.to_qkv.weight[x_BLD.shape[-1] :])


class CrossAttention(nn.Module):
    """Attention from x to a context alone, with a softmax of its own; the rest as in `Attention`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(width, 2 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.norm_q = nn.RMSNorm(width // heads, eps=EPS)
        self.norm_k = nn.RMSNorm(width // heads, eps=EPS)

    def forward(self, x_BND: Tensor, context_BTD: Tensor, positions: Rotary, mask_BL: Tensor | None = None) -> Tensor:
        """Attends from x to the context. `positions` and mask cover [context; x]."""
        return self.to_out(_attend(*self._qkv(x_BND, context_BTD, positions), mask_BL))

    def shares(self, x_BND: Tensor, context_BTD: Tensor, positions: Rotary) -> Tensor:
        """How much each query of `forward` attends to each token, [B, N, T], mean over heads."""
        return _shares(*self._qkv(x_BND, context_BTD, positions)[:2])

    def _qkv(self, x_BND: Tensor, context_BTD: Tensor, positions: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        (q,) = _heads(self.to_q(x_BND), 1, self.heads)
        k, v = _heads(self.to_kv(context_BTD), 2, self.heads)
        q = positions[k.shape[1] :].rotate(self.norm_q(q))
        return q, positions[: k.shape[1]].rotate(self.norm_k(k)), v


def _heads(x: Tensor, parts: int, heads: int) -> list[Tensor]:
    """[B, L, parts * D] -> `parts` of [B, L, H, E]."""
    return [part.unflatten(-1, (heads, -1)) for part in x.chunk(parts, dim=-1)]


def _attend(q_BLHE: Tensor, k_BLHE: Tensor, v_BLHE: Tensor, mask_BL: Tensor | None) -> Tensor:
    """[B, L, D]. The mask's first entries are those of the keys."""
    mask = None if mask_BL is None else mask_BL[:, None, None, : k_BLHE.shape[1]]
    # Named, so that no setting of the environment puts another backend in its place unseen.
    return dispatch_attention_fn(q_BLHE, k_BLHE, v_BLHE, attn_mask=mask, backend=ATTENTION).flatten(-2)


def _shares(q_BLHE: Tensor, k_BLHE: Tensor) -> Tensor:
    """The softmax of the attention [B, queries, keys], mean over heads; one head at a time, for it is large."""
    scale, heads = q_BLHE.shape[-1] ** -0.5, q_BLHE.shape[2]
    shares = (
        (q @ k.mT * scale).float().softmax(dim=-1) for q, k in zip(q_BLHE.unbind(2), k_BLHE.unbind(2), strict=True)
    )
    return sum(shares, torch.zeros(())) / heads


class SwiGLU(nn.Module):
    """Gated feed-forward layer: down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        gate, up = self.gate_up(x_BLD).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def normed(x: Tensor) -> Tensor:
    """RMS norm over the last axis, without a weight."""
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


def extended(mask_BT: Tensor | None, *, before: int, after: int) -> Tensor | None:
    """The mask of the context tokens with room for tokens that are always attended to."""
    return None if mask_BT is None else F.pad(mask_BT, (before, after), value=True)


def patchify(z_BCHW: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] -> [B, N, C * patch * patch], rows first."""
    return F.unfold(z_BCHW, patch, stride=patch).transpose(1, 2)


def unpatchify(patches_BNP: Tensor, patch: int, size: tuple[int, int]) -> Tensor:
    """Inverse of `patchify`; `size` is (H, W)."""
    return F.fold(patches_BNP.transpose(1, 2), size, patch, stride=patch)
