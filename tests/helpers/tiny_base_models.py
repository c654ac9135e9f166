"""Tiny base models with random weights, built from config classes and saved as diffusers folders."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    PRXPipeline,
    PRXTransformer2DModel,
    ZImagePipeline,
)
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.models.t5gemma.configuration_t5gemma import T5GemmaModuleConfig
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

TEXT = "user assistant a red fox and a blue dog on a green chessboard in the morning light"
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]


def tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a chat template, as Qwen's, trained on one line."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)  # type: ignore[call-arg]
    made.train_from_iterator([TEXT] * 3, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<|endoftext|>", eos_token="<|im_end|>", model_max_length=max_length
    )
    fast.chat_template = CHAT
    return fast


def randomised(network: nn.Module) -> nn.Module:
    """Gives every parameter a random value: gates and modulations that start at 0 would hide the text."""
    generator = torch.Generator().manual_seed(11)
    for name, parameter in network.named_parameters():
        if parameter.dim() >= 2:
            parameter.data = torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5
        elif "norm" not in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.08
    return network


def qwen3(layers: int) -> Qwen3ForCausalLM:
    torch.manual_seed(1)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=400,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
        )
    )


def autoencoder() -> AutoencoderKL:
    torch.manual_seed(2)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 16, 16),
        latent_channels=16,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1159,
        scaling_factor=0.3611,
    )


def klein(*, distilled: bool = True) -> Flux2KleinPipeline:
    """2 double and 3 single blocks, and a language model with 30 layers, because layers 9, 18 and 27 are read."""
    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=3 * 64,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=(16, 16, 16, 16), layers_per_block=1, latent_channels=16, norm_num_groups=8
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return Flux2KleinPipeline(
        scheduler,
        vae,
        qwen3(30),
        tokenizer(64),
        randomised(transformer),
        is_distilled=distilled,  # type: ignore[arg-type]
    )


def z_image() -> ZImagePipeline:
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=128,
        n_layers=4,
        n_refiner_layers=2,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=64,
        axes_dims=[16, 8, 8],
        axes_lens=[1024, 64, 64],
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return ZImagePipeline(scheduler, autoencoder(), qwen3(6), tokenizer(64), randomised(transformer))  # type: ignore[arg-type]


def prx() -> PRXPipeline:
    torch.manual_seed(0)
    config = T5GemmaModuleConfig(
        vocab_size=400,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        sliding_window=64,
    )
    config.dropout_rate = config.attention_dropout = 0.0
    transformer = PRXTransformer2DModel(
        in_channels=16,
        patch_size=2,
        context_in_dim=64,
        hidden_size=128,
        mlp_ratio=2.0,
        num_heads=4,
        depth=4,
        axes_dim=[16, 16],
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return PRXPipeline(randomised(transformer), scheduler, T5GemmaEncoder(config), tokenizer(32), autoencoder())  # type: ignore[arg-type]


def save(pipe: Any, folder: Path) -> Path:
    """Writes a pipeline as the hub has it."""
    pipe.save_pretrained(folder)
    return folder
