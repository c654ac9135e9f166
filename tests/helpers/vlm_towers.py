"""Vision-language towers with random weights, as small as they can be, in the format of the real ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    PerceptionLMConfig,
    PerceptionLMForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

LAYERS, WIDTH = 4, 64
QWEN = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
INTERN = ("<img>", "<IMG_CONTEXT>", "</img>")
PERCEPTION = ("<|image|>", "<|video|>")
CORPUS = ["paint the red apple green", "remove the dog on the left", "a cat and two dogs under a tree"] * 4
TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 128,
    "max_position_embeddings": 2048,
}


def qwen3_vl(folder: Path) -> Path:
    """Qwen3-VL: pictures of any shape in cells of 32 px, deepstack into three of the four layers."""
    ids = _tokenizer(folder, QWEN, end="<|im_end|>")
    start, image, end, video = (ids[name] for name in QWEN)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    text = {**TEXT, "vocab_size": len(ids), "head_dim": 32, "rope_parameters": rope}
    vision = {
        **{"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": WIDTH},
        **{"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2]},
    }
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        vision_start_token_id=start,
        image_token_id=image,
        vision_end_token_id=end,
        video_token_id=video,
    )
    size = {"shortest_edge": 64 * 64, "longest_edge": 256 * 256}
    Qwen2VLImageProcessorPil(patch_size=16, merge_size=2, size=size).save_pretrained(folder)
    return _save(folder, config, Qwen3VLForConditionalGeneration)


def internvl(folder: Path) -> Path:
    """InternVL: every picture a square of 4 x 4 cells, though its settings ask for tiles, as some do."""
    ids = _tokenizer(folder, INTERN, end="<|im_end|>")
    text = Qwen2Config(**TEXT, vocab_size=len(ids))
    vision = InternVLVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=56, patch_size=7
    )
    config = InternVLConfig(text_config=text, vision_config=vision, image_token_id=ids["<IMG_CONTEXT>"])
    GotOcr2ImageProcessorPil(size={"height": 56, "width": 56}, crop_to_patches=True).save_pretrained(folder)
    return _save(folder, config, InternVLForConditionalGeneration)


def perception_lm(folder: Path, *, timm: bool = False) -> Path:
    """PerceptionLM, whose vision part is timm's; without `timm` one of CLIP's stands in its place."""
    if not timm and Version(transformers.__version__) < Version("5.20"):
        pytest.skip("before 5.20, transformers builds a vision part of timm whatever the config says")
    ids = _tokenizer(folder, PERCEPTION, end="<|eot_id|>", start="<|begin_of_text|>")
    clip = CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=56, patch_size=7
    )
    clip.model_args = {"embed_dim": 32}  # type: ignore[attr-defined]
    config = PerceptionLMConfig(
        text_config=LlamaConfig(**TEXT, vocab_size=len(ids)),
        vision_config=clip,
        projector_pooling_ratio=2,
        image_token_id=ids["<|image|>"],
        video_token_id=ids["<|video|>"],
    )
    processor = {"image_processor_type": "PerceptionLMImageProcessorFast", "tile_size": 56, "resample": 3}
    halves = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_normalize": True, "do_rescale": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | halves))
    _save(folder, config, PerceptionLMForConditionalGeneration)
    if timm:
        described = json.loads((folder / "config.json").read_text())
        described["vision_config"] = {
            "model_type": "timm_wrapper",
            "architecture": "vit_pe_lang_large_patch14_448",
            "model_args": {"embed_dim": 32},
        }
        (folder / "config.json").write_text(json.dumps(described))
    return folder


def _tokenizer(folder: Path, special: tuple[str, ...], *, end: str, start: str | None = None) -> dict[str, int]:
    """A byte-level BPE tokenizer trained on the spot; returns its vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    names = [end, *special, *([start] if start else [])]
    trainer = trainers.BpeTrainer(
        vocab_size=320 + len(names),
        special_tokens=names,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if start is not None:
        tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single=f"{start} $A", special_tokens=[(start, tokenizer.token_to_id(start))]
        )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, model_max_length=400).save_pretrained(folder)
    return tokenizer.get_vocab()


def _save(folder: Path, config: object, build: Callable[..., PreTrainedModel]) -> Path:
    """Random weights so large that every part of the model shows in its states."""
    torch.manual_seed(0)
    model = build(config)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if "position" not in name else 0.2)
        if parameter.ndim == 1 and name.endswith("weight"):
            nn.init.normal_(parameter, mean=1.0, std=0.1)
    model.save_pretrained(folder)
    return folder
