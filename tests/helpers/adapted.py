"""Recipes for tiny base models, plain pipelines of diffusers, and what enters the blocks as text."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.models.t5gemma.configuration_t5gemma import T5GemmaModuleConfig
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

from mos_cli.adapters.adapter import Adapter
from mos_cli.adapters.facts import TextSite, replaced
from mos_cli.adapters.pipeline import AdapterPipeline
from mos_cli.bundles.adapters import RouterShape
from mos_cli.config.recipe import Recipe, make_recipe
from mos_cli.images.inputs import Inputs, describe_edit
from mos_cli.images.pictures import Picture
from mos_cli.towers.layers import TokenGrid

PROMPT = "a red fox and a blue dog"
SIZE = 64


def recipe_of(pipeline: AdapterPipeline, **changes: Any) -> Recipe:
    """A recipe for a tiny base model, 64 x 64 pixels and three steps."""
    settings = {
        "prompt": PROMPT,
        "model": pipeline.bundle.index.name,
        "seed": 5,
        "steps": 3,
        "cfg": 1.0,
        "cfg_interval": (0.0, 1.0),
        "width": SIZE,
        "height": SIZE,
        "precision": pipeline.precision,
    }
    return make_recipe(**settings | changes)


def random_picture(seed: int, size: tuple[int, int] = (SIZE, SIZE)) -> Picture:
    levels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Picture(Image.fromarray(levels))


def edit_of(pipeline: AdapterPipeline, inputs: Inputs, *, strength: float = 1.0, **changes: Any) -> Recipe:
    """A recipe of an edit at the size of its picture."""
    size = inputs.pictures[0].image.size
    edit = describe_edit(inputs, canvas=size, image_cfg=1.0, strength=strength)
    return recipe_of(pipeline, width=size[0], height=size[1], edit=edit, **changes)


def plain_pipeline(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline as diffusers itself loads it."""
    given: dict[str, Any] = {}
    if "PRX" in (folder / "model_index.json").read_text():
        # Transformers reads the config of this encoder alone as that of a whole T5Gemma.
        config = T5GemmaModuleConfig.from_pretrained(folder / "text_encoder")
        encoder = T5GemmaEncoder.from_pretrained(folder / "text_encoder", config=config, dtype=dtype)
        given["text_encoder"] = encoder
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True, **given)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def plain_arguments(name: str, recipe: Recipe) -> dict[str, Any]:
    """How diffusers' pipeline is called for a recipe."""
    arguments: dict[str, Any] = {
        "prompt": recipe.prompt,
        "width": recipe.width,
        "height": recipe.height,
        "num_inference_steps": recipe.steps,
        "generator": torch.Generator().manual_seed(recipe.seed),
        "guidance_scale": recipe.cfg - 1 if name == "z-image" else recipe.cfg,
    }
    if name == "prx":
        arguments["use_resolution_binning"] = False
    if not name.startswith("klein"):
        arguments["negative_prompt"] = recipe.negative
    return arguments


def trained_adapter(pipeline: AdapterPipeline, gates: float | Tensor, seed: int = 3) -> Adapter:
    """An adapter with a random router that chooses clearly, and these gates."""
    from mos_cli.adapters.loading import patch_values

    adapter = Adapter(
        RouterShape(width=32, depth=2, heads=2),
        states_width=pipeline.pipe.text_encoder.config.hidden_size,
        patch_values=patch_values(pipeline.pipe.transformer),
        layers=pipeline.layers,
        blocks=pipeline.blocks,
        slots=len(pipeline.own_layers),
    )
    adapter.initialise(seed)
    adapter.router.head.weight.data *= 100
    adapter.gates_JZ.data.copy_(torch.as_tensor(gates).expand_as(adapter.gates_JZ))
    return adapter.eval().requires_grad_(False)


@contextmanager
def with_adapter(pipeline: AdapterPipeline, adapter: Adapter | None) -> Iterator[None]:
    before, pipeline.adapter = pipeline.adapter, adapter
    try:
        yield
    finally:
        pipeline.adapter = before


@dataclass
class BlockText:
    """The sequences that blocks were given and gave back, per pass of the transformer and block, each [B, L, D]."""

    entered: list[list[Tensor]]
    left: list[list[Tensor]]


@contextmanager
def recorded_text(pipeline: AdapterPipeline) -> Iterator[BlockText]:
    """Records what enters and leaves the blocks. `forward` is called after all hooks, so this is what is computed."""
    recorded = BlockText([], [])
    sites = [
        (site, block) for site in pipeline.base.sites for block in pipeline.pipe.transformer.get_submodule(site.blocks)
    ]

    def wrapped(number: int, site: TextSite, forward: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if number == 0:
                recorded.entered.append([])
                recorded.left.append([])
            given = kwargs[site.argument] if site.argument in kwargs else args[site.position]
            recorded.entered[-1].append(given.clone())
            output = forward(*args, **kwargs)
            text = output[0] if isinstance(output, tuple) else output
            recorded.left[-1].append(text.clone())
            return output

        return call

    with ExitStack() as stack:
        for number, (site, block) in enumerate(sites):
            stack.enter_context(replaced(block, "forward", wrapped(number, site, block.forward)))
        yield recorded


def text_of(pipeline: AdapterPipeline, sequence_LD: Tensor, site: TextSite, length: int) -> Tensor:
    """The text in a sequence of a block, [T, D]."""
    start = pipeline.base.text_start(TokenGrid(SIZE // 16, SIZE // 16)) if site.joint == "tail" else 0
    return sequence_LD[start : start + length]
