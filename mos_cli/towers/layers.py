"""Building blocks shared by the router and the generation tower.

Shapes: B batch, L sequence, T context tokens, N patches, D width, H heads, E width of a head.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import (
    TimestepEmbedding,
    Timesteps,
    apply_rotary_emb,
    get_1d_rotary_pos_embed,
)
from torch import Tensor, nn

EPS = 1e-6


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
