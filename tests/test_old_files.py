"""Files that earlier versions wrote are read, and draw and train as they did.

`fixtures/0.1.0` was written by mos 0.1.0 with random weights: a bundle and its encoder, pictures (one follows a route
rule, two are a chain of edits, the last with a mask), their traces, and a run of training at its fourth step.
"""

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_training as tiny
import torch
from torch import Tensor

from mos_cli.bundles.bundle import find_bundle, verify_bundle
from mos_cli.bundles.sources import tower_folder
from mos_cli.images.outputs import read_drawing
from mos_cli.routing.trace import load_recording
from mos_cli.towers.understanding import UnderstandingTower
from mos_cli.utils.folders import models_folder

OLD = Path(__file__).parent / "fixtures" / "0.1.0"
PICTURES = OLD / "pictures"
CLOSE = "close (PSNR "


@pytest.fixture
def old_model(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The old bundle, found by its name, and its encoder in the cache. Its eyes are those of the default model."""
    folder = tmp_path / "models" / "fixture"
    shutil.copytree(OLD / "models" / "fixture", folder)
    image_encoder = "eyes/diffusion_pytorch_model.safetensors"
    shutil.copyfile(models_folder() / "emoji" / image_encoder, folder / image_encoder)
    monkeypatch.setenv("MOS_MODELS", str(tmp_path / "models"))
    shutil.copytree(OLD / "encoder", tower_folder(find_bundle("fixture").index.understanding))
    return folder


def test_an_old_bundle_is_whole_and_draws(mos, old_model: Path, tmp_path: Path) -> None:
    verify_bundle(find_bundle("fixture"))
    drawn = mos("generate", "a red apple", "-m", "fixture", "-o", tmp_path / "one.png")
    assert drawn.exit_code == 0, drawn.stderr


@pytest.mark.parametrize("name", ["apple", "cat", "green", "dog"])
def test_old_pictures_are_drawn_again(mos, old_model: Path, name: str) -> None:
    """Exactly on the machine and with the libraries that drew them, close elsewhere."""
    mask = ("--mask", PICTURES / "mask.png") if name == "dog" else ()
    replayed = mos("replay", PICTURES / f"{name}.png", "--verify", *mask)
    assert replayed.exit_code == 0, replayed.output
    assert replayed.stdout.startswith(("exact", CLOSE))


@pytest.mark.parametrize("name", ["apple", "cat", "green", "dog"])
def test_old_traces_are_read(mos, name: str) -> None:
    recording = load_recording(PICTURES / f"{name}.json")
    assert recording.routes is not None
    assert recording.trace.recipe == read_drawing(PICTURES / f"{name}.png")[1].recipe
    shown = mos("inspect-routing", PICTURES / f"{name}.json")
    assert shown.exit_code == 0, shown.stderr


def digest(weights: dict[str, Tensor]) -> str:
    hashed = hashlib.sha256()
    for name in sorted(weights):
        hashed.update(weights[name].detach().contiguous().numpy().tobytes())
    return hashed.hexdigest()


def test_an_old_run_of_training_goes_on(tmp_path: Path) -> None:
    shutil.copytree(OLD / "run", tmp_path / "run")
    expected = json.loads((OLD / "run" / "expected.json").read_text(), object_hook=lambda d: SimpleNamespace(**d))
    trainer = tiny.trainer(tiny.recipe(steps=8), UnderstandingTower(OLD / "encoder"), tmp_path / "run")
    assert trainer.step == expected.step
    assert digest(dict(trainer.tower.named_parameters())) == expected.weights
    for width, average in trainer.ema.averages.items():
        assert digest(average) == vars(expected.averages)[width]
    losses = tiny.run(trainer)
    assert len(losses) == 4
    assert torch.tensor(losses).isfinite().all()
