"""The enlarger: pictures twice as large as their latents, better than a smooth enlargement."""

import torch

from mos_cli.towers.autoencoder import Enlarger, load_autoencoder
from mos_cli.towers.understanding import UnderstandingTower
from mos_cli.training import references
from mos_cli.training.enlarging import train_enlarger
from mos_cli.training.export import export
from tests.helpers import tiny_training
from tests.helpers.tiny_bundle import tower_spec
from tests.helpers.tiny_training import scenes


def test_it_learns_loads_again_and_does_better_than_smoothing(tmp_path) -> None:
    losses: list[float] = []
    train_enlarger(scenes(), tmp_path, steps=16, batch=2, log=lambda _step, loss: losses.append(loss))
    assert len(losses) == 16
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    loaded = load_autoencoder(tmp_path, dtype=torch.float32)
    assert isinstance(loaded, Enlarger)
    z = torch.rand(1, 3, 8, 12)
    assert loaded.decode(z).shape == (1, 3, 16, 24)
    assert torch.equal(loaded.decode(z), load_autoencoder(tmp_path, dtype=torch.float32).decode(z))


def test_an_exported_bundle_does_not_say_where_its_autoencoder_lay(tmp_path, encoder_folder, monkeypatch) -> None:
    monkeypatch.setattr(references, "load_tower_spec", lambda _: tower_spec(encoder_folder))
    trainer = tiny_training.trainer(tiny_training.recipe(), UnderstandingTower(encoder_folder), tmp_path / "run")
    trainer.batches.autoencoder = references.find_autoencoder("enlarger", torch.device("cpu"))
    folder = export(trainer, tmp_path / "bundle")
    assert isinstance(load_autoencoder(folder / "autoencoder", dtype=torch.float32), Enlarger)
    assert not [path for path in folder.rglob("*.json") if "_name_or_path" in path.read_text()]
