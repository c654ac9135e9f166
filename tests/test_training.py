"""Training: scenes are what their captions say, runs resume exactly, the result is a bundle that draws."""

import csv
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mos_cli.errors import InputError, UsageError
from mos_cli.runtime.bundles import find_bundle, verify_bundle
from mos_cli.towers.understanding import UnderstandingTower
from mos_cli.training import run as training_run
from mos_cli.training.batches import Batches
from mos_cli.training.captions import GROUNDS, RELATIONS, SceneWriter, Word
from mos_cli.training.loop import CHECKPOINT, METRICS, Trainer
from mos_cli.training.optimiser import build_optimisers, build_schedule
from mos_cli.training.recipe import TrainRecipe, load_recipe
from mos_cli.training.scenes import Compositor, Placed, Scene

NAMES = ("dog", "apple", "cat")
STYLES = ("fluent-3d", "noto")
WORDS = tuple(
    Word((name,), {style: 2 * row + offset for offset, style in enumerate(STYLES)}) for row, name in enumerate(NAMES)
)
RECIPE = TrainRecipe.model_validate(
    {
        "understanding": "tiny-encoder",
        "bundle": {
            "name": "tiny",
            "description": "a test",
            "license": "Apache-2.0",
            "canvas": {"native": (16, 16), "multiple": 8, "min": 16, "max": 32},
            "defaults": {"steps": 2, "cfg": 2.0, "cfg_interval": (0, 1)},
        },
        "data": {"styles": STYLES, "pairs": 0.5, "words": {name: [name] for name in NAMES}},
        "generation": {
            **{"channels": 3, "patch": 8, "width": 32, "depth": 2, "heads": 2, "hidden": 48},
            **{"states_layers": 4, "states_width": 32, "router_width": 32, "router_heads": 2},
        },
        "train": {
            **{"seed": 0, "steps": 8, "batch": 8, "context_tokens": 24, "drop_caption": 0.1, "epsilon": 0.05},
            **{"time_mean": 0.4, "time_std": 0.8, "muon_lr": 1e-2, "adamw_lr": 1e-2, "warmup": 1, "decay": 0.4},
            **{"clip": 1.0, "ema": 0.5, "precision": "fp32", "compile": False, "save_every": 4, "sample_every": 8},
            "sample_prompts": ["a dog", "a cat"],
        },
    }
)


def sprites() -> torch.Tensor:
    """Six discs of different colours, premultiplied RGBA, [6, 32, 32, 4]."""
    y, x = np.mgrid[:32, :32] - 15.5
    alpha = (np.clip(14 - np.hypot(x, y), 0, 1) * 255)[..., None]
    colours = np.array([[255, 0, 0], [128, 0, 0], [0, 255, 0], [0, 128, 0], [0, 0, 255], [0, 0, 128]])
    discs = [np.concatenate([alpha * colour / 255, alpha], axis=-1) for colour in colours]
    return torch.from_numpy(np.stack(discs).round().astype(np.uint8))


@pytest.fixture(scope="module")
def batches(encoder_folder: Path) -> Batches:
    return Batches(
        SceneWriter(WORDS, STYLES, pairs=0.5),
        Compositor(sprites(), 16),
        UnderstandingTower(encoder_folder),
        RECIPE.train,
    )


@given(st.integers(0, 2**32))
def test_a_scene_is_what_its_caption_says(seed: int) -> None:
    scene = SceneWriter(WORDS, STYLES, pairs=0.5).write(Random(seed))
    caption = f" {scene.caption} ".replace(",", " ")
    shown = [WORDS[placed.picture // 2].names[0] for placed in scene.objects]
    assert sorted(name for name in NAMES if f" {name} " in caption) == sorted(shown)
    style = STYLES[scene.objects[0].picture % 2]
    assert all(STYLES[placed.picture % 2] == style for placed in scene.objects)
    assert (" noto " in caption) == (style == "noto")
    named = [ground for ground in GROUNDS if f" {ground} " in caption]
    assert scene.ground == GROUNDS[max(named, key=len, default="white")]
    if len(scene.objects) == 2:
        relation = max((r for r in RELATIONS if f" {r} " in caption), key=len)
        first, second = sorted(scene.objects, key=lambda p: caption.index(WORDS[p.picture // 2].names[0]))
        (x1, y1), (x2, y2) = RELATIONS[relation]
        assert np.sign(round(first.x - second.x, 1)) == np.sign(x1 - x2)
        assert np.sign(round(first.y - second.y, 1)) == np.sign(y1 - y2)
    else:
        (placed,) = scene.objects
        assert (placed.x < 0.4) == (" left" in caption)
        assert (placed.y > 0.6) == (" bottom" in caption)
        assert (placed.side > 0.85) == (" big " in caption or " large " in caption)


def test_the_compositor_agrees_with_pillow() -> None:
    """Two overlapping discs, at places and sizes that fall on whole pixels, against Pillow's own alpha composite."""
    pictures = sprites()
    objects = (Placed(0, 0.5, 0.5, 0.5), Placed(4, 0.625, 0.5, 0.5))
    drawn = Compositor(pictures, 64).draw([Scene(objects, (1.0, 1.0, 0.0), "")])
    reference = Image.new("RGBA", (64, 64), (255, 255, 0, 255))
    for placed in objects:
        pixels = pictures[placed.picture].numpy().astype(float)
        straight = np.where(pixels[..., 3:] > 0, pixels[..., :3] * 255 / np.maximum(pixels[..., 3:], 1), 0)
        sprite = Image.fromarray(np.concatenate([straight, pixels[..., 3:]], -1).round().clip(0, 255).astype(np.uint8))
        corner = (round(placed.x * 64) - 16, round(placed.y * 64) - 16)
        reference.alpha_composite(sprite, corner)
    ours = ((drawn[0].permute(1, 2, 0).numpy() + 1) * 127.5).round()
    assert np.abs(ours - np.asarray(reference.convert("RGB"))).max() <= 3


def test_shrinking_keeps_the_mean_colour() -> None:
    small, large = (
        Compositor(sprites(), 64).draw([Scene((Placed(0, 0.5, 0.5, side),), (0.0, 0.0, 0.0), "")])
        for side in (0.2, 0.8)
    )
    areas = [((picture[0, 0] + 1) / 2).mean().item() for picture in (small, large)]
    assert areas[1] / areas[0] == pytest.approx(16, rel=0.05)


def test_a_step_always_has_the_same_batch(batches: Batches) -> None:
    first, again, other = batches.make(3), batches.make(3), batches.make(4)
    for name in ("z0_BCHW", "z_BCHW", "t_B", "states_BTMS", "mask_BT"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.z_BCHW, other.z_BCHW)
    assert first.states_BTMS.shape == (8, 24, 4, 32)


def test_every_parameter_is_in_one_group_and_the_rate_ends_at_nothing(batches: Batches, tmp_path: Path) -> None:
    trainer = Trainer(RECIPE, batches, tmp_path)
    optimisers = build_optimisers(trainer.tower, RECIPE.train)
    grouped = [p for optimiser in optimisers for group in optimiser.param_groups for p in group["params"]]
    assert len(grouped) == len(set(map(id, grouped))) == len(list(trainer.tower.parameters()))
    schedule = build_schedule(optimisers[0], RECIPE.train.model_copy(update={"warmup": 4, "steps": 20}))
    factors = [schedule.lr_lambdas[0](step) for step in range(21)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1, 1]
    assert factors[12] == 1
    assert factors[16] == 0.5
    assert factors[20] == 0


def run(trainer: Trainer) -> list[float]:
    losses: list[float] = []
    trainer.run(lambda metrics: losses.append(metrics.loss), lambda _: None)
    return losses


def test_a_run_stopped_and_taken_up_gives_the_same_losses(batches: Batches, tmp_path: Path) -> None:
    whole = run(Trainer(RECIPE, batches, tmp_path / "whole"))
    assert len(whole) == 8
    losses: list[float] = []

    def stop_after_five(metrics) -> None:
        losses.append(metrics.loss)
        if metrics.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trainer(RECIPE, batches, tmp_path / "parts").run(stop_after_five, lambda _: None)
    resumed = Trainer(RECIPE, batches, tmp_path / "parts")
    assert resumed.step == 5
    assert losses + run(resumed) == whole
    rows = list(csv.DictReader((tmp_path / "parts" / METRICS).open()))
    assert [int(row["step"]) for row in rows] == list(range(1, 9))
    assert sum(float(rows[0][f"layer_{layer}"]) for layer in range(4)) == pytest.approx(1, abs=1e-3)


def test_a_killed_run_forgets_what_it_did_after_its_checkpoint(batches: Batches, tmp_path: Path) -> None:
    whole = run(Trainer(RECIPE, batches, tmp_path / "whole"))

    def die_after_six(metrics) -> None:
        if metrics.step == 6:
            raise MemoryError

    with pytest.raises(MemoryError):
        Trainer(RECIPE, batches, tmp_path / "parts").run(die_after_six, lambda _: None)
    assert run(Trainer(RECIPE, batches, tmp_path / "parts")) == whole[4:]
    rows = list(csv.DictReader((tmp_path / "parts" / METRICS).open()))
    assert [float(row["loss"]) for row in rows] == pytest.approx(whole, rel=1e-4)


def test_the_loss_falls(batches: Batches, tmp_path: Path) -> None:
    train = RECIPE.train.model_copy(update={"steps": 120, "save_every": 120})
    losses = run(Trainer(RECIPE.model_copy(update={"train": train}), replace(batches, train=train), tmp_path))
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])


def test_another_recipe_does_not_take_up_a_run(batches: Batches, tmp_path: Path) -> None:
    Trainer(RECIPE, batches, tmp_path).save()
    changes = ({"steps": 9}, {"seed": 1})
    longer, reseeded = (
        RECIPE.model_copy(update={"train": RECIPE.train.model_copy(update=change)}) for change in changes
    )
    assert Trainer(longer, batches, tmp_path).step == 0
    with pytest.raises(InputError, match="another recipe"):
        Trainer(reseeded, batches, tmp_path)


def test_a_damaged_checkpoint_and_an_impossible_network_say_so(batches: Batches, tmp_path: Path) -> None:
    Trainer(RECIPE, batches, tmp_path)
    for content in (b"", b"no checkpoint"):
        (tmp_path / CHECKPOINT).write_bytes(content)
        with pytest.raises(InputError, match="damaged"):
            Trainer(RECIPE, batches, tmp_path)
    with pytest.raises(UsageError, match="colour"):
        Trainer(RECIPE.model_copy(update={"generation": {"colour": 3}}), batches, tmp_path / "other")
    short = replace(batches, train=RECIPE.train.model_copy(update={"context_tokens": 2}))
    with pytest.raises(UsageError, match="context_tokens"):
        short.make(0)


def test_what_was_trained_is_a_bundle_that_draws(mos, bundle, batches, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(training_run, "load_tower_spec", lambda _: bundle.index.understanding)
    trainer = Trainer(RECIPE, batches, tmp_path / "run")
    trainer.run(lambda _: None, training_run.draw_samples)
    assert (tmp_path / "run" / "samples" / "000008.png").exists()
    exported = training_run.export(trainer, tmp_path / "bundle")
    verify_bundle(find_bundle(str(exported.folder)))
    result = mos("generate", "a dog", "-m", exported.folder, "-o", tmp_path / "dog.png")
    assert result.exit_code == 0, result.stderr
    assert Image.open(tmp_path / "dog.png").size == (16, 16)


def test_recipes_that_are_wrong_say_where(tmp_path: Path) -> None:
    assert len(load_recipe("train-emoji-nano").data.words) == 205
    assert load_recipe("train-emoji-nano", {"steps": 7}).train.steps == 7
    (tmp_path / "bad.toml").write_text("understanding = 3")
    with pytest.raises(UsageError, match="understanding"):
        load_recipe(str(tmp_path / "bad.toml"))
    (tmp_path / "worse.toml").write_text("understanding =")
    with pytest.raises(InputError, match="not valid TOML"):
        load_recipe(str(tmp_path / "worse.toml"))
    with pytest.raises(InputError, match="train-emoji-nano"):
        load_recipe("train-emoji-nono")
