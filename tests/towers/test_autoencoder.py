"""Autoencoders: latents in the scale that the config says, and pictures from them."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny

from mos_cli.towers.autoencoder import Latents, Pixels


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
