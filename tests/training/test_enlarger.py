"""The enlarger: pictures twice as large as their latents, better than a smooth enlargement."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from mos_cli.towers.autoencoder import Enlarger, Latents, load_autoencoder
from mos_cli.towers.understanding import UnderstandingTower
from mos_cli.training import references
from mos_cli.training.enlarging import CANVAS, train_enlarger
from mos_cli.training.references import find_autoencoder
from mos_cli.training.run import export
from tests.helpers import tiny_training
from tests.helpers.tiny_bundle import tower_spec
from tests.helpers.tiny_training import scenes


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


def test_an_exported_bundle_does_not_say_where_its_autoencoder_lay(tmp_path, encoder_folder, monkeypatch) -> None:
    monkeypatch.setattr(references, "load_tower_spec", lambda _: tower_spec(encoder_folder))
    trainer = tiny_training.trainer(tiny_training.recipe(), UnderstandingTower(encoder_folder), tmp_path / "run")
    trainer.batches.autoencoder = references.find_autoencoder("enlarger", torch.device("cpu"))
    bundle = export(trainer, tmp_path / "bundle")
    assert bundle is not None
    assert isinstance(load_autoencoder(bundle.folder / "autoencoder", dtype=torch.float32), Enlarger)
    assert not [path for path in bundle.folder.rglob("*.json") if "_name_or_path" in path.read_text()]
