"""The router: chooses which understanding layers each generation block reads for each context token.

Method: Mixture of States (arXiv 2511.12207), routing section.
Shapes: B batch, T context tokens, V of them image tokens, N patches, S width of a state, Z width of an image token's
last state, R router width, P values of a patch, M understanding layers, J generation blocks, K kept layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mos_cli.towers.attention import Attention
from mos_cli.towers.layers import (
    EPS,
    Padding,
    Rotary,
    SwiGLU,
    TimeEmbedding,
    TokenGrid,
    TokenLayout,
    TokenSequence,
    VariableLengths,
    extended,
    mask_of,
    rotary,
    total,
)


@dataclass(frozen=True)
class Route:
    """The routes of one step: kept layers (best first) and their mixing weights, both [B, T, J, K].

    With route rules, `changed_BTJ` marks the decisions that keep other layers than the router's own choice. Where a
    block reads several layers side by side, each in a slot of its own, `slots_BTJK` has the slot of each kept layer.
    """

    ids_BTJK: Tensor
    weights_BTJK: Tensor
    changed_BTJ: Tensor | None = None
    slots_BTJK: Tensor | None = None

    def shared_by(self, batch: int, tokens: int) -> "Route":
        """The route expanded to B rows and T tokens, where it has one for all of them."""
        if self.ids_BTJK.shape[:2] == (batch, tokens):
            return self
        shape = (batch, tokens, -1, -1)
        return Route(self.ids_BTJK.expand(shape), self.weights_BTJK.expand(shape))

    def row(self, padding: VariableLengths, number: int) -> "Route":
        """The route of one row, [1, T, J, K], without its padding."""
        changed = None if self.changed_BTJ is None else padding.row(self.changed_BTJ, number)
        return Route(padding.row(self.ids_BTJK, number), padding.row(self.weights_BTJK, number), changed)


@dataclass(frozen=True)
class Steering:
    """What route rules change in the router's choices of one step.

    Args:
        allowed_BTJM: the layers that may be kept, at least one for every token and block; weights stay the router's.
        bias_BTJM: added to the logits.
        order_JM: per block, the layer whose logit each layer takes.
        opened_BTJ: the decisions whose gate the rules open, in models with gates; J are blocks times slots there.
    """

    allowed_BTJM: Tensor
    bias_BTJM: Tensor | None = None
    order_JM: Tensor | None = None
    opened_BTJ: Tensor | None = None

    def logits(self, logits_BTJM: Tensor) -> Tensor:
        """The logits with order and bias applied."""
        if self.order_JM is not None:
            logits_BTJM = logits_BTJM.gather(-1, self.order_JM.expand_as(logits_BTJM))
        return logits_BTJM if self.bias_BTJM is None else logits_BTJM + self.bias_BTJM


def choose_route(
    logits_BTMJ: Tensor,
    top_k: int,
    *,
    renormalise: bool,
    epsilon: float = 0.0,
    steering: Steering | None = None,
) -> Route:
    """Chooses the route: a softmax over the layers for each token and block, then the top k of them.

    With probability `epsilon` (training only) a token reads k random layers in a block instead, weighted by the same
    probabilities. `renormalise` scales the kept weights to sum to 1. Where `steering` allows fewer than k layers, the
    best of them is repeated with a weight of 0.
    """
    logits_BTJM = own_BTJM = logits_BTMJ.float().transpose(2, 3)
    if steering is not None:
        own_BTJM = own_BTJM.expand(-1, steering.allowed_BTJM.shape[1], -1, -1)
        logits_BTJM = steering.logits(own_BTJM)
    scores = logits_BTJM
    if epsilon > 0:
        explores = torch.rand(scores.shape[:3], device=scores.device) < epsilon
        scores = torch.where(explores[..., None], torch.rand_like(scores), scores)
    if steering is not None:
        scores = scores.masked_fill(~steering.allowed_BTJM, float("-inf"))
    best, ids = scores.topk(top_k, dim=-1)
    if renormalise:
        # The softmax over the kept layers equals their renormalised softmax over all layers, without a 0 / 0.
        kept = logits_BTJM.gather(-1, ids)
        if steering is not None:
            kept = kept.masked_fill(best.isneginf(), float("-inf"))
        weights = kept.softmax(dim=-1)
    else:
        weights = logits_BTJM.softmax(dim=-1).gather(-1, ids)
    if steering is None:
        return Route(ids, weights)
    ids = torch.where(best.isneginf(), ids[..., :1], ids)
    own = own_BTJM.topk(top_k, dim=-1).indices
    changed = (ids.sort(dim=-1).values != own.sort(dim=-1).values).any(dim=-1)
    return Route(ids, weights.masked_fill(best.isneginf(), 0.0), changed)


def fixed_route(fusion: str, layers: int, blocks: int, device: torch.device) -> Route:
    """The route of a fusion that is not learned, [1, 1, J, K].

    "last": every block reads the last layer. "aligned": block j reads layer round(j * M / J). "mean": all of them.
    Computed on the device: a copy would make the host wait for it at every step.
    """
    if fusion == "mean":
        ids_JK = torch.arange(layers, device=device).expand(blocks, -1)
    elif fusion == "aligned":
        nearest_J = torch.arange(blocks, dtype=torch.float64, device=device).mul(layers).div(blocks).round()
        ids_JK = nearest_J.clamp(max=layers - 1).long()[:, None]
    else:
        ids_JK = torch.full((blocks, 1), layers - 1, device=device)
    ids = ids_JK[None, None]
    return Route(ids, torch.full(ids.shape, 1 / ids.shape[-1], device=device))


def uniform_route(layers_JK: Sequence[Sequence[int]], device: torch.device) -> Route:
    """The route [1, 1, J, K] in which every token reads these layers with equal weights."""
    ids = torch.tensor(layers_JK, device=device)[None, None]
    return Route(ids, torch.full(ids.shape, 1 / ids.shape[-1], device=device))


class RouterBlock(nn.Module):
    """Pre-norm bidirectional transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_attention = nn.RMSNorm(width, eps=EPS)
        self.attention = Attention(width, heads)
        self.norm_mlp = nn.RMSNorm(width, eps=EPS)
        self.mlp = SwiGLU(width, 3 * width)

    def forward(self, x_BLR: Tensor, positions: Rotary, padding: Padding) -> Tensor:
        x_BLR = x_BLR + self.attention(self.norm_attention(x_BLR), positions, padding=padding)
        return x_BLR + self.mlp(self.norm_mlp(x_BLR))


class Router(nn.Module):
    """A transformer over [noised patches; time; context tokens] with a linear head: [M, J] logits per context token.

    Args:
        inputs: parts of the sequence: "tokens", "latent", "time". A part that is left out has no parameters.
        per_sample: one decision per prompt, from the mean of the logits over its tokens, instead of one per token.
        width, depth, heads, rope_theta: sizes of the transformer.
        states_width, image_state_width, patch_values, layers, blocks: S, Z, P, M, J.
    """

    def __init__(
        self,
        *,
        inputs: Sequence[str],
        per_sample: bool,
        width: int,
        depth: int,
        heads: int,
        rope_theta: float,
        states_width: int,
        image_state_width: int,
        patch_values: int,
        layers: int,
        blocks: int,
    ) -> None:
        super().__init__()
        self.uses_latent, self.uses_time, self.per_sample = "latent" in inputs, "time" in inputs, per_sample
        self.layers, self.head_width, self.rope_theta = layers, width // heads, rope_theta
        self.tokens_in = nn.Linear(states_width, width, bias=False)
        self.image_states_in = nn.Linear(image_state_width, width, bias=False) if image_state_width else None
        self.patches_in = nn.Linear(patch_values, width, bias=False)
        self.time_in = TimeEmbedding(width)
        self.norm_tokens = nn.RMSNorm(width, eps=EPS)
        self.norm_patches = nn.RMSNorm(width, eps=EPS)
        self.norm_time = nn.RMSNorm(width, eps=EPS)
        self.blocks = nn.ModuleList(RouterBlock(width, heads) for _ in range(depth))
        self.norm_out = nn.RMSNorm(width, eps=EPS)
        self.head = nn.Linear(width, layers * blocks, bias=False)
        if not self.uses_latent:
            del self.patches_in, self.norm_patches
        if not self.uses_time:
            del self.time_in, self.norm_time

    def embed(self, embeddings_BTS: Tensor) -> Tensor:
        """The router's input for words, [B, T, R], from their states at layer 0; computed once per prompt."""
        return self.norm_tokens(self.tokens_in(embeddings_BTS))

    def embed_image_states(self, image_states_BVZ: Tensor) -> Tensor:
        """The router's input for image tokens, [B, V, R], from their last states."""
        assert self.image_states_in is not None
        return self.norm_tokens(self.image_states_in(image_states_BVZ))

    def forward(
        self,
        tokens_BTR: Tensor,
        patches_BNP: Tensor,
        t_B: Tensor,
        images: TokenLayout,
        grid: TokenGrid,
        padding: Padding,
    ) -> Tensor:
        """Logits [B, T, M, J], or [B, 1, M, J] per sample.

        `images` is the layout of the image tokens, which are the last context tokens, and `grid` that of the patches.
        """
        time = [self.norm_time(self.time_in(t_B))[:, None]] if self.uses_time else []
        patches = [self.norm_patches(self.patches_in(patches_BNP))] if self.uses_latent else []
        x_BLR = torch.cat([*patches, *time, tokens_BTR], dim=1)
        tokens = tokens_BTR.shape[1]
        # The time has the position of the first word, and moves the words by one.
        words = TokenSequence(len(time) + tokens - total(images))
        layout = (*([grid] if self.uses_latent else []), words, *images)
        positions = rotary(layout, self.head_width, self.rope_theta, x_BLR.device)
        sequence = extended(padding, before=x_BLR.shape[1] - tokens, after=0)
        for block in self.blocks:
            x_BLR = block(x_BLR, positions, sequence)
        tokens_out = self.norm_out(x_BLR[:, -tokens:])
        if self.per_sample:
            # The head is linear: the logits of the mean are the mean of the logits.
            tokens_out = _mean(tokens_out, padding)
        return self.head(tokens_out).unflatten(-1, (self.layers, -1))


def _mean(x_BTR: Tensor, padding: Padding) -> Tensor:
    """Mean over the tokens that are not padding, [B, 1, R]."""
    padding = mask_of(padding)
    if isinstance(padding, VariableLengths):
        return torch.cat([_mean(padding.row(x_BTR, b), None) for b in range(x_BTR.shape[0])])
    if padding is None:
        return x_BTR.mean(dim=1, keepdim=True)
    real_BT1 = padding[..., None].to(x_BTR.dtype)
    return (x_BTR * real_BT1).sum(dim=1, keepdim=True) / real_BT1.sum(dim=1, keepdim=True)
