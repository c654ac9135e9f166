"""The generation tower: a diffusion transformer whose every block reads its own routed context.

Method: Mixture of States (arXiv 2511.12207); predicts the clean image (x-prediction), time 1 = noise.
Shapes: B batch, T context tokens, N patches, L = T + N, D width, S width of a state, R router width,
M understanding layers, J generation blocks, K kept layers, C channels, H x W the latent's size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from mos_cli.towers.blocks import Context, GenerationBlock, reading
from mos_cli.towers.layers import EPS, TimeEmbedding, extended, normed, patchify, rotary, unpatchify
from mos_cli.towers.router import Route, Router, choose_route, fixed_route

Fusion = Literal["routed", "last", "aligned", "mean"]
RouterInput = Literal["tokens", "latent", "time"]
Routing = Literal["token", "sample"]


@dataclass(frozen=True)
class StateBank:
    """A prompt's states, projected once for all steps: mixing rows of the bank equals projecting mixed states.

    bank_BTMD holds every layer at the generation tower's width, router_BTR the router's view of the tokens (None where
    there is no router). mask_BT (True = a real token) is None where nothing is padded, which is always so when drawing.
    """

    bank_BTMD: Tensor
    router_BTR: Tensor | None
    mask_BT: Tensor | None = None

    def mix(self, route: Route, block: int) -> Tensor:
        """Context of one block, [B, T, D]: the weighted sum of the kept layers of each token."""
        ids_BTK, weights_BTK = route.ids_BTJK[:, :, block], route.weights_BTJK[:, :, block]
        rows_BTKD = self.bank_BTMD.gather(2, ids_BTK[..., None].expand(-1, -1, -1, self.bank_BTMD.shape[-1]))
        return (weights_BTK[..., None].to(rows_BTKD.dtype) * rows_BTKD).sum(dim=2)


class GenerationTower(ModelMixin, ConfigMixin):
    """Router and diffusion transformer together: (z_t, t, state bank) -> (clean image, route).

    Args:
        channels, patch: the latent's channels and the side of a patch in latent pixels.
        width, depth, heads, hidden: sizes of the transformer; `hidden` is SwiGLU's inner width.
        states_layers, states_width: what the understanding tower hands over (M, S).
        fusion: which layers a block reads: "routed" as the router decides for every token and step, else as
            `fixed_route` says, without a router: its settings then mean nothing.
        context: how a block reads them: "kv" as keys and values of its attention, beside the patches' own; "tokens" as
            tokens of the sequence, which also query and pass the feed-forward layer, refreshed in every block; "joint"
            as such tokens, given to the first block alone; "cross" in a cross-attention layer of the block's own.
        router_inputs: what the router looks at: "tokens" and, unless left out, "latent" and "time".
        routing: "token" lets every token take a route of its own, "sample" all tokens of a prompt the same.
        router_width, router_depth, router_heads, top_k, renormalise: the router; see `choose_route`.
        rope_theta: base of the rotary frequencies.

    Raises:
        ValueError: an unknown choice, or choices that do not go together.
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
        fusion: Fusion = "routed",
        context: Context = "kv",
        router_inputs: Sequence[RouterInput] = ("tokens", "latent", "time"),
        routing: Routing = "token",
        router_width: int = 128,
        router_depth: int = 2,
        router_heads: int = 2,
        top_k: int = 2,
        renormalise: bool = True,
        rope_theta: float = 100.0,
    ) -> None:
        super().__init__()
        _check_choices(fusion, context, router_inputs, routing)
        if fusion == "routed" and not 1 <= top_k <= states_layers:
            raise ValueError(f"top_k cannot be {top_k}: there are {states_layers} layers to choose from")
        self.patch, self.depth, self.head_width = patch, depth, width // heads
        self.states_shape = (states_layers, states_width)
        self.fusion, self.in_sequence = fusion, context in ("tokens", "joint")
        self.top_k, self.renormalise, self.rope_theta = top_k, renormalise, rope_theta
        self.kept_layers = {"routed": top_k, "mean": states_layers}.get(fusion, 1)
        patch_values = channels * patch * patch
        self.states_in = nn.Linear(states_width, width, bias=False)
        self.patches_in = nn.Linear(patch_values, width)
        self.time_in = TimeEmbedding(width)
        self.modulation = nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(
            GenerationBlock(width, heads, hidden, reading(context, block)) for block in range(depth)
        )
        self.modulation_out = nn.Linear(width, 2 * width)
        self.patches_out = nn.Linear(width, patch_values)
        self.router = (
            Router(
                inputs=router_inputs,
                per_sample=routing == "sample",
                width=router_width,
                depth=router_depth,
                heads=router_heads,
                rope_theta=rope_theta,
                states_width=states_width,
                patch_values=patch_values,
                layers=states_layers,
                blocks=depth,
            )
            if fusion == "routed"
            else None
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
            block.start_as_identity()  # type: ignore[operator]
        for linear in (self.modulation, self.modulation_out, self.patches_out):
            nn.init.zeros_(linear.weight)
        if self.router is not None:
            # A one-hot start would leave the unread layers without a gradient.
            nn.init.trunc_normal_(self.router.head.weight, std=0.02)

    def read(self, states_BTMS: Tensor, mask_BT: Tensor | None = None) -> StateBank:
        """Normalises every state (their scales differ by orders of magnitude) and projects it, once per prompt.

        The router's view of the prompt is the embedding output, layer 0.
        """
        dtype = self.states_in.weight.dtype
        states = F.rms_norm(states_BTMS.float(), states_BTMS.shape[-1:], eps=EPS).to(dtype)
        seen = None if self.router is None else self.router.embed(states[:, :, 0])
        return StateBank(self.states_in(states), seen, mask_BT)

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
        route = self._route(patches, t_B, grid, bank, epsilon)

        x = self.patches_in(patches)
        if self.in_sequence:
            x = torch.cat([x.new_zeros(x.shape[0], tokens, x.shape[2]), x], dim=1)
        time = F.silu(self.time_in(t_B))
        modulation = self.modulation(time).unflatten(-1, (6, -1))
        positions = rotary(tokens, *grid, self.head_width, self.rope_theta, z_BCHW.device)
        mask = extended(bank.mask_BT, before=0, after=patches.shape[1])
        kept_BTJ = route.weights_BTJK.sum(dim=-1).to(x.dtype)
        for index, block in enumerate(self.blocks):
            x = block(x, bank.mix(route, index), kept_BTJ[:, :, index, None], modulation, positions, mask)

        shift, scale = self.modulation_out(time)[:, None].chunk(2, dim=-1)
        x = self.patches_out(normed(x[:, -patches.shape[1] :]) * (1 + scale) + shift)
        return unpatchify(x.float(), patch, size), route

    def _route(self, patches_BNP: Tensor, t_B: Tensor, grid: tuple[int, int], bank: StateBank, epsilon: float) -> Route:
        """The route of this step, [B, T, J, K]: the router's choice, or the fixed one where there is no router."""
        if self.router is None:
            route = fixed_route(self.fusion, self.states_shape[0], self.depth, patches_BNP.device)
        else:
            logits_BTMJ = self.router(bank.router_BTR, patches_BNP, t_B, grid, bank.mask_BT)
            route = choose_route(logits_BTMJ, self.top_k, renormalise=self.renormalise, epsilon=epsilon)
        return route.shared_by(*bank.bank_BTMD.shape[:2])


def _check_choices(fusion: str, context: str, router_inputs: Sequence[str], routing: str) -> None:
    choices = [("fusion", fusion, Fusion), ("context", context, Context), ("routing", routing, Routing)]
    for name, chosen, known in [*choices, *(("router_inputs", part, RouterInput) for part in router_inputs)]:
        if chosen not in get_args(known):
            raise ValueError(f"{name} cannot be {chosen!r}: choose from {', '.join(get_args(known))}")
    if "tokens" not in router_inputs:
        raise ValueError("router_inputs must name 'tokens': it is they that are routed")
    if context == "joint" and fusion != "last":
        raise ValueError(f"context 'joint' enters once, at the first block: it goes with fusion 'last', not {fusion!r}")
