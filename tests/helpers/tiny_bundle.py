"""Bundles and towers with random weights, small enough for a test."""

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mos_cli.bundles.bundle import Bundle, write_index
from mos_cli.bundles.specs import Canvas, Defaults, FolderSource, TowerSpec
from mos_cli.towers.generation import GenerationTower
from mos_cli.utils.files import sha256_of

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "an", "red", "green", "apple", "dog", "cat", "##s"]


def save_tokenizer(folder: Path, *, marks: bool) -> None:
    """A word-piece tokenizer; with `marks` it puts [CLS] and [SEP] around a prompt, as encoders do."""
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    if marks:
        tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"} if marks else {"eos_token": "[SEP]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=24, **special).save_pretrained(folder)


def tower_spec(folder: Path) -> TowerSpec:
    """Describes the small tower in `folder`, which is also where it comes from."""
    return TowerSpec(
        schema="mos-tower/1",
        name="tiny-encoder",
        license="Apache-2.0",
        description="random",
        format="safetensors",
        files={path.name: sha256_of(path) for path in sorted(folder.iterdir())},
        size=1,
        sources=(FolderSource(kind="folder", path=str(folder)),),
    )


def randomised(tower: GenerationTower) -> GenerationTower:
    """Gives every parameter a random value: a fresh tower draws grey whatever it reads."""
    torch.manual_seed(1)
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return tower.eval()


def write_bundle(folder: Path, encoder: Path, **seeing: Any) -> Bundle:
    """A bundle named as its folder that draws random 32 px pictures; what it sees with is the caller's to give."""
    sizes = {"width": 32, "depth": 3, "heads": 2, "hidden": 48, "router_width": 32, "router_heads": 2}
    image_encoder, states = seeing.get("image_encoder"), seeing.get("states", (4, 32))
    vision = {"image_state_widths": image_encoder.widths} if image_encoder else {"has_vision": "edits" in seeing}
    tower = GenerationTower(**sizes, **vision, states_layers=states[0], states_width=states[1])
    randomised(tower).save_pretrained(folder / "generation")
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    if image_encoder:
        image_encoder.save_pretrained(folder / "image_encoder")
    return write_index(
        folder,
        name=folder.name,
        description="random weights",
        license="Apache-2.0",
        understanding=tower_spec(encoder),
        canvas=Canvas(native=(32, 32), multiple=8, min=16, max=64),
        defaults=Defaults(steps=3, cfg=2.0, cfg_interval=(0.0, 1.0)),
        edits=seeing.get("edits"),
    )
