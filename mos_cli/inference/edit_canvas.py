"""The pixels of an edit: from the pictures to the model's canvas, and back to their size.

Shapes: B = 1 picture, C channels, H x W the latent's size.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mos_cli.config.recipe import Recipe
from mos_cli.images.inputs import Inputs
from mos_cli.images.masks import composite, estimate_mask
from mos_cli.images.pictures import Fit
from mos_cli.sampling.sampler import InitialLatent
from mos_cli.towers.autoencoder import Autoencoder


@dataclass(frozen=True)
class EditConditioning:
    """The inputs of an edit on the canvas, as tensors."""

    pictures: tuple[Tensor, ...]
    """The pictures themselves, each [B, 3, height, width] in -1..1."""
    references: tuple[Tensor, ...]
    """Clean latents, each [B, C, H, W]."""
    initial: InitialLatent


def prepare_edit(inputs: Inputs, recipe: Recipe, autoencoder: Autoencoder, device: torch.device) -> EditConditioning:
    """Fits every picture to the recipe's canvas and encodes it."""
    assert recipe.edit is not None
    canvas = recipe.edit.canvas
    pictures = tuple(
        _tensor(Fit(picture.image.size, canvas).forward(picture.rgb)).to(device) * 2 - 1 for picture in inputs.pictures
    )
    references = tuple(autoencoder.encode(picture) for picture in pictures)
    mask = None
    if inputs.mask is not None:
        whole = _tensor(Fit(inputs.mask.size, canvas).forward(inputs.mask)).to(device)
        mask = F.adaptive_max_pool2d(whole, references[0].shape[-2:])
    return EditConditioning(pictures, references, InitialLatent(references[0], mask))


def restore_size(drawn: Image.Image, inputs: Inputs, recipe: Recipe) -> Image.Image:
    """The drawn picture at the size of the recipe.

    With `composite`, it has the source's pixels where it may not change; with `keep_alpha`, the source's transparency.
    """
    assert recipe.edit is not None
    source, canvas, size = inputs.pictures[0].image, recipe.edit.canvas, (recipe.width, recipe.height)
    fit = Fit(source.size, canvas)
    mapped = size == source.size
    after = fit.back(drawn) if mapped else drawn
    if recipe.edit.composite:
        after = _composite(inputs, drawn, after, fit, mapped=mapped)
    if recipe.edit.keep_alpha:
        alpha = source.getchannel("A")
        after = after.convert("RGB")
        after.putalpha(alpha if mapped else fit.forward(alpha))
    return after


def _composite(inputs: Inputs, drawn: Image.Image, after: Image.Image, fit: Fit, *, mapped: bool) -> Image.Image:
    """The source where it may not change, else `after`, which is `drawn` at the size of the result."""
    source = inputs.pictures[0]
    before = source.image if mapped else fit.forward(source.rgb)
    if inputs.mask is not None:
        mask = inputs.mask if mapped else fit.forward(inputs.mask)
    else:
        mask = estimate_mask(fit.forward(source.rgb), drawn)
        mask = fit.back(mask) if mapped else mask
    return composite(before, after, mask)


def _tensor(image: Image.Image) -> Tensor:
    """[1, channels, height, width] in 0..1."""
    levels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
    return levels.reshape(1, image.height, image.width, -1).permute(0, 3, 1, 2)
