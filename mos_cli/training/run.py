"""A training run from recipe to bundle: gathers the parts, trains, draws samples on the way, exports the result.

Shapes: B batch, C channels, H x W a picture's size.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from mos_cli.runtime.bundles import Bundle, load_tower_spec, write_index
from mos_cli.runtime.files import atomic_write
from mos_cli.runtime.outputs import png
from mos_cli.runtime.sheet import contact_sheet
from mos_cli.runtime.sources import fetch_tower
from mos_cli.sampling.sampler import NEGATIVE, POSITIVE, Guidance, sample
from mos_cli.towers.autoencoder import to_image
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
    """Draws the recipe's sample prompts with the averaged weights, each from the noise of its place in the list."""
    recipe, understanding, device = trainer.recipe, trainer.batches.understanding, trainer.device
    defaults, (width, height) = recipe.bundle.defaults, recipe.bundle.canvas.native
    tower = trainer.averaged_tower()
    scheduler = FlowMatchEulerDiscreteScheduler()
    drawn = []
    with trainer.accelerator.autocast():
        banks = {}
        for index, prompt in enumerate(recipe.train.sample_prompts):
            for branch, text in {POSITIVE: prompt, NEGATIVE: ""}.items():
                banks[branch] = tower.read(understanding.read([text]).states_BTMS.to(device))
            noise = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(index)).to(device)
            guidance = Guidance(defaults.cfg, defaults.cfg_interval)
            picture = sample(tower, noise, banks, steps=defaults.steps, guidance=guidance, scheduler=scheduler)
            drawn.append((to_image(picture), prompt))
    path = trainer.folder / "samples" / f"{trainer.step:06d}.png"
    atomic_write(path, png(contact_sheet(drawn), None), overwrite=True)
