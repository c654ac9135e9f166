"""The generation tower: a diffusion transformer in which every block reads its own routed context.

Method: Mixture of States (arXiv 2511.12207); predicts the clean image (x-prediction), time 1 = noise.
Shapes: B batch, T context tokens, V of them image tokens, R patches of the references, N patches, D width, S width of a
state, Z widest state of an image token, M understanding layers, J generation blocks, C channels, H x W a latent's size.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from mos_cli.bundles.shapes import IMAGE_GRID
from mos_cli.towers.bank import Grid, References, StateBank, image_layout
from mos_cli.towers.blocks import Context, GenerationBlock, context_mode
from mos_cli.towers.layers import (
    EPS,
    TimeEmbedding,
    TokenGrid,
    TokenLayout,
    TokenSequence,
    extended,
    normed,
    patchify,
    rotary,
    total,
    unpatchify,
)
from mos_cli.towers.router import Route, Router, Steering, choose_route, fixed_route

Fusion = Literal["routed", "last", "aligned", "mean"]
RouterInput = Literal["tokens", "latent", "time"]
Routing = Literal["token", "sample"]


class GenerationTower(ModelMixin, ConfigMixin, CacheMixin):
    """Router and diffusion transformer: (z_t, t, state bank) -> (clean image, route).

    Args:
        channels, patch: the latent's channels and the side of a patch in latent pixels.
        width, depth, heads, hidden: sizes of the transformer; `hidden` is SwiGLU's inner width.
        states_layers, states_width: number and width of the understanding tower's states (M, S).
        image_state_widths: widths of the M states of an image token, where an image encoder makes them.
        has_vision: whether the understanding tower makes image tokens itself, with states like those of words. With
            neither, the tower takes no pictures.
        fusion: the layers that a block reads: "routed" are those that the router chooses for every token and step; for
            the others see `fixed_route`. They have no router, and its settings have no effect.
        context: how a block reads them: "kv" as keys and values of its attention, before the patches' own; "tokens" as
            tokens of the sequence, which also query and pass the feed-forward layer, with new context added in every
            block; "joint" as such tokens, added in the first block only; "cross" in a cross-attention layer.
        router_inputs: the inputs of the router: "tokens" and, unless left out, "latent" and "time".
        routing: "token" for a route of its own for every token, "sample" for one route for all tokens of a prompt.
        router_width, router_depth, router_heads, top_k, renormalise: the router; see `choose_route`.
        rope_theta: base of the rotary frequencies.
        guidance_max: where guidance is distilled into the network, the largest scale that is an input of it.

    Raises:
        ValueError: an unknown or impossible value, or values that exclude each other; see `_check`.
    """

    _no_split_modules: ClassVar = ["GenerationBlock"]
    _repeated_blocks: ClassVar = ["GenerationBlock", "RouterBlock"]

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
        image_state_widths: Sequence[int] = (),
        has_vision: bool = False,
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
        guidance_max: float | None = None,
    ) -> None:
        super().__init__()
        _check(self.config)
        self.patch, self.depth, self.head_width = patch, depth, width // heads
        self.states_shape = (states_layers, states_width)
        self.fusion, self.in_sequence = fusion, context in ("tokens", "joint")
        self.top_k, self.renormalise, self.rope_theta = top_k, renormalise, rope_theta
        self.patch_spacing = 1.0
        """The distance of neighbouring patches in the rotary positions; training on a smaller canvas raises it."""
        self.guidance_max = guidance_max
        self.kept_layers = {"routed": top_k, "mean": states_layers}.get(fusion, 1)
        patch_values = channels * patch * patch
        self.image_state_widths, self.has_vision = tuple(image_state_widths), has_vision
        self.image_states_in = nn.ModuleList(nn.Linear(width_in, width, bias=False) for width_in in image_state_widths)
        self.states_in = nn.Linear(states_width, width, bias=False)
        self.patches_in = nn.Linear(patch_values, width)
        self.reference_in = nn.Linear(patch_values, width, bias=False) if image_state_widths or has_vision else None
        self.time_in = TimeEmbedding(width)
        self.guidance_in = None if guidance_max is None else TimeEmbedding(width)
        self.modulation = nn.Linear(width, 6 * width)
        self.blocks = nn.ModuleList(
            GenerationBlock(width, heads, hidden, context_mode(context, block)) for block in range(depth)
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
                image_state_width=image_state_widths[-1] if image_state_widths else 0,
                patch_values=patch_values,
                layers=states_layers,
                blocks=depth,
            )
            if fusion == "routed"
            else None
        )
        self._initialise()

    def _initialise(self) -> None:
        """Starts every block as the identity, the output as grey and the routes as nearly uniform."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:
            block.start_as_identity()  # type: ignore[operator]
        for linear in (self.modulation, self.modulation_out, self.patches_out, self.reference_in):
            if linear is None:
                continue
            nn.init.zeros_(linear.weight)
        if self.guidance_in is not None:
            # So that distillation starts with the prediction without guidance, at every scale.
            nn.init.zeros_(self.guidance_in.mlp.linear_2.weight)
        if self.router is not None:
            # With a one-hot start the layers that are not read would have no gradient.
            nn.init.trunc_normal_(self.router.head.weight, std=0.02)

    def project_states(self, states_BTMS: Tensor, mask_BT: Tensor | None = None) -> StateBank:
        """The state bank of a batch of prompts: every state is normalised and projected, once per prompt.

        The scales of the states differ by orders of magnitude. The router's input is the embedding output, layer 0.
        """
        states = self._normed_states(states_BTMS)
        router_BTR = None if self.router is None else self.router.embed(states[:, :, 0])
        return StateBank(self.states_in(states), router_BTR, mask_BT)

    def add_image_tokens(self, bank: StateBank, image_states_BVMZ: Tensor, references: References) -> StateBank:
        """The bank of a prompt with the image tokens of reference pictures after those of its words.

        Args:
            image_states_BVMZ: states of the image tokens, picture by picture, as `ImageEncoder` returns them.
            references: the same pictures, as `cache_references` returns them.
        """
        states = [
            self._normed_states(image_states_BVMZ[:, :, m, :width]) for m, width in enumerate(self.image_state_widths)
        ]
        projected = torch.stack([into(state) for into, state in zip(self.image_states_in, states, strict=True)], dim=2)
        router_BTR = None
        if self.router is not None:
            router_BTR = torch.cat([bank.router_BTR, self.router.embed_image_states(states[-1])], dim=1)  # type: ignore[list-item]
        return StateBank(
            torch.cat([bank.bank_BTMD, projected], dim=1),
            router_BTR,
            extended(bank.padding, before=0, after=projected.shape[1]),
            references,
        )

    def _normed_states(self, states: Tensor) -> Tensor:
        return F.rms_norm(states.float(), states.shape[-1:], eps=EPS).to(self.states_in.weight.dtype)

    def cache_references(self, references: Sequence[Tensor], grids: Sequence[Grid] | None = None) -> References:
        """Runs every reference through the blocks alone, at time 0, and caches its keys and values for all steps.

        Args:
            references: clean latents, each [B, C, H, W], that of the edited picture first.
            grids: those of their image tokens; IMAGE_GRID x IMAGE_GRID by default, as `ImageEncoder` makes them.
        """
        caches, layout = [], []
        patches = [patchify(z_BCHW, self.patch).to(self.patches_in.weight.dtype) for z_BCHW in references]
        for order, z_BCHW in enumerate(references, start=1):
            x = self.patches_in(patches[order - 1])
            grid = self._grid(z_BCHW, order=-order)
            embedding = rotary((grid,), self.head_width, self.rope_theta, z_BCHW.device)
            _, modulation = self._time(z_BCHW.new_zeros(z_BCHW.shape[0]))
            cache = []
            for block in self.blocks:
                x, kv = block.cache_reference(x, modulation, embedding)  # type: ignore[operator]
                cache.append(kv)
            caches.append(cache)
            layout.append(grid)
        assert self.reference_in is not None
        kv = tuple(torch.cat(parts, dim=1) for parts in zip(*caches, strict=True))
        grids = tuple(grids or [(IMAGE_GRID, IMAGE_GRID)] * len(references))
        return References(grids, kv, tuple(layout), self.reference_in(patches[0]))

    def _grid(self, z_BCHW: Tensor, *, order: int = 0) -> TokenGrid:
        spacing = (self.patch_spacing, self.patch_spacing)
        return TokenGrid(z_BCHW.shape[-2] // self.patch, z_BCHW.shape[-1] // self.patch, order, spacing)

    def _time(self, t_B: Tensor, guidance_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The embedding of time and guidance, [B, D], and the modulation that all blocks share, [B, 6, D]."""
        time = self.time_in(t_B)
        if self.guidance_in is not None:
            # The range of the scales is small for the sinusoids, so that few of them turn more than once in it.
            time = time + self.guidance_in(torch.zeros_like(t_B) if guidance_B is None else (guidance_B - 1) / 100)
        time = F.silu(time)
        return time, self.modulation(time).unflatten(-1, (6, -1))

    def forward(
        self,
        z_BCHW: Tensor,
        t_B: Tensor,
        bank: StateBank,
        *,
        epsilon: float = 0.0,
        steering: Steering | Route | None = None,
        guidance_B: Tensor | None = None,
    ) -> tuple[Tensor, Route]:
        """Predicts the clean latent from the noised one, with a route chosen for this call.

        Args:
            z_BCHW: noised latent z_t; H and W are multiples of the patch.
            t_B: times in [0, 1], 1 = noise.
            epsilon: probability of exploring a random route (training only).
            steering: changes to the router's choice, or a route that replaces it.
            guidance_B: scales of guidance from 1 to `guidance_max`, which the prediction then includes; None is 1.
        """
        patch, size = self.patch, (z_BCHW.shape[-2], z_BCHW.shape[-1])
        patches = patchify(z_BCHW, patch).to(self.patches_in.weight.dtype)
        tokens, grid = bank.bank_BTMD.shape[1], self._grid(z_BCHW)
        grids = () if bank.references is None else bank.references.grids
        images = image_layout(grids, grid.rows * self.patch_spacing, grid.columns * self.patch_spacing)
        route = self._route(patches, t_B, images, grid, bank, epsilon, steering)

        x = self.patches_in(patches)
        if bank.references is not None:
            x = x + bank.references.reference_BND
        if self.in_sequence:
            x = torch.cat([x, x.new_zeros(x.shape[0], tokens, x.shape[2])], dim=1)
        time, modulation = self._time(t_B, guidance_B)
        references = () if bank.references is None else bank.references.layout
        layout = (grid, TokenSequence(tokens - total(images)), *images, *references)
        positions = rotary(layout, self.head_width, self.rope_theta, z_BCHW.device)
        padding = extended(bank.padding, before=patches.shape[1], after=total(references))
        contexts = bank.mix(route).unbind(2)
        kept_BTJ1 = route.weights_BTJK.sum(dim=-1, keepdim=True)
        if bank.scale_BT is not None:
            # Here, because the norm on a block's context would remove it.
            kept_BTJ1 = kept_BTJ1 * bank.scale_BT[:, :, None, None]
        kept = kept_BTJ1.to(x.dtype).unbind(2)
        references_kv = (None,) * self.depth if bank.references is None else bank.references.kv
        for block, context, kept_BT1, reference_kv in zip(self.blocks, contexts, kept, references_kv, strict=True):
            x = block(x, context, kept_BT1, reference_kv, modulation, positions, padding)

        shift, scale = self.modulation_out(time)[:, None].chunk(2, dim=-1)
        x = self.patches_out(torch.addcmul(shift, normed(x[:, : patches.shape[1]]), 1 + scale))
        return unpatchify(x.float(), patch, size), route

    def _route(
        self,
        patches_BNP: Tensor,
        t_B: Tensor,
        images: TokenLayout,
        grid: TokenGrid,
        bank: StateBank,
        epsilon: float,
        steering: Steering | Route | None,
    ) -> Route:
        """The route of this step, [B, T, J, K]: the router's choice, or the fixed one where there is no router."""
        if isinstance(steering, Route):
            route = steering
        elif self.router is None:
            route = fixed_route(self.fusion, self.states_shape[0], self.depth, patches_BNP.device)
        else:
            logits_BTMJ = self.router(bank.router_BTR, patches_BNP, t_B, images, grid, bank.padding)
            route = choose_route(
                logits_BTMJ, self.top_k, renormalise=self.renormalise, epsilon=epsilon, steering=steering
            )
        return route.shared_by(*bank.bank_BTMD.shape[:2])


def empty_tower(arguments: dict[str, Any]) -> GenerationTower:
    """A generation tower on the meta device, without weights; raises ValueError as `GenerationTower` does."""
    with torch.device("meta"):
        return GenerationTower(**arguments)


def _check(config: Any) -> None:
    """Checks the arguments of a generation tower; raises ValueError."""
    choices = [("fusion", config.fusion, Fusion), ("context", config.context, Context)]
    choices += [
        ("routing", config.routing, Routing),
        *(("router_inputs", i, RouterInput) for i in config.router_inputs),
    ]
    for name, value, known in choices:
        if value not in get_args(known):
            raise ValueError(f"{name} cannot be {value!r}: choose from {', '.join(get_args(known))}")
    if "tokens" not in config.router_inputs:
        raise ValueError("router_inputs must name 'tokens', for which routes are chosen")
    if config.context == "joint" and config.fusion != "last":
        raise ValueError(
            f"context 'joint' is added once, at the first block: it goes with fusion 'last', not {config.fusion!r}"
        )
    if config.fusion == "routed" and not 1 <= config.top_k <= config.states_layers:
        raise ValueError(f"top_k cannot be {config.top_k}: there are {config.states_layers} layers to choose from")
    for prefix in ("", "router_") if config.fusion == "routed" else ("",):
        width, heads = config[f"{prefix}width"], config[f"{prefix}heads"]
        if width % (16 * heads):
            # Three rotary axes share the width of a head.
            raise ValueError(
                f"{prefix}width cannot be {width}: with {heads} heads it must be a multiple of {16 * heads}"
            )
    if len(config.image_state_widths) not in (0, config.states_layers):
        raise ValueError(f"image_state_widths must have {config.states_layers} widths, one for every layer, or none")
    if config.image_state_widths and config.has_vision:
        raise ValueError("image_state_widths are for an image encoder, has_vision is for a tower without one: give one")
