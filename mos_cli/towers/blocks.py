"""One block of the generation tower, and the ways it can read its context.

Shapes: B batch, R patches of the references, T context tokens, N patches, D width.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from mos_cli.towers.attention import Attention, CrossAttention
from mos_cli.towers.layers import EPS, Padding, Rotary, SwiGLU, extended, normed

Context = Literal["kv", "tokens", "joint", "cross"]
ContextMode = Literal["kv", "tokens", "carried", "cross"]


def context_mode(context: Context, block: int) -> ContextMode:
    """How one block reads: a joint context enters the sequence at the first and is carried through the others."""
    if context != "joint":
        return context
    return "tokens" if block == 0 else "carried"


class GenerationBlock(nn.Module):
    """Attention and SwiGLU, modulated by the shared timestep modulation plus a bias of the block's own.

    Args:
        width, heads, hidden: sizes; `hidden` is SwiGLU's inner width.
        context_mode: "kv" attends to the context's keys and values beside the patches' own; "tokens" adds it to the
            context stream of the sequence; "carried" reads none, the sequence holds it already; "cross" reads it in a
            sublayer of its own, which the timestep does not modulate.
    """

    def __init__(self, width: int, heads: int, hidden: int, context_mode: ContextMode) -> None:
        super().__init__()
        self.context_mode = context_mode
        self.modulation_bias = nn.Parameter(torch.zeros(6, width))
        self.attention = Attention(width, heads)
        self.mlp = SwiGLU(width, hidden)
        if context_mode != "carried":
            self.norm_context = nn.RMSNorm(width, eps=EPS)
        if context_mode == "kv":
            self.context_kv = nn.Linear(width, 2 * width, bias=False)
        if context_mode == "cross":
            self.cross = CrossAttention(width, heads)

    def start_as_identity(self) -> None:
        """Every sublayer's output is zero, the gates are open."""
        outputs = [self.attention.to_out, self.mlp.down]
        if self.context_mode == "cross":
            outputs.append(self.cross.to_out)
        for linear in outputs:
            nn.init.zeros_(linear.weight)
        self.modulation_bias.data[[2, 5]] = 1.0

    def cache_reference(self, x_BRD: Tensor, modulation_B6D: Tensor, positions: Rotary) -> tuple[Tensor, Tensor]:
        """A clean reference passes the block, seeing itself alone: its patches, and their keys and values [B, R, 2 D].

        Neither the noised patches nor the words take part, so that it is done once for all steps.
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self._modulation(modulation_B6D)
        h = normed(x_BRD) * (1 + scale_a) + shift_a
        x_BRD = x_BRD + gate_a * self.attention(h, positions)
        return x_BRD + gate_m * self.mlp(normed(x_BRD) * (1 + scale_m) + shift_m), self.attention.keys_values(h)

    def forward(
        self,
        x_BLD: Tensor,
        context_BTD: Tensor,
        kept_BT1: Tensor,
        reference_kv: Tensor | None,
        modulation_B6D: Tensor,
        positions: Rotary,
        padding: Padding,
    ) -> Tensor:
        """x is [context stream; patches] for "tokens" and "carried", else the patches alone.

        `positions` and padding cover [references; context; patches] in any case. `kept_BT1` is the sum of a token's
        kept weights, `reference_kv` what this block remembers of the references.
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self._modulation(modulation_B6D)
        tokens = context_BTD.shape[1]
        references = 0 if reference_kv is None else reference_kv.shape[1]
        if self.context_mode != "carried":
            # The norm makes all contexts equally long: the sum of a token's kept weights is put back after it.
            context_BTD = self.norm_context(context_BTD) * kept_BT1
        if self.context_mode == "tokens":
            x_BLD = torch.cat([x_BLD[:, :tokens] + context_BTD, x_BLD[:, tokens:]], dim=1)

        h = normed(x_BLD) * (1 + scale_a) + shift_a
        if self.context_mode == "kv":
            context_kv = self.context_kv(context_BTD)
            kv = context_kv if reference_kv is None else torch.cat([reference_kv, context_kv], dim=1)
            attended = self.attention(h, positions, kv, padding)
        elif self.context_mode == "cross":
            # No word takes part here, and nothing that does is padding.
            pictures = positions[:references] + positions[references + tokens :]
            attended = self.attention(h, pictures, reference_kv)
        else:
            attended = self.attention(h, positions, reference_kv, padding)
        x_BLD = x_BLD + gate_a * attended
        if self.context_mode == "cross":
            without = extended(padding, before=-references, after=0)
            x_BLD = x_BLD + self.cross(normed(x_BLD), context_BTD, positions[references:], without)

        h = normed(x_BLD) * (1 + scale_m) + shift_m
        return x_BLD + gate_m * self.mlp(h)

    def _modulation(self, modulation_B6D: Tensor) -> list[Tensor]:
        """Shift, scale and gate of the attention, then of the feed-forward layer, each [B, 1, D]."""
        return [part[:, None] for part in (modulation_B6D + self.modulation_bias).unbind(1)]
