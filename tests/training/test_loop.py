"""The training loop: runs resume exactly, the result is a bundle that draws, mistakes are named."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mos_cli.bundles.bundle import find_bundle, verify_bundle
from mos_cli.errors import InputError, UsageError
from mos_cli.training import references
from mos_cli.training.checkpoint import CHECKPOINTS, newest
from mos_cli.training.export import export
from mos_cli.training.loop import Trainer
from mos_cli.training.metrics import METRICS, PLOT, TENSORBOARD
from mos_cli.training.recipe import load_recipe
from mos_cli.training.samples import draw_samples
from mos_cli.utils.threads import cpu_threads
from tests.helpers import tiny_training as tiny


def test_stages_follow_one_another(understanding, tmp_path: Path) -> None:
    staged = tiny.recipe(tiny.STAGES, steps=None)
    batches = tiny.batches(staged, understanding)
    assert [tuple(batch.z0_BCHW.shape) for batch in batches.stream(2)] == [(8, 3, 16, 16)] + 3 * [(4, 3, 32, 32)]
    whole = tiny.run(tiny.trainer(staged, understanding, tmp_path))
    assert len(whole) == 6
    with pytest.raises(ValueError, match="either"):
        tiny.recipe(tiny.STAGES)


def test_a_smaller_canvas_spans_the_positions_of_the_whole(understanding, tmp_path: Path) -> None:
    """Half as many patches, twice as far apart: their corner is that of the whole canvas, to half a patch."""
    first, second = tiny.STAGES
    recipe = tiny.recipe(({**first, "patch_spacing": 2.0}, second), steps=None)
    trainer, layouts = tiny.trainer(recipe, understanding, tmp_path), []
    trainer.tower.router.register_forward_pre_hook(lambda _, inputs: layouts.append(inputs[4]))
    tiny.run(trainer)
    small, whole = layouts[0], layouts[-1]
    assert (whole.rows, whole.columns) == (2 * small.rows, 2 * small.columns)
    half = torch.tensor([0.0, 0.5, 0.5])
    torch.testing.assert_close(small.positions()[0] - half, whole.positions()[0])
    assert trainer.averaged_tower().patch_spacing == 1.0


def test_a_run_stopped_and_taken_up_gives_the_same_losses(understanding, plots, tmp_path: Path) -> None:
    whole = tiny.run(tiny.trainer(tiny.recipe(), understanding, tmp_path / "whole"))
    assert len(whole) == 8
    losses: list[float] = []

    def stop_after_five(metrics) -> None:
        losses.append(metrics.loss)
        if metrics.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.trainer(tiny.recipe(), understanding, tmp_path / "parts").run(stop_after_five, lambda _: None)
    resumed = tiny.trainer(tiny.recipe(log_every=3), understanding, tmp_path / "parts")
    assert resumed.step == 5
    assert losses + tiny.run(resumed) == whole
    folder = tmp_path / "parts"
    rows = list(csv.DictReader((folder / METRICS).open()))
    assert [int(row["step"]) for row in rows] == list(range(1, 9))
    assert sum(float(rows[0][f"layer_{layer}"]) for layer in range(4)) == pytest.approx(1, abs=1e-3)
    assert 0 < float(rows[0]["route_entropy"]) <= np.log(4)
    assert Image.open(folder / PLOT).size > (100, 100)
    assert any((folder / TENSORBOARD).iterdir())
    # The last two, and the last from before the learning rates fall.
    assert sorted(path.name for path in (folder / CHECKPOINTS).iterdir()) == ["00000005", "00000008"]


def test_both_averages_go_on_where_they_were(understanding, tmp_path: Path) -> None:
    whole = tiny.trainer(tiny.recipe(), understanding, tmp_path / "whole")
    tiny.run(whole)
    tiny.run(tiny.trainer(tiny.recipe(steps=8), understanding, tmp_path / "parts"))
    parts = tiny.trainer(tiny.recipe(ema="0.10"), understanding, tmp_path / "parts")
    for width, average in whole.ema.averages.items():
        for name, weights in average.items():
            assert torch.equal(weights, parts.ema.averages[width][name])
    drawn_with = parts.averaged_tower().state_dict()
    assert all(torch.equal(drawn_with[name], weights) for name, weights in whole.ema.averages["0.10"].items())


def test_a_killed_run_forgets_what_it_did_after_its_checkpoint(understanding, tmp_path: Path) -> None:
    whole = tiny.run(tiny.trainer(tiny.recipe(), understanding, tmp_path / "whole"))

    def die_after_six(metrics) -> None:
        if metrics.step == 6:
            raise MemoryError

    with pytest.raises(MemoryError):
        tiny.trainer(tiny.recipe(), understanding, tmp_path / "parts").run(die_after_six, lambda _: None)
    assert tiny.run(tiny.trainer(tiny.recipe(), understanding, tmp_path / "parts")) == whole[5:]
    rows = list(csv.DictReader((tmp_path / "parts" / METRICS).open()))
    assert [float(row["loss"]) for row in rows] == pytest.approx(whole, rel=1e-4)


def test_the_number_of_threads_is_set_after_reports_and_is_in_the_metrics(understanding, tmp_path: Path) -> None:
    numbers = iter([2, 1, 2, 1])
    with cpu_threads(1):
        trainer = tiny.trainer(tiny.recipe(steps=6, log_every=2), understanding, tmp_path)
        trainer.run(lambda _: None, lambda _: None, lambda: torch.set_num_threads(next(numbers)))
    rows = list(csv.DictReader((tmp_path / METRICS).open()))
    assert [row["threads"] for row in rows] == ["2", "2", "1", "1", "2", "2"]


def test_the_loss_falls(understanding, tmp_path: Path) -> None:
    losses = tiny.run(tiny.trainer(tiny.recipe(steps=60, save_every=60), understanding, tmp_path))
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:10])


def test_another_recipe_does_not_take_up_a_run(understanding, tmp_path: Path) -> None:
    tiny.run(tiny.trainer(tiny.recipe(steps=2), understanding, tmp_path))
    assert tiny.trainer(tiny.recipe(steps=9), understanding, tmp_path).step == 2
    with pytest.raises(InputError, match="another recipe"):
        tiny.trainer(tiny.recipe(seed=1), understanding, tmp_path)
    staged = tmp_path / "staged"
    tiny.trainer(tiny.recipe(tiny.STAGES, steps=None), understanding, staged)
    tiny.trainer(tiny.recipe((tiny.STAGES[0], {**tiny.STAGES[1], "steps": 9}), steps=None), understanding, staged)
    with pytest.raises(InputError, match="another recipe"):
        tiny.trainer(tiny.recipe(({**tiny.STAGES[0], "steps": 9}, tiny.STAGES[1]), steps=None), understanding, staged)


def test_a_damaged_checkpoint_and_an_impossible_network_say_so(understanding, tmp_path: Path) -> None:
    tiny.run(tiny.trainer(tiny.recipe(steps=1), understanding, tmp_path))
    checkpoint = newest(tmp_path)
    assert checkpoint is not None
    for file in checkpoint.iterdir():
        content = file.read_bytes()
        for damage in (b"", b"no checkpoint", content[: len(content) // 2]):
            file.write_bytes(damage)
            with pytest.raises(InputError, match=r"00000001 is damaged"):
                tiny.trainer(tiny.recipe(steps=1), understanding, tmp_path)
        file.write_bytes(content)
    assert tiny.trainer(tiny.recipe(steps=1), understanding, tmp_path).step == 1
    odd = tiny.recipe().model_copy(update={"generation": {"colour": 3}})
    with pytest.raises(UsageError, match="colour"):
        tiny.trainer(odd, understanding, tmp_path / "other")


def test_what_was_trained_is_a_bundle_that_draws(mos, bundle, understanding, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(references, "load_tower_spec", lambda _: bundle.index.understanding)
    trainer: Trainer = tiny.trainer(tiny.recipe(), understanding, tmp_path / "run")
    trainer.run(lambda _: None, draw_samples)
    assert (tmp_path / "run" / "samples" / "000008.png").exists()
    exported = export(trainer, tmp_path / "bundle")
    assert exported is not None
    verify_bundle(find_bundle(str(exported)))
    result = mos("generate", "a dog", "-m", exported, "-o", tmp_path / "dog.png")
    assert result.exit_code == 0, result.stderr
    assert Image.open(tmp_path / "dog.png").size == (16, 16)


def test_recipes_that_are_wrong_say_where(tmp_path: Path) -> None:
    assert load_recipe("train-emoji-nano", {"steps": 700}).train.steps == 700
    (tmp_path / "bad.toml").write_text("understanding = 3")
    with pytest.raises(UsageError, match="understanding"):
        load_recipe(str(tmp_path / "bad.toml"))
    (tmp_path / "worse.toml").write_text("understanding =")
    with pytest.raises(InputError, match="not valid TOML"):
        load_recipe(str(tmp_path / "worse.toml"))
    (tmp_path / "wordless.toml").write_text('[data]\nwords = "none.toml"')
    with pytest.raises(InputError, match=r"none\.toml is not there"):
        load_recipe(str(tmp_path / "wordless.toml"))
    with pytest.raises(InputError, match="train-emoji-nano"):
        load_recipe("train-emoji-nono")
