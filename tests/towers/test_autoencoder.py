"""Autoencoders: latents in the scale that the config says, and pictures from them."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from PIL import Image, ImageDraw

from mos_cli.towers.autoencoder import Enlarger, Latents, Pixels, load_autoencoder
from mos_cli.training.enlarging import CANVAS
from mos_cli.training.references import find_autoencoder


def test_pixels_are_their_own_latents() -> None:
    pictures = torch.rand(1, 3, 16, 16)
    assert torch.equal(Pixels().decode(Pixels().encode(pictures)), pictures)


STAGES = {"block_out_channels": (16, 32)}


@pytest.mark.parametrize(
    ("make", "channels", "factor", "scale", "shift"),
    [
        (
            lambda: AutoencoderKL(
                **STAGES,
                latent_channels=4,
                norm_num_groups=8,
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                scaling_factor=0.36,
                shift_factor=0.11,
            ),
            4,
            2,
            0.36,
            0.11,
        ),
        (
            lambda: AutoencoderTiny(
                encoder_block_out_channels=(16, 16, 16),
                decoder_block_out_channels=(16, 16, 16),
                num_encoder_blocks=(1, 1, 1),
                num_decoder_blocks=(1, 1, 1),
                latent_channels=4,
            ),
            4,
            4,
            1.0,
            0.0,
        ),
        (
            lambda: AutoencoderDC(
                latent_channels=8,
                encoder_block_out_channels=(16, 32, 32),
                decoder_block_out_channels=(16, 32, 32),
                encoder_layers_per_block=(1, 1, 1),
                decoder_layers_per_block=(1, 1, 1),
                encoder_block_types=("ResBlock",) * 3,
                decoder_block_types=("ResBlock",) * 3,
                encoder_qkv_multiscales=((),) * 3,
                decoder_qkv_multiscales=((),) * 3,
                scaling_factor=0.4,
            ),
            8,
            4,
            0.4,
            0.0,
        ),
    ],
    ids=["kl", "tiny", "deep-compression"],
)
def test_any_diffusers_autoencoder_serves(
    make, channels: int, factor: int, scale: float, shift: float, tmp_path: Path
) -> None:
    """Latents are the autoencoder's own, less the shift, times the scale; decoding undoes both."""
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(tmp_path)
    latents = Latents(tmp_path, dtype=torch.float32)
    assert (latents.channels, latents.factor) == (channels, factor)
    pictures = torch.rand(1, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        encoded = model.encode(pictures)
        raw = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded[0]
        decoded = model.decode(raw).sample
    z = latents.encode(pictures)
    assert z.shape == (1, channels, 32 // factor, 48 // factor)
    torch.testing.assert_close(z, (raw - shift) * scale)
    assert decoded.shape == pictures.shape
    torch.testing.assert_close(latents.decode(z), decoded)


def test_latents_of_an_enlarger_are_the_halved_picture() -> None:
    pictures = torch.arange(16.0).view(1, 1, 4, 4).expand(1, 3, 4, 4)
    z = Enlarger(width=8, blocks=(1, 1)).encode(pictures)
    assert torch.equal(z[0, 0], torch.tensor([[2.5, 4.5], [10.5, 12.5]]))


def test_the_shipped_enlarger_draws_edges_that_smoothing_loses() -> None:
    face = Image.new("RGB", (512, 512), "white")
    draw = ImageDraw.Draw(face)
    draw.ellipse((60, 60, 450, 450), fill="#fcc21b", outline="#333333", width=12)
    for left in (150, 300):
        draw.ellipse((left, 170, left + 60, 250), fill="#2f2f2f")
    draw.line((170, 340, 340, 340), fill="#a03030", width=16)
    levels = np.asarray(face.resize((CANVAS, CANVAS), Image.Resampling.BOX), dtype=np.float32)
    picture = torch.from_numpy(levels / 127.5 - 1).permute(2, 0, 1)[None]
    enlarger = find_autoencoder("enlarger", torch.device("cpu"))
    z = enlarger.encode(picture)
    smooth = F.interpolate(z, scale_factor=2.0, mode="bicubic")
    assert F.mse_loss(enlarger.decode(z), picture) < 0.3 * F.mse_loss(smooth, picture)


def test_diffusers_autoencoders_are_no_enlargers(tmp_path) -> None:
    from diffusers import AutoencoderTiny

    widths = (16, 16)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=3,
    )
    tiny.save_pretrained(tmp_path)
    assert isinstance(load_autoencoder(tmp_path, dtype=torch.float32), Latents)
