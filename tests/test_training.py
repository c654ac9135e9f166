"""Training: runs resume exactly, the result is a bundle that draws, mistakes are named."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_training as tiny
import torch
from PIL import Image

from mos_cli.bundles.bundle import find_bundle, verify_bundle
from mos_cli.errors import InputError, UsageError
from mos_cli.towers.understanding import UnderstandingTower
from mos_cli.training import batches as training_batches
from mos_cli.training import references
from mos_cli.training import run as training_run
from mos_cli.training.batches import Share
from mos_cli.training.checkpoint import CHECKPOINTS, newest
from mos_cli.training.ema import PowerEMA, gamma_of
from mos_cli.training.loop import Trainer
from mos_cli.training.metrics import METRICS, PLOT, TENSORBOARD
from mos_cli.training.optimiser import build_optimisers, set_rates
from mos_cli.training.recipe import load_recipe
from mos_cli.training.stages import curriculum

STAGES = ({"name": "small", "steps": 3, "canvas": 16}, {"name": "large", "steps": 3, "canvas": 32, "batch": 4})


@pytest.fixture(scope="module")
def understanding(encoder_folder: Path) -> UnderstandingTower:
    return UnderstandingTower(encoder_folder)


def test_a_step_always_has_the_same_batch(understanding) -> None:
    batches = tiny.batches(tiny.recipe(), understanding)
    first, again, other = batches.make(3), batches.make(3), batches.make(4)
    for name in ("z0_BCHW", "z_BCHW", "t_B", "states_BTMS", "mask_BT"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.z_BCHW, other.z_BCHW)
    assert first.states_BTMS.shape == (8, 24, 4, 32)
    streamed = list(batches.stream(3))
    assert len(streamed) == 5
    assert torch.equal(streamed[0].z_BCHW, first.z_BCHW)


def test_other_processes_pick_the_same(understanding, monkeypatch) -> None:
    batches = tiny.batches(tiny.recipe(), understanding)
    alone = [batch.z_BCHW for batch in batches.stream(2)]
    monkeypatch.setattr(training_batches, "_workers", lambda _: 2)
    assert all(torch.equal(a, b.z_BCHW) for a, b in zip(alone, batches.stream(2), strict=True))

    def unreadable(random, canvas):
        raise InputError("cannot read the picture red.png")

    broken = replace(batches.picks, picks=dict.fromkeys(batches.picks.picks, unreadable))
    batches.picks = broken
    with pytest.raises(InputError, match=r"^cannot read the picture red\.png$"):
        next(batches.stream(0))


def test_shares_make_up_the_whole_batch(understanding) -> None:
    whole = tiny.batches(tiny.recipe(), understanding).make(2)
    parts = [tiny.batches(tiny.recipe(), understanding, Share(rank, 4)).make(2) for rank in range(4)]
    for name in ("z0_BCHW", "z_BCHW", "t_B", "mask_BT"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    states = torch.cat([part.states_BTMS for part in parts])
    torch.testing.assert_close(states[whole.mask_BT], whole.states_BTMS[whole.mask_BT])
    with pytest.raises(UsageError, match="cannot be shared by 3"):
        tiny.batches(tiny.recipe(), understanding, Share(0, 3))


def test_stages_follow_one_another(understanding, tmp_path: Path) -> None:
    staged = tiny.recipe(STAGES, steps=None)
    batches = tiny.batches(staged, understanding)
    assert [tuple(batch.z0_BCHW.shape) for batch in batches.stream(2)] == [(8, 3, 16, 16)] + 3 * [(4, 3, 32, 32)]
    whole = tiny.run(tiny.trainer(staged, understanding, tmp_path))
    assert len(whole) == 6
    with pytest.raises(ValueError, match="either"):
        tiny.recipe(STAGES)


def test_a_smaller_canvas_spans_the_positions_of_the_whole(understanding, tmp_path: Path) -> None:
    """Half as many patches, twice as far apart: the corners are where those of the whole canvas are, within a patch."""
    stages = ({**STAGES[0], "patch_spacing": 2.0}, STAGES[1])
    trainer = tiny.trainer(tiny.recipe(stages, steps=None), understanding, tmp_path)
    grids = []
    place = trainer.tower._grid
    trainer.tower._grid = lambda z, **kwargs: grids.append(place(z, **kwargs)) or grids[-1]
    tiny.run(trainer)
    small, whole = grids[0], grids[-1]
    assert (whole.rows, whole.columns) == (2 * small.rows, 2 * small.columns)
    half = torch.tensor([0.0, 0.5, 0.5])
    torch.testing.assert_close(small.positions()[0] - half, whole.positions()[0])
    assert trainer.averaged_tower().patch_spacing == 1.0


def test_every_parameter_is_in_one_group(understanding, tmp_path: Path) -> None:
    trainer = tiny.trainer(tiny.recipe(), understanding, tmp_path)
    optimisers = build_optimisers(trainer.tower)
    grouped = [p for optimiser in optimisers for group in optimiser.param_groups for p in group["params"]]
    assert len(grouped) == len(set(map(id, grouped))) == len(list(trainer.tower.parameters()))


def test_the_rate_warms_up_once_and_ends_at_nothing() -> None:
    plan = curriculum(tiny.recipe(warmup=4, steps=20))
    assert [plan.rate(step) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    assert [plan.rate(step) for step in (12, 16, 20)] == [1, 0.5, 0]
    quiet = ({**STAGES[0], "steps": 10}, {**STAGES[1], "steps": 10, "muon_lr": 1e-3})
    plan = curriculum(tiny.recipe(quiet, steps=None, warmup=4))
    optimisers = build_optimisers(torch.nn.ModuleDict({"blocks": torch.nn.Linear(2, 2)}))
    rates = []
    for step in (9, 10, 16):
        set_rates(optimisers, plan, step)
        rates.append(tuple(optimiser.param_groups[0]["lr"] for optimiser in optimisers))
    assert rates == [(1e-2, 1e-2), (1e-3, 1e-2), (0.5e-3, 0.5e-2)]


def test_moving_averages_are_as_wide_as_they_say() -> None:
    """Against the definition: a weighted mean of all weights so far, with weights ~ t ** gamma."""
    assert [gamma_of(width) for width in (0.05, 0.10)] == pytest.approx([16.97, 6.94], abs=0.01)  # EDM2, section 3.1
    values, weight = torch.randn(200, generator=torch.Generator().manual_seed(0)), torch.zeros(1)
    ema = PowerEMA({"w": weight})
    for step, value in enumerate(values, start=1):
        ema.update({"w": value[None]}, step)
    for width, average in ema.averages.items():
        times = torch.arange(1, 201, dtype=torch.float64)
        share = times ** (gamma_of(float(width)) + 1)
        share = torch.diff(share, prepend=torch.zeros(1, dtype=torch.float64)) / 200 ** (gamma_of(float(width)) + 1)
        assert average["w"].item() == pytest.approx((share * values).sum().item(), abs=1e-5)
        centre = (share * times).sum() / 200
        spread = ((share * (times / 200 - centre).square()).sum()).sqrt().item()
        assert spread == pytest.approx(float(width), rel=0.05)


def test_a_run_stopped_and_taken_up_gives_the_same_losses(understanding, tmp_path: Path) -> None:
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
    assert [path.name for path in (folder / CHECKPOINTS).iterdir()] == ["00000008"]


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
    assert tiny.run(tiny.trainer(tiny.recipe(), understanding, tmp_path / "parts")) == whole[4:]
    rows = list(csv.DictReader((tmp_path / "parts" / METRICS).open()))
    assert [float(row["loss"]) for row in rows] == pytest.approx(whole, rel=1e-4)


def test_the_loss_falls(understanding, tmp_path: Path) -> None:
    losses = tiny.run(tiny.trainer(tiny.recipe(steps=120, save_every=120), understanding, tmp_path))
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:10])


def test_another_recipe_does_not_take_up_a_run(understanding, tmp_path: Path) -> None:
    tiny.run(tiny.trainer(tiny.recipe(steps=2), understanding, tmp_path))
    assert tiny.trainer(tiny.recipe(steps=9), understanding, tmp_path).step == 2
    with pytest.raises(InputError, match="another recipe"):
        tiny.trainer(tiny.recipe(seed=1), understanding, tmp_path)
    staged = tmp_path / "staged"
    tiny.trainer(tiny.recipe(STAGES, steps=None), understanding, staged)
    tiny.trainer(tiny.recipe((STAGES[0], {**STAGES[1], "steps": 9}), steps=None), understanding, staged)
    with pytest.raises(InputError, match="another recipe"):
        tiny.trainer(tiny.recipe(({**STAGES[0], "steps": 9}, STAGES[1]), steps=None), understanding, staged)


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


@pytest.mark.parametrize("room", [4, 24])
def test_a_caption_that_is_too_long_is_named(understanding, room: int) -> None:
    batches = tiny.batches(tiny.recipe(context_tokens=room), understanding)
    with pytest.raises(UsageError, match=r"'a (dog ){15,}.* has 42 tokens.*context_tokens"):
        batches._read(["a cat", "a " + "dog " * 39])


def test_what_was_trained_is_a_bundle_that_draws(mos, bundle, understanding, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(references, "load_tower_spec", lambda _: bundle.index.understanding)
    trainer: Trainer = tiny.trainer(tiny.recipe(), understanding, tmp_path / "run")
    trainer.run(lambda _: None, training_run.draw_samples)
    assert (tmp_path / "run" / "samples" / "000008.png").exists()
    exported = training_run.export(trainer, tmp_path / "bundle")
    assert exported is not None
    verify_bundle(find_bundle(str(exported.folder)))
    result = mos("generate", "a dog", "-m", exported.folder, "-o", tmp_path / "dog.png")
    assert result.exit_code == 0, result.stderr
    assert Image.open(tmp_path / "dog.png").size == (16, 16)


def test_recipes_that_are_wrong_say_where(tmp_path: Path) -> None:
    assert load_recipe("train-emoji-nano", {"steps": 7}).train.steps == 7
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
