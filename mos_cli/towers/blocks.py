"""One block of the generation tower, and the ways in which it can read its context.

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
    """The mode of one block: a joint context is added at the first block and stays in the sequence for the others."""
    if context != "joint":
        return context
    return "tokens" if block == 0 else "carried"


class GenerationBlock(nn.Module):
    """Attention and SwiGLU, modulated by the shared timestep modulation plus a bias of the block's own.

    Args:
        width, heads, hidden: sizes; `hidden` is SwiGLU's inner width.
        context_mode: "kv" puts the context's keys and values after the patches' own; "tokens" adds the context to the
            context stream of the sequence; "carried" adds none, the sequence holds it already; "cross" has a
            cross-attention sublayer for it, which the timestep does not modulate.
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
        """Sets the output projection of every sublayer to zero and the gates to one."""
        outputs = [self.attention.to_out, self.mlp.down]
        if self.context_mode == "cross":
            outputs.append(self.cross.to_out)
        for linear in outputs:
            nn.init.zeros_(linear.weight)
        self.modulation_bias.data[[2, 5]] = 1.0

    def cache_reference(self, x_BRD: Tensor, modulation_B6D: Tensor, positions: Rotary) -> tuple[Tensor, Tensor]:
        """Runs the block on a reference alone. Returns its patches, and their keys and values [B, R, 2 D].

        The result does not depend on the noised patches or the prompt, so it is computed once for all steps.
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self._modulation(modulation_B6D)
        h = torch.addcmul(shift_a, normed(x_BRD), scale_a)
        x_BRD = torch.addcmul(x_BRD, gate_a, self.attention(h, positions))
        m = self.mlp(torch.addcmul(shift_m, normed(x_BRD), scale_m))
        return torch.addcmul(x_BRD, gate_m, m), self.attention.keys_values(h)

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
        """x is [patches; context stream] for "tokens" and "carried", else the patches alone.

        `positions` and `padding` cover [patches; context; references] in every mode. `kept_BT1` is the sum of a token's
        kept weights, `reference_kv` this block's cached keys and values of the references.
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self._modulation(modulation_B6D)
        tokens = context_BTD.shape[1]
        if self.context_mode != "carried":
            # The norm removes the length of a context, so the sum of the kept weights is multiplied in after it.
            context_BTD = self.norm_context(context_BTD) * kept_BT1
        if self.context_mode == "tokens":
            x_BLD = torch.cat([x_BLD[:, :-tokens], x_BLD[:, -tokens:] + context_BTD], dim=1)

        h = torch.addcmul(shift_a, normed(x_BLD), scale_a)
        if self.context_mode == "kv":
            context_kv = self.context_kv(context_BTD)
            kv = context_kv if reference_kv is None else torch.cat([context_kv, reference_kv], dim=1)
            attended = self.attention(h, positions, kv, padding)
        elif self.context_mode == "cross":
            # The sequence has no context tokens here, and so no padding.
            patches = x_BLD.shape[1]
            pictures = positions[:patches] + positions[patches + tokens :]
            attended = self.attention(h, pictures, reference_kv)
        else:
            attended = self.attention(h, positions, reference_kv, padding)
        x_BLD = torch.addcmul(x_BLD, gate_a, attended)
        if self.context_mode == "cross":
            patches = x_BLD.shape[1]
            references = 0 if reference_kv is None else reference_kv.shape[1]
            of_context = extended(padding, before=-patches, after=-references)
            x_BLD = x_BLD + self.cross(normed(x_BLD), context_BTD, positions[: patches + tokens], of_context)

        h = torch.addcmul(shift_m, normed(x_BLD), scale_m)
        return torch.addcmul(x_BLD, gate_m, self.mlp(h))

    def _modulation(self, modulation_B6D: Tensor) -> list[Tensor]:
        """Shift, 1 + scale and gate of the attention, then of the feed-forward layer, each [B, 1, D]."""
        parts_B6D = modulation_B6D + self.modulation_bias
        parts_B6D[:, 1::3].add_(1)
        return list(parts_B6D.unsqueeze(2).unbind(1))
