"""From prompts to latents: encoded branches, noise, and the denoising loop, for pictures and for samples of a training.

Shapes: P pictures, C channels, H x W the latent's size.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mos_cli.inference.edit_canvas import EditConditioning
from mos_cli.inference.prompt_encoding import PromptEncoder, PromptEncoding
from mos_cli.sampling.guidance import NEGATIVE, POSITIVE, WITHOUT_IMAGE, Guidance, Predictor
from mos_cli.sampling.sampler import sample_batch
from mos_cli.towers.autoencoder import Autoencoder


def encode_branches(
    prompt_encoder: PromptEncoder,
    prompt: str,
    negative: str,
    guidance: Guidance,
    conditioning: EditConditioning | None = None,
) -> dict[str, PromptEncoding]:
    """The encoded prompt of each guidance branch; in an edit with its pictures, except in the branch without them."""
    prompts = {POSITIVE: prompt, NEGATIVE: negative, WITHOUT_IMAGE: negative}
    branches = guidance.branches(guidance.interval[0])
    encodings = {branch: prompt_encoder.encode(prompts[branch]) for branch in branches}
    if conditioning is None:
        return encodings
    seeing = {branch: encoding for branch, encoding in encodings.items() if branch != WITHOUT_IMAGE}
    return encodings | prompt_encoder.encode_with_images(seeing, conditioning.pictures, conditioning.references)


def make_noise(autoencoder: Autoencoder, size: tuple[int, int], seed: int, device: torch.device) -> Tensor:
    """The noise z_1 of a picture of `size` (width, height) in pixels, [1, C, H, W].

    It is drawn on the CPU, so that it does not depend on the device.
    """
    width, height = (side // autoencoder.factor for side in size)
    shape = (1, autoencoder.channels, height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def generate_latents(
    tower: Predictor,
    encodings: Sequence[Mapping[str, PromptEncoding]],
    autoencoder: Autoencoder,
    device: torch.device,
    *,
    size: tuple[int, int],
    seeds: Sequence[int],
    **sampling: Any,
) -> Tensor:
    """The latents of one or several pictures, [P, C, H, W], from their seeds and the encoded prompts of their branches.

    Args:
        size: width and height in pixels.
        sampling: the other arguments of `sample_batch`.
    """
    banks = [{branch: encoding.bank for branch, encoding in each.items()} for each in encodings]
    noise_PCHW = torch.cat([make_noise(autoencoder, size, seed, device) for seed in seeds])
    return sample_batch(tower, noise_PCHW, banks, **sampling)
