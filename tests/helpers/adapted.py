"""Recipes for tiny base models, plain pipelines of diffusers, and what enters the blocks as text.

Shapes: S steps, J blocks, Q tokens of the prompt, K kept layers, T text tokens, L tokens of a sequence, D width of the
transformer.
"""

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
from mos_cli.bundles.adapters import RouterShape, read_adapter
from mos_cli.bundles.loras import LoraFile
from mos_cli.config.recipe import Recipe, make_recipe
from mos_cli.images.inputs import Inputs, describe_edit
from mos_cli.images.pictures import Picture
from mos_cli.planning.memory import Setting
from mos_cli.routing.trace import load_recording
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


def trainable(folder: Path, quant: Any = "none", loras: tuple[LoraFile, ...] = ()) -> AdapterPipeline:
    """A pipeline of the test's own, whose transformer may be put into training."""
    precision, setting = "fp32" if quant == "none" else "bf16", Setting("none", quant)
    bundle, device = read_adapter(folder), torch.device("cpu")
    return AdapterPipeline(bundle, device=device, precision=precision, setting=setting, loras=loras)  # type: ignore[arg-type]


def random_picture(seed: int, size: tuple[int, int] = (SIZE, SIZE)) -> Picture:
    levels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Picture(Image.fromarray(levels))


def edit_of(pipeline: AdapterPipeline, inputs: Inputs, *, strength: float = 1.0, **changes: Any) -> Recipe:
    """A recipe of an edit at the size of its picture."""
    size = inputs.pictures[0].image.size
    edit = describe_edit(inputs, canvas=size, image_cfg=1.0, strength=strength)
    return recipe_of(pipeline, width=size[0], height=size[1], edit=edit, **changes)


def plain_pipeline(folder: Path, dtype: torch.dtype = torch.float32, beside: AdapterPipeline | None = None) -> Any:
    """The pipeline as diffusers itself loads it.

    Args:
        beside: a loaded one, whose transformer must have the same weights and is used: some CPUs round a product with
            one row by where in memory its weights begin.
    """
    given: dict[str, Any] = {}
    if "PRX" in (folder / "model_index.json").read_text():
        # Transformers reads the config of this encoder alone as that of a whole T5Gemma.
        config = T5GemmaModuleConfig.from_pretrained(folder / "text_encoder")
        encoder = T5GemmaEncoder.from_pretrained(folder / "text_encoder", config=config, dtype=dtype)
        given["text_encoder"] = encoder
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True, **given)
    pipe.set_progress_bar_config(disable=True)
    if beside is not None:
        loaded, own = (dict(each.transformer.named_parameters()) for each in (beside.pipe, pipe))
        assert loaded.keys() == own.keys()
        assert all(torch.equal(loaded[name], own[name]) for name in own)
        pipe.transformer = beside.pipe.transformer
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


def read_by_trace(pipeline: AdapterPipeline, files: Path, branch: str, prompt: str) -> Tensor:
    """What the blocks add to their text by the trace and the bank, [S, J, Q, D]; the trace is read from its files."""
    recording = load_recording(files)
    assert recording.routes is not None
    routes, bank = recording.routes[branch], pipeline.bank(pipeline.encode(prompt))
    assert routes.slots_SJTK is not None
    slots = len(pipeline.own_layers)
    own_Z = torch.tensor(pipeline.own_layers)
    ids, places, weights = (
        torch.from_numpy(array.copy()) for array in (routes.ids_SJTK, routes.slots_SJTK, routes.weights_SJTK)
    )
    ids, places, weights = ids.long(), places.long(), weights.float() * slots
    rows_QZMD = bank.rows_QZMD
    tokens_Q1 = torch.arange(rows_QZMD.shape[0])[:, None].expand(ids.shape[2:])
    read_SJQKD = rows_QZMD[tokens_Q1, places, ids] - rows_QZMD[tokens_Q1, places, own_Z[places]]
    return (weights[..., None] * read_SJQKD).sum(-2)


def check_read(pipeline: AdapterPipeline, blocks: BlockText, files: Path, branches: dict[str, str]) -> float:
    """Compares every block of every pass with what the trace tells; returns the largest change of a block's text."""
    base, sites = pipeline.base, [site for site in pipeline.base.sites for _ in blocks_of(pipeline, site)]
    names = list(base.rows) if base.rows and len(branches) > 1 else list(branches)
    largest = 0.0
    changes = {
        name: read_by_trace(pipeline, files, name, prompt) if pipeline.encode(prompt).tokens else None
        for name, prompt in branches.items()
    }
    for number, (entered, left) in enumerate(zip(blocks.entered, blocks.left, strict=True)):
        rows = names if len(entered[0]) > 1 else [names[number % len(names)]]
        step = number * len(rows) // len(names)
        for row, name in enumerate(rows):
            encoded = pipeline.encode(branches[name])
            places_Q, length = encoded.positions_Q, len(encoded.embeds_TE)
            plain_TD = base.first_text(pipeline.pipe.transformer, encoded.embeds_TE)
            for block, site in enumerate(sites):
                expected_TD = plain_TD.clone()
                if base.evolves and block:
                    expected_TD = text_of(pipeline, left[block - 1][row], sites[block - 1], length).clone()
                if (change := changes[name]) is not None:
                    before = change[step, block - 1] if base.evolves and block else 0.0
                    expected_TD[places_Q] += change[step, block] - before
                    largest = max(largest, change[step, block].abs().max().item())
                seen_TD = text_of(pipeline, entered[block][row], site, length)
                torch.testing.assert_close(seen_TD, expected_TD, rtol=1e-5, atol=1e-5)
    return largest


def blocks_of(pipeline: AdapterPipeline, site: TextSite) -> Any:
    return pipeline.pipe.transformer.get_submodule(site.blocks)
