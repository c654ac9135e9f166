"""The networks that are timed, with random weights, made on the device tensor by tensor; and their small stand-ins.

Weights are normal noise everywhere: products with zeros, which a fresh network has, take a GPU less power and time.

Shapes: T context tokens, M understanding layers, S width of a state, C channels, N patches.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3Model

from mos_cli.bundles.blueprints import Network, find_network
from mos_cli.bundles.shapes import AutoencoderShape, GenerationShape, UnderstandingShape
from mos_cli.planning.memory import TOKENS
from mos_cli.quantization.layers import COMPUTE, assembled, quantised_parts
from mos_cli.quantization.method import Method, Quantisation
from mos_cli.towers.bank import StateBank
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.quantized import GENERATION_KEPT, UNDERSTANDING_KEPT, survey

_Model = TypeVar("_Model", bound=nn.Module)
HEAD = 128
"""Width of a head of the understanding tower."""


def mos_l(*, tiny: bool) -> Network:
    """MoS-L with Qwen3-VL-8B, by its blueprint, drawing from words alone; or a small one of its kind for any CPU."""
    network = find_network("mos-l", "qwen3-vl-8b")
    if not tiny:
        return network
    assert network.autoencoder is not None
    stages = {f"{part}_block_out_channels": [32] * 6 for part in ("encoder", "decoder")}
    layers = {f"{part}_layers_per_block": [1] * 6 for part in ("encoder", "decoder")}
    sizes: dict[str, Any] = {"width": 128, "depth": 3, "heads": 2, "hidden": 192, "router_width": 64, "router_heads": 2}
    # Four products of width x width, with as many heads for keys as for queries, and three of the feed-forward layer.
    linear = 2 * (4 * 128 * 128 + 3 * 128 * 256)
    return replace(
        network,
        understanding=UnderstandingShape(layers=2, width=128, hidden=256, linear=linear, other=100 * 128, vision=0),
        generation=GenerationShape(**sizes, channels=32, patch=1, states_layers=3, states_width=128),
        autoencoder=AutoencoderShape(parameters=1, config={**network.autoencoder.config, **stages, **layers}),
        canvas=network.canvas.model_copy(update={"native": (128, 128)}),
        defaults=network.defaults.model_copy(update={"steps": 3}),
    )


def generation_tower(shape: GenerationShape, device: torch.device, method: Method | None = None) -> GenerationTower:
    """A generation tower, its blocks quantised as they are made where a method is given; the rest in bf16."""
    with torch.device("meta"):
        tower = GenerationTower(**shape.model_dump())
    return _filled(tower, device, method, GENERATION_KEPT)


def understanding_tower(shape: UnderstandingShape, device: torch.device, method: Method | None = None) -> Qwen3Model:
    """A text tower of Qwen3's kind with the layers and parameters of `shape`."""
    width = shape.width
    keys = (shape.linear // shape.layers - 2 * width * width - 3 * width * shape.hidden) // (2 * width * HEAD)
    config = Qwen3Config(
        vocab_size=shape.other // width,
        hidden_size=width,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=width // HEAD,
        num_key_value_heads=keys,
        head_dim=HEAD,
    )
    with torch.device("meta"):
        tower = Qwen3Model(config)
    # Not among the weights: a table that is computed when the module is made.
    tower.rotary_emb = type(tower.rotary_emb)(config).to(device)
    return _filled(tower, device, method, UNDERSTANDING_KEPT)


@torch.inference_mode()
def read_states(tower: Qwen3Model) -> Tensor:
    """The states [1, T, M, S] of a prompt of the length that is planned with."""
    ids_1T = torch.randint(0, tower.config.vocab_size, (1, TOKENS), device=tower.device)  # type: ignore[arg-type]
    hidden = tower(input_ids=ids_1T, output_hidden_states=True, use_cache=False).hidden_states
    return torch.stack(hidden, dim=2)


def autoencoder(network: Network, device: torch.device) -> AutoencoderDC:
    """The autoencoder of a network, in bf16."""
    assert network.autoencoder is not None
    with _made_on(device):
        model = AutoencoderDC.from_config(network.autoencoder.config)
    assert isinstance(model, AutoencoderDC)
    return model.eval().requires_grad_(False)


def latents(network: Network, device: torch.device, *, scale: int = 1) -> Tensor:
    """Noise as large as a picture of the native size, in fp32; `scale` times the side makes its square the tokens."""
    assert network.autoencoder is not None
    width, height = (scale * side // network.autoencoder.factor for side in network.canvas.native)
    return torch.randn(1, network.generation.channels, height, width, device=device)


@torch.inference_mode()
def bank(network: Network, tower: GenerationTower, device: torch.device, tokens: int = TOKENS) -> StateBank:
    """The bank of a prompt of `tokens` tokens whose states are noise, the same for every call."""
    layers, width = network.understanding.states
    noise = torch.Generator(device).manual_seed(tokens)
    return tower.project_states(torch.randn(1, tokens, layers, width, generator=noise, device=device, dtype=COMPUTE))


@dataclass(frozen=True)
class Rival:
    """Another transformer: its class in diffusers, its config there, and what a forward at 1024 px is given."""

    name: str
    kind: type[nn.Module]
    config: dict[str, Any]
    tiny: dict[str, Any]
    inputs: Callable[[dict[str, Any], torch.device, int], dict[str, Any]]
    tokens_side: int = 64
    """Tokens along the picture's side."""

    def make(self, device: torch.device, *, tiny: bool) -> tuple[nn.Module, dict[str, Any]]:
        """The network in bf16, and its inputs."""
        config, side = (self.config | self.tiny, 8) if tiny else (self.config, self.tokens_side)
        with _made_on(device):
            model = self.kind(**config)
        return model.eval().requires_grad_(False), self.inputs(config, device, side)

    def parameters(self) -> int:
        """Counted without making any."""
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self.kind(**self.config).parameters())


def _noise(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device, dtype=COMPUTE)


def _qwen_inputs(config: dict[str, Any], device: torch.device, side: int) -> dict[str, Any]:
    return {
        "hidden_states": _noise(device, 1, side * side, 64),
        "encoder_hidden_states": _noise(device, 1, TOKENS, config["joint_attention_dim"]),
        "encoder_hidden_states_mask": torch.ones(1, TOKENS, device=device, dtype=torch.bool),
        "timestep": torch.full((1,), 0.5, device=device, dtype=COMPUTE),
        "img_shapes": [[(1, side, side)]],
    }


def _flux_inputs(config: dict[str, Any], device: torch.device, side: int) -> dict[str, Any]:
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    image_N3 = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).to(device, torch.float32)
    return {
        "hidden_states": _noise(device, 1, side * side, 64),
        "encoder_hidden_states": _noise(device, 1, TOKENS, config["joint_attention_dim"]),
        "pooled_projections": _noise(device, 1, config["pooled_projection_dim"]),
        "timestep": torch.full((1,), 0.5, device=device, dtype=COMPUTE),
        "guidance": torch.full((1,), 3.5, device=device, dtype=COMPUTE),
        "img_ids": image_N3,
        "txt_ids": torch.zeros(TOKENS, 3, device=device),
    }


def _sana_inputs(config: dict[str, Any], device: torch.device, side: int) -> dict[str, Any]:
    return {
        "hidden_states": _noise(device, 1, 32, side, side),
        "encoder_hidden_states": _noise(device, 1, TOKENS, config["caption_channels"]),
        "timestep": torch.full((1,), 500.0, device=device, dtype=COMPUTE),
    }


_SMALL = {"attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 64, "axes_dims_rope": (8, 12, 12)}
QWEN_IMAGE = Rival(
    "Qwen-Image",
    QwenImageTransformer2DModel,
    {"num_layers": 60, "num_attention_heads": 24, "attention_head_dim": 128, "joint_attention_dim": 3584},
    {**_SMALL, "num_layers": 2},
    _qwen_inputs,
)
FLUX = Rival(
    "FLUX.1-dev",
    FluxTransformer2DModel,
    {
        "num_layers": 19,
        "num_single_layers": 38,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
    },
    {**_SMALL, "num_layers": 1, "num_single_layers": 1, "pooled_projection_dim": 32},
    _flux_inputs,
)
SANA = Rival(
    "SANA-1.5 4.8B",
    SanaTransformer2DModel,
    {
        "num_layers": 60,
        "num_attention_heads": 70,
        "num_cross_attention_heads": 20,
        "cross_attention_head_dim": 112,
        "cross_attention_dim": 2240,
        "caption_channels": 2304,
        "qk_norm": "rms_norm_across_heads",
    },
    {
        "num_layers": 2,
        "num_attention_heads": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 32,
        "cross_attention_dim": 64,
        "caption_channels": 48,
        "sample_size": 8,
    },
    _sana_inputs,
    tokens_side=32,
)


@contextmanager
def _made_on(device: torch.device) -> Iterator[None]:
    """Modules made within the block are on the device, in bf16 from the beginning."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(COMPUTE)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def free(device: torch.device) -> None:
    """Hands the memory of what is no longer referred to back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _filled(model: _Model, device: torch.device, method: Method | None, kept: tuple[str, ...]) -> _Model:
    """Gives a network on the meta device random weights, quantising layer by layer: it is never there in bf16 whole."""
    chosen = () if method is None else survey(model, Quantisation(method=method, kept=kept)).quantised
    for name, module in list(model.named_modules()):
        for part, empty in list(module.named_parameters(recurse=False)):
            if name in chosen and part == "weight":
                continue
            module.register_parameter(part, nn.Parameter(_drawn(empty, device), requires_grad=False))
        if name in chosen:
            assert isinstance(module, nn.Linear)
            assert method is not None
            parts = quantised_parts(_drawn(module.weight, device), method)
            model.set_submodule(name, assembled(module, method, parts, device))
    return model.eval().requires_grad_(False)


def _drawn(like: Tensor, device: torch.device) -> Tensor:
    """Noise as a fresh layer has it; norms and biases are ones."""
    made = torch.empty(like.shape, device=device, dtype=COMPUTE)
    return made.normal_(0, like.shape[1] ** -0.5) if like.dim() > 1 else made.fill_(1)
