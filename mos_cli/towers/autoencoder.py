"""Where the generation tower works: in pixels, or in the latents of any diffusers autoencoder.

Shapes: B batch, C channels of a latent, H x W its size; pictures are [B, 3, height, width] in -1..1.
"""

from pathlib import Path
from typing import Protocol

import torch
from diffusers.models.auto_model import AutoModel
from PIL import Image
from torch import Tensor


class Autoencoder(Protocol):
    """Pictures to latents and back. `factor` is the number of picture pixels along a latent pixel."""

    channels: int
    factor: int

    def encode(self, pictures: Tensor) -> Tensor: ...

    def decode(self, z_BCHW: Tensor) -> Tensor: ...


class Pixels:
    """No autoencoder: latents are the pixels."""

    channels = 3
    factor = 1

    def encode(self, pictures: Tensor) -> Tensor:
        return pictures

    def decode(self, z_BCHW: Tensor) -> Tensor:
        return z_BCHW


class Latents:
    """A diffusers autoencoder (KL, tiny, deep-compression, ...), scaled as its config says.

    Args:
        folder: the autoencoder in diffusers' format.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype, device: str = "cpu") -> None:
        self.model = AutoModel.from_pretrained(str(folder), torch_dtype=dtype, use_safetensors=True).to(device)
        self.model.eval().requires_grad_(False)
        config = dict(self.model.config)
        self.channels: int = config["latent_channels"]
        stages = config.get("encoder_block_out_channels") or config["block_out_channels"]
        self.factor = 2 ** (len(stages) - 1)
        self.scale: float = config["scaling_factor"]
        self.shift: float = config.get("shift_factor") or 0.0

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        encoded = self.model.encode(pictures.to(self.model.dtype), return_dict=False)[0]
        # Variational ones give a distribution; its mode keeps encoding deterministic.
        latents = encoded if isinstance(encoded, Tensor) else encoded.mode()
        return (latents.float() - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, z_BCHW: Tensor) -> Tensor:
        z = z_BCHW / self.scale + self.shift
        return self.model.decode(z.to(self.model.dtype), return_dict=False)[0].float()


def to_image(pictures: Tensor) -> Image.Image:
    """The first picture of a batch in -1..1, as 8-bit RGB."""
    levels = (pictures[0].float().clamp(-1, 1) + 1) * 127.5
    return Image.fromarray(levels.round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())
