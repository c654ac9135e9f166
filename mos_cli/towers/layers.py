"""Building blocks shared by the router and the generation tower.

Shapes: B batch, L sequence, T context tokens, N patches, D width, H heads, E width of a head, F = E / 2 pairs.
"""

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import (
    TimestepEmbedding,
    Timesteps,
    get_1d_rotary_pos_embed,
)
from torch import Tensor, nn

EPS = 1e-6


@dataclass(frozen=True)
class Rotary:
    """The rotary position embedding: cosine and sine of the angle that each pair of values is rotated by, [L, F, 2]."""

    turns_LF2: Tensor

    def __getitem__(self, rows: slice) -> "Rotary":
        return Rotary(self.turns_LF2[rows])

    def __add__(self, after: "Rotary") -> "Rotary":
        return Rotary(torch.cat([self.turns_LF2, after.turns_LF2]))

    def rotate(self, x_BHLE: Tensor) -> Tensor:
        """Rotates each pair of neighbouring values in fp32, as complex numbers: one operation instead of seven."""
        x_BHLF2 = x_BHLE.float().unflatten(-1, (-1, 2))
        if torch.compiler.is_compiling():
            # The compiler has no code for complex numbers, and fuses these.
            (real, imaginary), (cos, sin) = x_BHLF2.unbind(-1), self.turns_LF2.unbind(-1)
            turned = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], dim=-1)
        else:
            turned = torch.view_as_real(torch.view_as_complex(x_BHLF2) * torch.view_as_complex(self.turns_LF2))
        return turned.flatten(-2).to(x_BHLE.dtype)


@dataclass(frozen=True)
class TokenSequence:
    """Positions of the tokens of a text: orders 1, 2, ..., at row 0 and column 0, the centre of the canvas."""

    count: int

    def positions(self, device: torch.device | None = None) -> Tensor:
        """(order, row, column), [T, 3]."""
        return F.pad(torch.arange(1.0, self.count + 1, device=device)[:, None], (0, 2))


@dataclass(frozen=True)
class TokenGrid:
    """Positions of the tokens of a grid, row by row: patches or image tokens.

    The noised patches have order 0, reference pictures -1, -2, ... The centre of a grid is at row 0 and column 0,
    whatever its size; `spacing` is the distance of neighbours, in patches.
    """

    rows: int
    columns: int
    order: int = 0
    spacing: tuple[float, float] = (1.0, 1.0)

    @property
    def count(self) -> int:
        return self.rows * self.columns

    def positions(self, device: torch.device | None = None) -> Tensor:
        """(order, row, column), [rows * columns, 3]."""
        row, column = torch.meshgrid(
            (torch.arange(self.rows, device=device) - (self.rows - 1) / 2) * self.spacing[0],
            (torch.arange(self.columns, device=device) - (self.columns - 1) / 2) * self.spacing[1],
            indexing="ij",
        )
        return torch.stack([torch.full_like(row, self.order), row, column], dim=-1).flatten(0, 1)


TokenLayout = tuple[TokenSequence | TokenGrid, ...]
"""The positions of the tokens of a sequence, part by part."""


def total(layout: TokenLayout) -> int:
    """The number of tokens."""
    return sum(part.count for part in layout)


def rotary(layout: TokenLayout, head_width: int, theta: float, device: torch.device) -> Rotary:
    """The embedding of (order, row, column): a quarter of a head for the order, the rest for row and column.

    Cached, so that it is computed and copied to the device once for all steps of a picture.
    """
    if torch.compiler.is_compiling():
        # In training it is a part of the compiled step, in which a copy would make the host wait for the device.
        return _rotary(layout, head_width, theta, device)
    make = _kept_rotary.get() or _cached_rotary
    return make(layout, head_width, theta, device)


def _rotary(layout: TokenLayout, head_width: int, theta: float, device: torch.device) -> Rotary:
    order_width = head_width // 4
    grid_width = (head_width - order_width) // 2
    positions_L3 = torch.cat([part.positions(device) for part in layout])
    axes = zip((order_width, grid_width, grid_width), positions_L3.unbind(1), strict=True)
    tables = [get_1d_rotary_pos_embed(width, position, theta, use_real=True) for width, position in axes]  # type: ignore[arg-type]
    cos, sin = (torch.cat(parts, dim=-1) for parts in zip(*tables, strict=True))
    # Both values of a pair have the same angle.
    return Rotary(torch.stack([cos[:, ::2], sin[:, ::2]], dim=-1))


# A tensor made in inference mode could not be used in training.
@torch.inference_mode(False)
def _copied_rotary(layout: TokenLayout, head_width: int, theta: float, device: torch.device) -> Rotary:
    """Computed on the CPU, so that all devices have the same values."""
    return Rotary(_rotary(layout, head_width, theta, torch.device("cpu")).turns_LF2.to(device))


_cached_rotary = lru_cache(maxsize=8)(_copied_rotary)
_kept_rotary: ContextVar[Callable[..., Rotary] | None] = ContextVar("kept_rotary", default=None)


class RotaryTables:
    """Keeps the rotary embeddings that are used within its context, for as long as it is kept itself.

    A captured graph reads their memory, which the shared cache may free. The context may be entered again, but not
    within itself.
    """

    def __init__(self) -> None:
        self._make = cache(_copied_rotary)

    def __enter__(self) -> "RotaryTables":
        self._before = _kept_rotary.set(self._make)
        return self

    def __exit__(self, *_: object) -> None:
        _kept_rotary.reset(self._before)


class TimeEmbedding(nn.Module):
    """Sinusoidal embedding of t in [0, 1] (1 = noise), then two linear layers: [B] -> [B, D]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sinusoid = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.mlp = TimestepEmbedding(256, width)

    def forward(self, t_B: Tensor) -> Tensor:
        # The frequencies of the sinusoid are meant for 1,000 steps.
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


@dataclass(frozen=True)
class VariableLengths:
    """The padding of a batch whose rows differ in length.

    From token `first` on, row b has lengths[b] tokens and then padding, up to the longest row or to `bucket` tokens.
    With `mask_BL` (True = a real token) attention takes the mask; without, it computes each row alone.
    """

    lengths: tuple[int, ...]
    first: int = 0
    bucket: int = 0
    mask_BL: Tensor | None = field(default=None, compare=False)

    @property
    def longest(self) -> int:
        """The tokens of a row with its padding."""
        return max(*self.lengths, self.bucket)

    @property
    def equal(self) -> bool:
        """Whether there is no padding."""
        return set(self.lengths) == {self.longest}

    def row(self, x_BL: Tensor, number: int) -> Tensor:
        """A row of [B, L, ...] without its padding, [1, L', ...]."""
        return self.without(x_BL[number : number + 1], number, dim=1)

    def without(self, x_1L: Tensor, number: int, dim: int) -> Tensor:
        """This row, whose tokens are dimension `dim`, without its padding."""
        end, after = self.first + self.lengths[number], self.first + self.longest
        if end == after:
            return x_1L
        kept = x_1L.narrow(dim, 0, end)
        rest = x_1L.shape[dim] - after
        return kept if rest == 0 else torch.cat([kept, x_1L.narrow(dim, after, rest)], dim=dim)

    def join(self, rows: Sequence[Tensor], fill: float = 0) -> Tensor:
        """The inverse of `row`: rows [1, L', ...] as one [B, L, ...]."""
        padded = []
        for x_1L, length in zip(rows, self.lengths, strict=True):
            padding = x_1L.new_full((1, self.longest - length, *x_1L.shape[2:]), fill)
            end = self.first + length
            padded.append(torch.cat([x_1L[:, :end], padding, x_1L[:, end:]], dim=1))
        return torch.cat(padded)


Padding = Tensor | VariableLengths | None
"""The padding of a batch: none, a mask [B, L] (True = a real token), or the lengths of the rows."""


def mask_of(padding: Padding) -> Padding:
    """The padding as a mask where it has one, else as it is."""
    return padding.mask_BL if isinstance(padding, VariableLengths) and padding.mask_BL is not None else padding


def extended(padding: Padding, *, before: int, after: int) -> Padding:
    """The padding of a sequence with more tokens before and after, none of them padding; with fewer where negative."""
    if isinstance(padding, VariableLengths):
        mask_BL = extended(padding.mask_BL, before=before, after=after)
        return replace(padding, first=padding.first + before, mask_BL=mask_BL)
    return None if padding is None else F.pad(padding, (before, after), value=True)


def patchify(z_BCHW: Tensor, patch: int) -> Tensor:
    """[B, C, H, W] -> [B, N, C * patch * patch], rows first."""
    # Views and one copy: F.unfold starts a kernel for every picture of a batch on CUDA.
    z_BCRpSp = z_BCHW.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
    return z_BCRpSp.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(patches_BNP: Tensor, patch: int, size: tuple[int, int]) -> Tensor:
    """Inverse of `patchify`; `size` is (H, W)."""
    rows, columns = size[0] // patch, size[1] // patch
    z_BRSCpp = patches_BNP.unflatten(2, (-1, patch, patch)).unflatten(1, (rows, columns))
    return z_BRSCpp.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
