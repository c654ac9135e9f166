"""The router: for every context token and generation block, which understanding layers to read.

Method: Mixture of States (arXiv 2511.12207), routing section.
Shapes: B batch, T context tokens, N patches, R router width, P values of a patch, M understanding layers,
J generation blocks, K kept layers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mos_cli.towers.layers import EPS, Attention, Rotary, SwiGLU, TimeEmbedding


@dataclass(frozen=True)
class Route:
    """One routing decision: layers kept (best first) and their mixing weights, both [B, T, J, K]."""

    ids_BTJK: Tensor
    weights_BTJK: Tensor


def choose_route(
    logits_BTMJ: Tensor,
    top_k: int,
    *,
    renormalise: bool,
    epsilon: float = 0.0,
) -> Route:
    """The one place where a route is chosen: column-wise softmax over the layers, then the top k of each column.

    With probability `epsilon` (training only) a token's column takes k random layers instead, weighted by the same
    probabilities. `renormalise` scales the kept weights of a column to sum to 1.
    """
    logits_BTJM = logits_BTMJ.float().transpose(2, 3)
    scores = logits_BTJM
    if epsilon > 0:
        explores = torch.rand(scores.shape[:3], device=scores.device) < epsilon
        scores = torch.where(explores[..., None], torch.rand_like(scores), scores)
    ids = scores.topk(top_k, dim=-1).indices
    if renormalise:
        # The softmax over the kept layers alone is their softmax over all, scaled to sum to 1, without a 0 / 0.
        return Route(ids, logits_BTJM.gather(-1, ids).softmax(dim=-1))
    return Route(ids, logits_BTJM.softmax(dim=-1).gather(-1, ids))


class RouterBlock(nn.Module):
    """Pre-norm bidirectional transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_attention = nn.RMSNorm(width, eps=EPS)
        self.attention = Attention(width, heads)
        self.norm_mlp = nn.RMSNorm(width, eps=EPS)
        self.mlp = SwiGLU(width, 3 * width)

    def forward(self, x_BLR: Tensor, positions: Rotary, mask_BL: Tensor | None) -> Tensor:
        x_BLR = x_BLR + self.attention(self.norm_attention(x_BLR), positions, mask_BL=mask_BL)
        return x_BLR + self.mlp(self.norm_mlp(x_BLR))


class Router(nn.Module):
    """Context tokens, noised patches and the timestep in one sequence; a linear head gives [M, J] logits per token."""

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        states_width: int,
        patch_values: int,
        layers: int,
        blocks: int,
    ) -> None:
        super().__init__()
        self.layers, self.head_width = layers, width // heads
        self.tokens_in = nn.Linear(states_width, width, bias=False)
        self.patches_in = nn.Linear(patch_values, width, bias=False)
        self.time_in = TimeEmbedding(width)
        self.norm_tokens = nn.RMSNorm(width, eps=EPS)
        self.norm_patches = nn.RMSNorm(width, eps=EPS)
        self.norm_time = nn.RMSNorm(width, eps=EPS)
        self.blocks = nn.ModuleList(RouterBlock(width, heads) for _ in range(depth))
        self.norm_out = nn.RMSNorm(width, eps=EPS)
        self.head = nn.Linear(width, layers * blocks, bias=False)

    def embed(self, embeddings_BTD: Tensor) -> Tensor:
        """The part of the router's input that depends on the prompt alone, [B, T, R]: computed once per prompt."""
        return self.norm_tokens(self.tokens_in(embeddings_BTD))

    def forward(
        self, tokens_BTR: Tensor, patches_BNP: Tensor, t_B: Tensor, positions: Rotary, mask_BL: Tensor | None
    ) -> Tensor:
        """Logits [B, T, M, J]. `positions` and `mask_BL` cover time, tokens and patches, in this order."""
        time_B1R = self.norm_time(self.time_in(t_B))[:, None]
        patches = self.norm_patches(self.patches_in(patches_BNP))
        x_BLR = torch.cat([time_B1R, tokens_BTR, patches], dim=1)
        for block in self.blocks:
            x_BLR = block(x_BLR, positions, mask_BL)
        tokens_out = x_BLR[:, 1 : 1 + tokens_BTR.shape[1]]
        return self.head(self.norm_out(tokens_out)).unflatten(-1, (self.layers, -1))
