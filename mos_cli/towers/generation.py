"""The generation tower: a diffusion transformer whose every block reads its own routed context.

Method: Mixture of States (arXiv 2511.12207); predicts the clean image (x-prediction), time 1 = noise.
Shapes: B batch, T context tokens, N patches, L = T + N, D width, S width of a state, R router width,
M understanding layers, J generation blocks, K kept layers, C channels, H x W the latent's size.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from mos_cli.towers.layers import (
    EPS,
    Attention,
    Rotary,
    SwiGLU,
    TimeEmbedding,
    patchify,
    rotary,
    unpatchify,
)
from mos_cli.towers.router import Route, Router, choose_route


@dataclass(frozen=True)
class StateBank:
    """A prompt's states, projected once for all steps: mixing rows of the bank equals projecting mixed states.

    bank_BTMD holds every layer at the generation tower's width, router_BTR the router's view of the tokens. mask_BT
    (True = a real token) is None where nothing is padded, which is always so when drawing.
    """

    bank_BTMD: Tensor
    router_BTR: Tensor
    mask_BT: Tensor | None = None

    def mix(self, route: Route, block: int) -> Tensor:
        """Context of one block, [B, T, D]: the weighted sum of the kept layers of each token."""
        ids_BTK, weights_BTK = route.ids_BTJK[:, :, block], route.weights_BTJK[:, :, block]
        rows_BTKD = self.bank_BTMD.gather(2, ids_BTK[..., None].expand(-1, -1, -1, self.bank_BTMD.shape[-1]))
        return (weights_BTK[..., None].to(rows_BTKD.dtype) * rows_BTKD).sum(dim=2)


class GenerationBlock(nn.Module):
    """Attention and SwiGLU, modulated by the shared timestep modulation plus a bias of the block's own."""

    def __init__(self, width: int, heads: int, hidden: int, *, separate_context: bool) -> None:
        super().__init__()
        self.modulation_bias = nn.Parameter(torch.zeros(6, width))
        self.attention = Attention(width, heads)
        self.mlp = SwiGLU(width, hidden)
        self.norm_context = nn.RMSNorm(width, eps=EPS)
        self.context_kv = nn.Linear(width, 2 * width, bias=False) if separate_context else None

    def forward(
        self,
        x_BLD: Tensor,
        context_BTD: Tensor,
        kept_BT1: Tensor,
        modulation_B6D: Tensor,
        positions: Rotary,
        mask_BL: Tensor | None,
    ) -> Tensor:
        """x is the patches alone where the context only serves as keys and values, else [context stream; patches].

        The norm makes all contexts equally long; the sum of a token's kept weights, `kept_BT1`, is put back after it.
        """
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
            part[:, None] for part in (modulation_B6D + self.modulation_bias).unbind(1)
        )
        context = self.norm_context(context_BTD) * kept_BT1
        context_kv = None
        if self.context_kv is not None:
            context_kv = self.context_kv(context)
        else:
            x_BLD = torch.cat([x_BLD[:, : context.shape[1]] + context, x_BLD[:, context.shape[1] :]], dim=1)
        h = _normed(x_BLD) * (1 + scale_a) + shift_a
        x_BLD = x_BLD + gate_a * self.attention(h, positions, context_kv, mask_BL)
        h = _normed(x_BLD) * (1 + scale_m) + shift_m
        return x_BLD + gate_m * self.mlp(h)


class GenerationTower(ModelMixin, ConfigMixin):
    """Router and diffusion transformer together: (z_t, t, state bank) -> (clean image, route).

    Args:
        channels, patch: the latent's channels and the side of a patch in latent pixels.
        width, depth, heads, hidden: sizes of the transformer; `hidden` is SwiGLU's inner width.
        states_layers, states_width: what the understanding tower hands over (M, S).
        context: "kv" lets the routed context serve as keys and values only; "tokens" keeps it in the sequence, as
            tokens that also query and pass the feed-forward layer. (The paper leaves this open.)
        router_width, router_depth, router_heads, top_k, renormalise: the router; see `choose_route`.
        rope_theta: base of the rotary frequencies.
    """

    _no_split_modules: ClassVar = ["GenerationBlock"]

    @register_to_config
    def __init__(
        self,
        *,
        channels: int = 3,
        patch: int = 8,
        width: int = 256,
        depth: int = 8,
        heads: int = 4,
        hidden: int = 704,
        states_layers: int = 7,
        states_width: int = 384,
        context: Literal["kv", "tokens"] = "kv",
        router_width: int = 128,
        router_depth: int = 2,
        router_heads: int = 2,
        top_k: int = 2,
        renormalise: bool = True,
        rope_theta: float = 100.0,
    ) -> None:
        super().__init__()
        self.patch, self.depth, self.head_width = patch, depth, width // heads
        self.states_shape = (states_layers, states_width)
        self.context, self.top_k, self.renormalise, self.rope_theta = context, top_k, renormalise, rope_theta
        patch_values = channels * patch * patch
        self.states_in = nn.Linear(states_width, width, bias=False)
        self.patches_in = nn.Linear(patch_values, width)
        self.time_in = TimeEmbedding(width)
        self.modulation = nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(
            GenerationBlock(width, heads, hidden, separate_context=context == "kv") for _ in range(depth)
        )
        self.modulation_out = nn.Linear(width, 2 * width)
        self.patches_out = nn.Linear(width, patch_values)
        self.router = Router(
            width=router_width,
            depth=router_depth,
            heads=router_heads,
            states_width=states_width,
            patch_values=patch_values,
            layers=states_layers,
            blocks=depth,
        )
        self._initialise()

    def _initialise(self) -> None:
        """Every block starts as the identity, the output as grey and the routes as nearly uniform."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:
            nn.init.zeros_(block.attention.to_out.weight)  # type: ignore[union-attr, arg-type]
            nn.init.zeros_(block.mlp.down.weight)  # type: ignore[union-attr, arg-type]
            block.modulation_bias.data[[2, 5]] = 1.0  # gates open  # type: ignore[union-attr, index]
        for linear in (self.modulation, self.modulation_out, self.patches_out):
            nn.init.zeros_(linear.weight)
        # A one-hot start would leave the unread layers without a gradient.
        nn.init.trunc_normal_(self.router.head.weight, std=0.02)

    def read(self, states_BTMS: Tensor, mask_BT: Tensor | None = None) -> StateBank:
        """Normalises every state (their scales differ by orders of magnitude) and projects it, once per prompt.

        The router's view of the prompt is the embedding output, layer 0.
        """
        dtype = self.states_in.weight.dtype
        states = F.rms_norm(states_BTMS.float(), states_BTMS.shape[-1:], eps=EPS).to(dtype)
        return StateBank(self.states_in(states), self.router.embed(states[:, :, 0]), mask_BT)

    def forward(
        self,
        z_BCHW: Tensor,
        t_B: Tensor,
        bank: StateBank,
        *,
        epsilon: float = 0.0,
    ) -> tuple[Tensor, Route]:
        """Predicts the clean latent from the noised one; the route is chosen anew at every call.

        Args:
            z_BCHW: noised latent z_t; H and W are multiples of the patch.
            t_B: times in [0, 1], 1 = noise.
            epsilon: probability of exploring a random route (training only).
        """
        patch, size = self.patch, (z_BCHW.shape[-2], z_BCHW.shape[-1])
        patches = patchify(z_BCHW, patch).to(self.patches_in.weight.dtype)
        tokens, grid = bank.bank_BTMD.shape[1], (size[0] // patch, size[1] // patch)
        theta, device = self.rope_theta, z_BCHW.device

        positions = rotary(1 + tokens, *grid, self.router.head_width, theta, device)
        mask = _extended(bank.mask_BT, before=1, after=patches.shape[1])
        route = choose_route(
            self.router(bank.router_BTR, patches, t_B, positions, mask),
            self.top_k,
            renormalise=self.renormalise,
            epsilon=epsilon,
        )

        x = self.patches_in(patches)
        if self.context == "tokens":
            x = torch.cat([x.new_zeros(x.shape[0], tokens, x.shape[2]), x], dim=1)
        time = F.silu(self.time_in(t_B))
        modulation = self.modulation(time).unflatten(-1, (6, -1))
        positions = rotary(tokens, *grid, self.head_width, theta, device)
        mask = _extended(bank.mask_BT, before=0, after=patches.shape[1])
        kept_BTJ = route.weights_BTJK.sum(dim=-1).to(x.dtype)
        for index, block in enumerate(self.blocks):
            x = block(x, bank.mix(route, index), kept_BTJ[:, :, index, None], modulation, positions, mask)

        shift, scale = self.modulation_out(time)[:, None].chunk(2, dim=-1)
        x = self.patches_out(_normed(x[:, -patches.shape[1] :]) * (1 + scale) + shift)
        return unpatchify(x.float(), patch, size), route


def _normed(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


def _extended(mask_BT: Tensor | None, *, before: int, after: int) -> Tensor | None:
    """The mask of the context tokens with room for tokens that are always attended to."""
    return None if mask_BT is None else F.pad(mask_BT, (before, after), value=True)
