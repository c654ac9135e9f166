"""A training run from recipe to bundle: gathers the parts, trains, draws samples on the way, exports the result.

Shapes: B batch, C channels, H x W a picture's size.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from mos_cli.runtime.bundles import Bundle, write_index
from mos_cli.runtime.files import atomic_write
from mos_cli.runtime.outputs import png
from mos_cli.runtime.sheet import contact_sheet
from mos_cli.sampling.sampler import NEGATIVE, POSITIVE, Guidance, sample
from mos_cli.towers.autoencoder import Pixels, to_image
from mos_cli.towers.understanding import UnderstandingTower
from mos_cli.training.art.file import load_art
from mos_cli.training.batches import Batches, Share, Source
from mos_cli.training.captioned import load_captioned, to_device
from mos_cli.training.launch import start_accelerator
from mos_cli.training.loop import Metrics, Trainer
from mos_cli.training.recipe import CaptionedTable, DataTable, TrainRecipe
from mos_cli.training.references import find_autoencoder, find_understanding
from mos_cli.training.scenes.compositor import Compositor
from mos_cli.training.scenes.layout import Scene
from mos_cli.training.scenes.vocabulary import load_vocabulary
from mos_cli.training.scenes.writer import SceneWriter
from mos_cli.training.stages import course


@dataclass(frozen=True)
class ScenePicker:
    """Scenes as a source of pictures: they look the same on every canvas."""

    writer: SceneWriter

    def __call__(self, random: Random, canvas: int) -> tuple[Scene, str]:
        return self.writer.write(random)


def prepare(recipe: TrainRecipe, art: Path, folder: Path) -> Trainer:
    """A run in `folder`, from its checkpoint if there is one, ready to go on.

    Raises:
        InputError: the data or the checkpoint is not there, damaged, or does not fit the recipe.
        ModelError: the understanding tower or the autoencoder cannot be had.
        UsageError: the recipe cannot be run here.
    """
    accelerator = start_accelerator(recipe.train, folder)
    device, plan = accelerator.device, course(recipe)
    with accelerator.local_main_process_first():
        _, tower = find_understanding(recipe.understanding)
        autoencoder = find_autoencoder(recipe.autoencoder, device)
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    understanding = UnderstandingTower(tower, dtype=dtype, device=str(device))
    share = Share(accelerator.process_index, accelerator.num_processes)
    sources: dict[str, Source] = {}
    for stage in plan.stages:
        key = stage.data.model_dump_json()
        if key not in sources:
            sources[key] = find_source(stage.data, art, device)
    in_order = tuple(sources[stage.data.model_dump_json()] for stage in plan.stages)
    batches = Batches(plan, recipe.train, in_order, understanding, autoencoder, device, share)
    return Trainer(recipe, batches, folder, accelerator)


def find_source(data: DataTable | CaptionedTable, art: Path, device: torch.device) -> Source:
    """Where a stage's pictures come from, with the sprites of scenes on the device; raises InputError."""
    if isinstance(data, CaptionedTable):
        captioned = load_captioned(Path(data.path).expanduser())
        return Source(captioned.pick, lambda pictures, _canvas: to_device(pictures, device))
    vocabulary = load_vocabulary(load_art(art), data)
    compositor = Compositor(vocabulary.sprites_VHW4.to(device))
    return Source(ScenePicker(SceneWriter(vocabulary)), compositor.draw)


def train(recipe: TrainRecipe, art: Path, folder: Path, log: Callable[[Metrics], None]) -> Trainer:
    """Runs a recipe in `folder`; samples go to `folder`/samples. Raises as `prepare` does."""
    trainer = prepare(recipe, art, folder)
    trainer.run(log, draw_samples)
    return trainer


def export(trainer: Trainer, folder: Path) -> Bundle | None:
    """Writes the averaged weights as a bundle, in bfloat16; a card.md already in `folder` is kept and listed.

    All processes call it; the main one writes the bundle and returns it.
    """
    recipe, tower = trainer.recipe, trainer.averaged_tower()
    if not trainer.accelerator.is_main_process:
        return None
    tower.bfloat16().save_pretrained(folder / "generation")
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    if not isinstance(trainer.batches.autoencoder, Pixels):
        trainer.batches.autoencoder.save_pretrained(folder / "autoencoder")
    (folder / "recipe.json").write_text(json.dumps(recipe.model_dump(), indent=2) + "\n", encoding="utf-8")
    spec, _ = find_understanding(recipe.understanding)
    return write_index(folder, understanding=spec, **recipe.bundle.model_dump())


def draw_samples(trainer: Trainer) -> None:
    """Draws the recipe's sample prompts with the averaged weights, each from the noise of its place in the list.

    They are as large as the canvas of the stage at hand. All processes call it; the main one draws.
    """
    tower = trainer.averaged_tower()
    if trainer.accelerator.is_main_process:
        _draw_samples(trainer, tower)
    trainer.accelerator.wait_for_everyone()


def _draw_samples(trainer: Trainer, tower: torch.nn.Module) -> None:
    recipe, device, autoencoder = trainer.recipe, trainer.device, trainer.batches.autoencoder
    defaults, side = recipe.bundle.defaults, trainer.course.stage_at(trainer.step - 1).canvas // autoencoder.factor
    scheduler, drawn = FlowMatchEulerDiscreteScheduler(), []
    precision = torch.autocast(device.type, torch.bfloat16, enabled=recipe.train.precision == "bf16")
    with torch.no_grad(), precision:
        for index, prompt in enumerate(recipe.train.sample_prompts):
            banks = {
                branch: tower.read(trainer.batches.understanding.read([text]).states_BTMS.to(device))  # type: ignore[operator]
                for branch, text in {POSITIVE: prompt, NEGATIVE: ""}.items()
            }
            noise = torch.randn(1, autoencoder.channels, side, side, generator=torch.Generator().manual_seed(index)).to(
                device
            )
            guidance = Guidance(defaults.cfg, defaults.cfg_interval)
            z = sample(tower, noise, banks, steps=defaults.steps, guidance=guidance, scheduler=scheduler)
            drawn.append((to_image(autoencoder.decode(z)), prompt))
    path = trainer.folder / "samples" / f"{trainer.step:06d}.png"
    atomic_write(path, png(contact_sheet(drawn), None), overwrite=True)
