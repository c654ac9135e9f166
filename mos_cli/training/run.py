"""A training run from recipe to bundle: gathers the parts, trains, draws samples on the way, exports the result.

Shapes: B batch, C channels, H x W a picture's size.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor

from mos_cli.runtime.bundles import Bundle, load_tower_spec, write_index
from mos_cli.runtime.sources import fetch_tower
from mos_cli.sampling.sampler import NEGATIVE, POSITIVE, Guidance, sample
from mos_cli.towers.understanding import UnderstandingTower
from mos_cli.training.art.file import load_art
from mos_cli.training.batches import Batches
from mos_cli.training.captions import SceneWriter
from mos_cli.training.loop import Metrics, Trainer
from mos_cli.training.recipe import TrainRecipe
from mos_cli.training.scenes import Compositor
from mos_cli.training.vocabulary import choose_words


def train(recipe: TrainRecipe, art: Path, folder: Path, log: Callable[[Metrics], None]) -> Trainer:
    """Runs a recipe in `folder`, from its checkpoint if there is one; samples go to `folder`/samples.

    Raises:
        InputError: the art file or the checkpoint does not fit the recipe.
        ModelError: the understanding tower cannot be had.
    """
    words, sprites = choose_words(load_art(art), recipe.data)
    understanding = UnderstandingTower(
        fetch_tower(load_tower_spec(recipe.understanding)),
        dtype=torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32,
    )
    batches = Batches(
        SceneWriter(words, recipe.data.styles, recipe.data.pairs),
        Compositor(sprites, canvas=recipe.bundle.canvas.native[0]),
        understanding,
        recipe.train,
    )
    trainer = Trainer(recipe, batches, folder)
    trainer.run(log, draw_samples)
    return trainer


def export(trainer: Trainer, folder: Path) -> Bundle:
    """Writes the averaged weights as a bundle, in bfloat16; a card.md already in `folder` is kept and listed."""
    recipe = trainer.recipe
    trainer.averaged_tower().bfloat16().save_pretrained(folder / "generation")
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    (folder / "recipe.json").write_text(json.dumps(recipe.model_dump(), indent=2) + "\n", encoding="utf-8")
    return write_index(folder, understanding=load_tower_spec(recipe.understanding), **recipe.bundle.model_dump())


def draw_samples(trainer: Trainer) -> None:
    """Draws the recipe's sample prompts with the averaged weights, from one fixed noise each."""
    recipe, understanding = trainer.recipe, trainer.batches.understanding
    defaults, (width, height) = recipe.bundle.defaults, recipe.bundle.canvas.native
    prompts = list(recipe.train.sample_prompts)
    tower = trainer.averaged_tower()
    generator = torch.Generator().manual_seed(recipe.train.seed)
    noise = torch.randn(len(prompts), recipe.generation["channels"], height, width, generator=generator)
    with torch.no_grad(), trainer.accelerator.autocast():
        banks = {}
        for branch, texts in {POSITIVE: prompts, NEGATIVE: [""] * len(prompts)}.items():
            reading = understanding.read(texts)
            banks[branch] = tower.read(reading.states_BTMS, reading.mask_BT)
        pictures = sample(
            tower,
            noise,
            banks,
            steps=defaults.steps,
            guidance=Guidance(defaults.cfg, defaults.cfg_interval),
            scheduler=FlowMatchEulerDiscreteScheduler(),
        )
    samples = trainer.folder / "samples"
    samples.mkdir(exist_ok=True)
    _grid(pictures, columns=8).save(samples / f"{trainer.step:06d}.png")


def _grid(pictures_B3HW: Tensor, columns: int) -> Image.Image:
    rows = [torch.cat(list(row), dim=-1) for row in pictures_B3HW.split(columns)]
    rows = [torch.nn.functional.pad(row, (0, rows[0].shape[-1] - row.shape[-1])) for row in rows]
    sheet = (torch.cat(rows, dim=-2).clamp(-1, 1) + 1) * 127.5
    return Image.fromarray(sheet.round().to(torch.uint8).permute(1, 2, 0).numpy())
