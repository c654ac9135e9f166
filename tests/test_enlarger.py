"""The enlarger: pictures twice as large as their latents, better than a smooth enlargement."""

from random import Random

import torch
import torch.nn.functional as F
from tiny_training import scenes

from mos_cli.towers.autoencoder import Enlarger, Latents, load_autoencoder
from mos_cli.training.enlarging import CANVAS, picture_loss, train_enlarger
from mos_cli.training.references import find_autoencoder


def test_latents_are_the_halved_picture() -> None:
    pictures = torch.arange(16.0).view(1, 1, 4, 4).expand(1, 3, 4, 4)
    z = Enlarger(width=8, blocks=(1, 1)).encode(pictures)
    assert torch.equal(z[0, 0], torch.tensor([[2.5, 4.5], [10.5, 12.5]]))


def test_it_learns_loads_again_and_does_better_than_smoothing(tmp_path) -> None:
    losses: list[float] = []
    train_enlarger(scenes(), tmp_path, steps=30, batch=2, log=lambda _step, loss: losses.append(loss))
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    loaded = load_autoencoder(tmp_path, dtype=torch.float32)
    assert isinstance(loaded, Enlarger)
    z = torch.rand(1, 3, 8, 12)
    assert loaded.decode(z).shape == (1, 3, 16, 24)
    assert torch.equal(loaded.decode(z), load_autoencoder(tmp_path, dtype=torch.float32).decode(z))


def test_the_shipped_one_draws_edges_that_smoothing_loses() -> None:
    source, enlarger = scenes(), find_autoencoder("enlarger", torch.device("cpu"))
    pictures = source.draw([source.pick(Random(seed), CANVAS)[0] for seed in range(4)], CANVAS)
    z = enlarger.encode(pictures)
    smooth = F.interpolate(z, scale_factor=2.0, mode="bicubic")
    assert picture_loss(enlarger.decode(z), pictures) < 0.7 * picture_loss(smooth, pictures)


def test_other_autoencoders_stay_what_they_are(tmp_path) -> None:
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
