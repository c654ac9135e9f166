"""A training run from recipe to bundle: loads the parts, trains, draws samples, and exports the result.

Shapes: B batch, C channels, H x W a picture's size.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from mos_cli.bundles.bundle import Bundle, write_index
from mos_cli.datasets.art.file import load_art
from mos_cli.datasets.captioned import load_captioned, to_device
from mos_cli.datasets.scenes.compositor import Compositor
from mos_cli.datasets.scenes.edits import Edit, EditWriter
from mos_cli.datasets.scenes.layout import Scene
from mos_cli.datasets.scenes.vocabulary import Vocabulary, load_vocabulary
from mos_cli.datasets.scenes.writer import SceneWriter
from mos_cli.datasets.tables import CaptionedTable, DataTable
from mos_cli.errors import InputError, UsageError
from mos_cli.towers.autoencoder import Pixels
from mos_cli.towers.vision_language import VisionLanguageTower, load_understanding
from mos_cli.training.batches import Batches, Draw, Kind, Share, Source
from mos_cli.training.launch import start_accelerator
from mos_cli.training.loop import Metrics, Trainer
from mos_cli.training.recipe import TrainRecipe
from mos_cli.training.references import find_autoencoder, find_image_encoder, find_understanding
from mos_cli.training.samples import draw_samples
from mos_cli.training.stages import curriculum
from mos_cli.utils.files import expand
from mos_cli.utils.threads import AdaptiveThreads

THREADS_INTERVAL = 60.0
"""Seconds between two changes of the number of CPU threads: for each number the network is compiled anew."""


@dataclass(frozen=True)
class ScenePicker:
    """Picks scenes, which do not depend on the canvas."""

    writer: SceneWriter

    def __call__(self, random: Random, canvas: int) -> tuple[Scene, str]:
        return self.writer.write(random)


@dataclass(frozen=True)
class EditPicker:
    """Picks edits of scenes, with instructions."""

    writer: EditWriter

    def __call__(self, random: Random, canvas: int) -> tuple[Edit, str]:
        edit = self.writer.write(random)
        return edit, edit.instruction


def prepare(recipe: TrainRecipe, art: Path, folder: Path) -> Trainer:
    """Prepares a run in `folder`, from its checkpoint if there is one.

    Raises:
        InputError: the data or the checkpoint is missing, damaged, or does not fit the recipe.
        ModelError: the understanding tower or the autoencoder cannot be fetched or loaded.
        UsageError: the recipe does not fit the models, or cannot be run here.
    """
    plan = curriculum(recipe)
    accelerator = start_accelerator(recipe.train, folder, unused_parts=recipe.bundle.edits is not None)
    device = accelerator.device
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    with accelerator.local_main_process_first():
        _, tower = find_understanding(recipe.understanding)
        autoencoder = find_autoencoder(recipe.autoencoder, device)
        understanding = load_understanding(tower, dtype=dtype, device=str(device))
        image_encoder = (
            None if recipe.image_encoder is None else find_image_encoder(understanding.layers, device, dtype)
        )
    widths = () if image_encoder is None else image_encoder.widths
    if tuple(recipe.generation.get("image_state_widths", ())) != widths:
        raise UsageError(f"[generation] image_state_widths must be {list(widths)}, the widths of the image encoder")
    if recipe.generation.get("has_vision") and not isinstance(understanding, VisionLanguageTower):
        raise UsageError(
            f"[generation] has_vision = true needs an understanding tower with vision: {recipe.understanding} has none"
        )
    share = Share(accelerator.process_index, accelerator.num_processes)
    found: dict[str, tuple[Source, ...]] = {}
    sources: dict[Kind, Source] = {}
    for stage in plan.stages:
        key = stage.data.model_dump_json()
        if key not in found:
            found[key] = find_sources(stage.data, art, device)
        sources |= {(stage.name, index == 1): source for index, source in enumerate(found[key])}
    batches = Batches(plan, recipe.train, sources, understanding, autoencoder, device, share, image_encoder)
    return Trainer(recipe, batches, folder, accelerator)


def find_sources(data: DataTable | CaptionedTable, art: Path, device: torch.device) -> tuple[Source, ...]:
    """The sources of pictures and of edits for a `[data]` table; raises InputError if data is missing or invalid."""
    if isinstance(data, CaptionedTable):
        return _captioned_sources(data, device)
    vocabulary = load_vocabulary(load_art(art), data)
    draw = Compositor(vocabulary.sprites_VHW4.to(device)).draw
    return Source(ScenePicker(SceneWriter(vocabulary)), draw), edit_source(vocabulary, draw)


def _remove_path(config: Path) -> None:
    """Removes the path that diffusers stores in a config: a bundle contains no paths of a machine."""
    fields = json.loads(config.read_text(encoding="utf-8"))
    fields.pop("_name_or_path", None)
    config.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _captioned_sources(data: CaptionedTable, device: torch.device) -> tuple[Source, ...]:
    captioned = load_captioned(expand(data.path))
    for examples, what, needed in (
        (captioned.pictures, "pictures that are no edits", data.edits < 1),
        (captioned.edits, "edits, pictures with a .before beside them", data.edits > 0),
    ):
        if needed and not examples.examples:
            raise InputError(f"{data.path} has no {what}: change [data] edits, now {data.edits:g}")

    def draw(picked: list[np.ndarray], _canvas: int) -> torch.Tensor:
        return to_device(picked, device)

    def draw_before(picked: list[np.ndarray], _canvas: int) -> torch.Tensor:
        return to_device(picked, device, which=1)

    return Source(captioned.pictures.pick, draw), Source(captioned.edits.pick, draw, draw_before)


def edit_source(vocabulary: Vocabulary, draw: Draw) -> Source:
    """The source of edits of scenes with the words of a vocabulary."""
    return Source(
        EditPicker(EditWriter(vocabulary)),
        draw=lambda edits, canvas: draw([edit.after for edit in edits], canvas),
        draw_before=lambda edits, canvas: draw([edit.before for edit in edits], canvas),
    )


def train(recipe: TrainRecipe, art: Path, folder: Path, log: Callable[[Metrics], None]) -> Trainer:
    """Runs a recipe in `folder`; samples go to `folder`/samples. Raises as `prepare` does."""
    adapt_threads = AdaptiveThreads(THREADS_INTERVAL)
    trainer = prepare(recipe, art, folder)
    if trainer.device.type == "cpu":
        trainer.run(log, draw_samples, adapt_threads)
    else:
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
        _remove_path(folder / "autoencoder" / "config.json")
    if trainer.batches.image_encoder is not None:
        trainer.batches.image_encoder.bfloat16().save_pretrained(folder / "image_encoder")
    (folder / "recipe.json").write_text(json.dumps(recipe.model_dump(), indent=2) + "\n", encoding="utf-8")
    spec, _ = find_understanding(recipe.understanding)
    return write_index(folder, understanding=spec, **recipe.bundle.model_dump())
