"""Samples of a training run, drawn as a sheet.

Shapes: B = 1 picture, C channels, H x W the latent's size.
"""

from random import Random

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor

from mos_cli.images.outputs import png
from mos_cli.images.sheets import contact_sheet
from mos_cli.inference.edit_canvas import EditConditioning
from mos_cli.inference.latents import encode_branches, generate_latents
from mos_cli.inference.prompt_encoding import PromptEncoder
from mos_cli.sampling.guidance import Guidance
from mos_cli.sampling.sampler import InitialLatent, make_sigmas
from mos_cli.towers.autoencoder import to_image
from mos_cli.towers.generation import GenerationTower
from mos_cli.training.loop import Trainer
from mos_cli.utils.files import atomic_write
from mos_cli.utils.validation import DEFAULT_SOLVER

CAPTIONS = 8
"""The number of captions on a sheet, where the recipe has no prompts."""
EDITS = 8
"""The number of edits on a sheet, in stages with edits."""


def draw_samples(trainer: Trainer) -> None:
    """Draws the recipe's sample prompts with the averaged weights; the seed of each is its index.

    Edits follow in pairs: the picture before, and the drawn one. Pictures have the size of the present stage's canvas.
    All processes call it; the main one draws.
    """
    tower = trainer.averaged_tower()
    if trainer.accelerator.is_main_process:
        # In the precision of training.
        edits = _pick_edits(trainer)
        bfloat16 = trainer.recipe.train.precision == "bf16"
        with torch.no_grad(), torch.autocast(trainer.device.type, torch.bfloat16, enabled=bfloat16):
            drawn = [*_prompts(trainer, tower), *_edits(trainer, tower, edits)]
        path = trainer.folder / "samples" / f"{trainer.step:06d}.png"
        atomic_write(path, png(contact_sheet(drawn), None), overwrite=True)
        trainer.journal.show(drawn, trainer.step)
    trainer.accelerator.wait_for_everyone()


def _prompts(trainer: Trainer, tower: GenerationTower) -> list[tuple[Image.Image, str]]:
    return [
        (_draw(trainer, tower, prompt, None, index), prompt) for index, prompt in enumerate(_sample_prompts(trainer))
    ]


def _sample_prompts(trainer: Trainer) -> tuple[str, ...]:
    """Those of the recipe, or captions from all over the data; none of a stage that only trains edits."""
    if trainer.recipe.train.sample_prompts:
        return trainer.recipe.train.sample_prompts
    captions, stage = trainer.batches.captions, trainer.curriculum.stage_at(trainer.step - 1)
    if not captions and stage.edits < 1:
        source = trainer.batches.sources[stage.name, False]
        captions = tuple(source.pick(Random(f"sample/{index}"), stage.canvas)[1] for index in range(CAPTIONS))
    return captions[:: max(1, len(captions) // CAPTIONS)][:CAPTIONS]


def _pick_edits(trainer: Trainer) -> list[tuple[Tensor, str]]:
    """Pictures to edit and instructions, the same at every step."""
    stage, picked = trainer.curriculum.stage_at(trainer.step - 1), []
    # Scenes that are mixed in are no one's own edits.
    for index in range(EDITS if stage.data.edits else 0):
        source = trainer.batches.sources[stage.name, True]
        edit, instruction = source.pick(Random(f"sample/{index}"), stage.canvas)
        picked.append((source.draw(source.collate([edit]), stage.canvas)[:, 1], instruction))
    return picked


def _edits(trainer: Trainer, tower: GenerationTower, edits: list[tuple[Tensor, str]]) -> list[tuple[Image.Image, str]]:
    drawn = []
    for index, (before, instruction) in enumerate(edits):
        drawn += [(to_image(before), ""), (_draw(trainer, tower, instruction, before, index), instruction)]
    return drawn


def _draw(trainer: Trainer, tower: GenerationTower, prompt: str, before: Tensor | None, seed: int) -> Image.Image:
    batches, bundle, autoencoder = trainer.batches, trainer.recipe.bundle, trainer.batches.autoencoder
    prompt_encoder = PromptEncoder(batches.understanding, batches.image_encoder, tower, bundle.name)
    side = trainer.curriculum.stage_at(trainer.step - 1).canvas
    if before is None or bundle.edits is None:
        defaults, guidance, conditioning = (
            bundle.defaults,
            Guidance.with_network(tower.guidance_max, bundle.defaults.cfg, bundle.defaults.cfg_interval),
            None,
        )
    else:
        latent, defaults = autoencoder.encode(before), bundle.edits
        guidance = Guidance.with_network(tower.guidance_max, defaults.cfg, defaults.cfg_interval, defaults.image_cfg)
        conditioning = EditConditioning((before,), (latent,), InitialLatent(latent))
    z = generate_latents(
        tower,
        [encode_branches(prompt_encoder, prompt, "", guidance, conditioning)],
        autoencoder,
        trainer.device,
        size=(side, side),
        seeds=[seed],
        sigmas=make_sigmas(FlowMatchEulerDiscreteScheduler(), defaults.steps),
        solver=DEFAULT_SOLVER,
        guidance=guidance,
        batched_guidance=True,
    )
    return to_image(autoencoder.decode(z))
