"""The networks of the real base models, from their configs on the meta device, as the numbers of an adapter.json."""

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, Flux2Transformer2DModel, PRXTransformer2DModel
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.t5gemma.configuration_t5gemma import T5GemmaModuleConfig
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

from mos_cli.bundles.base_models import KEPT, BaseShape, PartShape
from mos_cli.quantization.method import Quantisation
from mos_cli.towers.quantized import UNDERSTANDING_KEPT, survey


def qwen3() -> nn.Module:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=151936,
            hidden_size=2560,
            intermediate_size=9728,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=True,
        )
    )


def t5gemma() -> nn.Module:
    config = T5GemmaModuleConfig(
        vocab_size=256000,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
    )
    config.dropout_rate = config.attention_dropout = 0.0
    return T5GemmaEncoder(config)


def klein() -> nn.Module:
    return Flux2Transformer2DModel(
        in_channels=128,
        num_layers=5,
        num_single_layers=20,
        attention_head_dim=128,
        num_attention_heads=24,
        joint_attention_dim=7680,
        guidance_embeds=False,
    )


def flux_autoencoder() -> nn.Module:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        layers_per_block=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


Makers = tuple[Callable[[], nn.Module], Callable[[], nn.Module], Callable[[], nn.Module]]
NETWORKS: dict[str, tuple[str, Makers, dict[str, int | bool]]] = {
    "klein": (
        "Flux2KleinPipeline",
        (klein, qwen3, AutoencoderKLFlux2),
        {
            "width": 3072,
            "head_width": 128,
            "states_width": 2560,
            "text_tokens": 512,
            "latent_channels": 32,
            "joint": True,
        },
    ),
    "z-image": (
        "ZImagePipeline",
        (ZImageTransformer2DModel, qwen3, flux_autoencoder),
        {
            "width": 3840,
            "head_width": 128,
            "states_width": 2560,
            "text_tokens": 512,
            "latent_channels": 16,
            "joint": True,
        },
    ),
    "prx": (
        "PRXPipeline",
        (PRXTransformer2DModel, t5gemma, flux_autoencoder),
        {
            "width": 1792,
            "head_width": 64,
            "states_width": 2304,
            "text_tokens": 256,
            "latent_channels": 16,
            "joint": False,
        },
    ),
}
"""By the name of the adapter: its pipeline, what makes its networks, and the numbers that are not counted."""


def part(network: nn.Module, kept: tuple[str, ...]) -> PartShape:
    """The numbers of a network, by what `survey` would quantise."""
    report = survey(network, Quantisation(method="nf4", kept=kept))
    layers = [network.get_submodule(name) for name in report.quantised]
    sizes = [(layer.in_features, layer.out_features) for layer in layers]  # type: ignore[attr-defined]
    widest, longest = max(((i * o, o) for i, o in sizes), default=(0, 0))
    # A tied output head is one weight, and is not counted twice.
    parameters = sum(p.numel() for p in {id(p): p for p in network.parameters()}.values())
    return PartShape(
        parameters=parameters,
        linear=sum(i * o for i, o in sizes),
        rows=sum(o for _, o in sizes),
        widest=widest,
        longest=longest,
    )


def shape_of(name: str) -> BaseShape:
    pipeline, makers, numbers = NETWORKS[name]
    with torch.device("meta"):
        transformer, text_encoder, vae = (make() for make in makers)
    return BaseShape(
        transformer=part(transformer, KEPT[pipeline]),
        text_encoder=part(text_encoder, UNDERSTANDING_KEPT),
        vae=PartShape(parameters=sum(p.numel() for p in vae.parameters())),
        decoder_width=(vae.config.get("decoder_block_out_channels") or vae.config["block_out_channels"])[0],  # type: ignore[operator, union-attr]
        **numbers,  # type: ignore[arg-type]
    )
