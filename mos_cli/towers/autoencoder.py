"""Latents of the generation tower: the pixels, a picture at half its size, or those of any diffusers autoencoder.

Shapes: B batch, C channels of a latent, H x W its size; pictures are [B, 3, height, width] in -1..1.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.auto_model import AutoModel
from diffusers.models.autoencoders.vae import DecoderTiny
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image
from torch import Tensor


class Pixels:
    """No autoencoder: the latent is the picture. `factor` is the number of pixels along a latent pixel."""

    channels = 3
    factor = 1

    def encode(self, pictures: Tensor) -> Tensor:
        return pictures

    def decode(self, z_BCHW: Tensor) -> Tensor:
        return z_BCHW


class Enlarger(ModelMixin, ConfigMixin):
    """The latent is the picture at half its size; a convolutional network decodes it to the full size.

    Args:
        width: channels of the network.
        blocks: residual blocks at the latent's size, and at the picture's.
    """

    channels = 3
    factor = 2

    @register_to_config
    def __init__(self, *, width: int = 48, blocks: tuple[int, int] = (4, 1)) -> None:
        super().__init__()
        self.detail = DecoderTiny(
            3, 3, tuple(blocks), (width, width), self.factor, act_fn="relu", upsample_fn="nearest"
        )

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        return F.avg_pool2d(pictures, self.factor)

    def decode(self, z_BCHW: Tensor) -> Tensor:
        z = z_BCHW.to(self.dtype)
        smooth = F.interpolate(z, scale_factor=self.factor, mode="bilinear")
        # The decoder maps zero to -1 (black); with 1 added it adds nothing there.
        return (smooth + self.detail(z) + 1).float()


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
        # A variational autoencoder returns a distribution; its mode makes encoding deterministic.
        latents = encoded if isinstance(encoded, Tensor) else encoded.mode()
        return (latents.float() - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, z_BCHW: Tensor) -> Tensor:
        z = z_BCHW / self.scale + self.shift
        return self.model.decode(z.to(self.model.dtype), return_dict=False)[0].float()

    def save_pretrained(self, folder: Path) -> None:
        self.model.save_pretrained(folder)


Autoencoder = Pixels | Enlarger | Latents


def load_autoencoder(folder: Path, *, dtype: torch.dtype, device: str = "cpu") -> Enlarger | Latents:
    """The autoencoder of a folder in diffusers' format; raises diffusers' own errors where it is damaged."""
    if dict(json.loads((folder / "config.json").read_text(encoding="utf-8"))).get("_class_name") != Enlarger.__name__:
        return Latents(folder, dtype=dtype, device=device)
    enlarger = Enlarger.from_pretrained(str(folder), torch_dtype=dtype, use_safetensors=True)
    return enlarger.eval().requires_grad_(False).to(device)  # type: ignore[arg-type]


def to_image(pictures: Tensor) -> Image.Image:
    """The first picture of a batch in -1..1, as 8-bit RGB."""
    levels = (pictures[0].float().clamp(-1, 1) + 1) * 127.5
    return Image.fromarray(levels.round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())
