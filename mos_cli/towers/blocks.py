"""One block of the generation tower, and the ways it can read its context.

Shapes: B batch, T context tokens, N patches, L = T + N, D width.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from mos_cli.towers.layers import EPS, Attention, CrossAttention, Rotary, SwiGLU, normed

Context = Literal["kv", "tokens", "joint", "cross"]
Reading = Literal["kv", "tokens", "carried", "cross"]


def reading(context: Context, block: int) -> Reading:
    """How one block reads: a joint context enters the sequence at the first and is carried through the others."""
    if context != "joint":
        return context
    return "tokens" if block == 0 else "carried"


class GenerationBlock(nn.Module):
    """Attention and SwiGLU, modulated by the shared timestep modulation plus a bias of the block's own.

    Args:
        width, heads, hidden: sizes; `hidden` is SwiGLU's inner width.
        reading: "kv" attends to the context's keys and values beside the patches' own; "tokens" adds it to the context
            stream of the sequence; "carried" reads none, the sequence holds it already; "cross" reads it in a sublayer
            of its own, which the timestep does not modulate.
    """

    def __init__(self, width: int, heads: int, hidden: int, reading: Reading) -> None:
        super().__init__()
        self.reading = reading
        self.modulation_bias = nn.Parameter(torch.zeros(6, width))
        self.attention = Attention(width, heads)
        self.mlp = SwiGLU(width, hidden)
        if reading != "carried":
            self.norm_context = nn.RMSNorm(width, eps=EPS)
        if reading == "kv":
            self.context_kv = nn.Linear(width, 2 * width, bias=False)
        if reading == "cross":
            self.cross = CrossAttention(width, heads)

    def start_as_identity(self) -> None:
        """Every sublayer's output is zero, the gates are open."""
        outputs = [self.attention.to_out, self.mlp.down]
        if self.reading == "cross":
            outputs.append(self.cross.to_out)
        for linear in outputs:
            nn.init.zeros_(linear.weight)
        self.modulation_bias.data[[2, 5]] = 1.0

    def forward(
        self,
        x_BLD: Tensor,
        context_BTD: Tensor,
        kept_BT1: Tensor,
        modulation_B6D: Tensor,
        positions: Rotary,
        mask_BL: Tensor | None,
    ) -> Tensor:
        """x is [context stream; patches] for "tokens" and "carried", else the patches alone.

        `positions` and mask cover [context; patches] in any case. `kept_BT1` is the sum of a token's kept weights.
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
            part[:, None] for part in (modulation_B6D + self.modulation_bias).unbind(1)
        )
        tokens = context_BTD.shape[1]
        if self.reading != "carried":
            # The norm makes all contexts equally long: the sum of a token's kept weights is put back after it.
            context_BTD = self.norm_context(context_BTD) * kept_BT1
        if self.reading == "tokens":
            x_BLD = torch.cat([x_BLD[:, :tokens] + context_BTD, x_BLD[:, tokens:]], dim=1)

        h = normed(x_BLD) * (1 + scale_a) + shift_a
        if self.reading == "kv":
            attended = self.attention(h, positions, self.context_kv(context_BTD), mask_BL)
        elif self.reading == "cross":
            # The patches see themselves alone, and none of them is padding.
            attended = self.attention(h, positions[tokens:])
        else:
            attended = self.attention(h, positions, mask_BL=mask_BL)
        x_BLD = x_BLD + gate_a * attended
        if self.reading == "cross":
            x_BLD = x_BLD + self.cross(normed(x_BLD), context_BTD, positions, mask_BL)

        h = normed(x_BLD) * (1 + scale_m) + shift_m
        return x_BLD + gate_m * self.mlp(h)
