"""Runs that end when their time is over. A reading of the clock is a second after the one before."""

from itertools import count
from pathlib import Path
from typing import Any

import pytest

from mos_cli.errors import InputError, UsageError
from mos_cli.training import batches as training_batches
from mos_cli.training import timer as training_timer
from mos_cli.training.checkpoint import newest, plan_of
from mos_cli.training.recipe import TrainRecipe, load_recipe
from mos_cli.training.stages import NOT_BEGUN, curriculum
from mos_cli.utils.durations import as_clock, parse_duration
from tests.helpers import tiny_training as tiny


@pytest.fixture(autouse=True)
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step takes a second."""
    seconds = count()
    monkeypatch.setattr(training_timer, "monotonic", lambda: float(next(seconds)))


def timed(time: float, stages: tuple[dict, ...] = (), **train: Any) -> TrainRecipe:
    return tiny.recipe(stages, steps=None, time=time, **train)


def said_by(recipe: TrainRecipe, understanding, folder: Path) -> tuple[tiny.Trainer, list[str]]:
    said: list[str] = []
    accelerator, batches = tiny.start_accelerator(recipe.train, folder), tiny.batches(recipe, understanding)
    return tiny.Trainer(recipe, batches, folder, accelerator, say=said.append), said


@pytest.mark.parametrize(("stages", "workers"), [((), 0), (tiny.STAGES, 0), (tiny.STAGES, 2)])
def test_steps_of_a_second_each_are_those_of_a_run_with_as_many_steps(
    understanding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages, workers: int
) -> None:
    """Other processes pick ahead, for a stage that ends before."""
    monkeypatch.setattr(training_batches, "_workers", lambda _: workers)
    by_steps = tiny.recipe(stages, steps=None if stages else 6)
    expected = tiny.run(tiny.trainer(by_steps, understanding, tmp_path / "steps"))
    trainer = tiny.trainer(timed(6, stages), understanding, tmp_path / "time")
    left: list[float | None] = []
    losses: list[float] = []

    def log(metrics) -> None:
        losses.append(metrics.loss)
        left.append(metrics.seconds_left)

    trainer.run(log, lambda _: None)
    assert losses == expected
    assert left == [5, 4, 3, 2, 1, 0]
    timed_rows, counted_rows = tiny.rows(tmp_path / "time"), tiny.rows(tmp_path / "steps")
    assert [row["muon_lr"] for row in timed_rows] == [row["muon_lr"] for row in counted_rows]
    assert trainer.curriculum.stages == curriculum(by_steps).stages or not stages


def test_the_rates_follow_the_clock_and_a_stage_may_take_no_step(
    understanding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([100.0, 120, 160, 190, 230])
    monkeypatch.setattr(training_timer, "monotonic", lambda: next(seconds))
    stages = (*tiny.STAGES, {**tiny.STAGES[1], "name": "last"})
    trainer = tiny.trainer(timed(120, stages, decay=0.5), understanding, tmp_path)
    assert [stage.first for stage in trainer.curriculum.stages] == [0, NOT_BEGUN, NOT_BEGUN]
    tiny.run(trainer)
    assert [float(row["muon_lr"]) / 1e-2 for row in tiny.rows(tmp_path)] == pytest.approx([1, 1, 1, 0.5])
    assert [stage.first for stage in trainer.curriculum.stages] == [0, 2, 3]
    jump = curriculum(timed(120, stages))
    assert [jump.stages_begun(used) for used in (0, 39, 40, 79, 80, 119)] == [1, 1, 2, 2, 3, 3]
    assert jump.begun_at([0, 1, 1]).stage_at(1).name == "last"


def test_a_run_that_is_taken_up_has_the_time_that_was_left(understanding, tmp_path: Path) -> None:
    recipe = timed(8, tiny.STAGES)
    whole = tiny.run(tiny.trainer(recipe, understanding, tmp_path / "whole"))
    folder, losses = tmp_path / "parts", list[float]()

    def stop_after_five(metrics) -> None:
        losses.append(metrics.loss)
        if metrics.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.trainer(recipe, understanding, folder).run(stop_after_five, lambda _: None)
    state = newest(folder)
    assert state is not None
    plan = plan_of(state)
    assert plan is not None
    assert plan.time is not None
    assert (plan.time.time, plan.time.used, plan.time.firsts) == (8, 5, (0, 4))
    resumed = tiny.trainer(recipe, understanding, folder)
    assert [stage.first for stage in resumed.curriculum.stages] == [0, 4]
    assert losses + tiny.run(resumed) == whole
    # The same command does nothing more.
    done = tiny.trainer(recipe, understanding, folder)
    assert (done.step, tiny.run(done)) == (8, [])


def test_another_time_goes_on_and_says_what_differs(understanding, tmp_path: Path) -> None:
    tiny.run(tiny.trainer(timed(8), understanding, tmp_path))
    trainer, said = said_by(timed(10), understanding, tmp_path)
    assert said == [
        "planned for 0:00:08, this run lowered its learning rates from 0:00:05 on: it will differ from one planned for "
        "0:00:10"
    ]
    assert len(tiny.run(trainer)) == 2
    with pytest.raises(UsageError, match=r"has used 0:00:10, and a time of 0:00:05 is asked for"):
        tiny.trainer(timed(5), understanding, tmp_path)
    early = tmp_path / "early"
    tiny.run(tiny.trainer(timed(4, decay=0.1, save_every=2), understanding, early))
    (early / "checkpoints" / "00000004").rename(tmp_path / "away")
    assert said_by(timed(20, decay=0.1, save_every=2), understanding, early)[1] == []


def test_a_run_by_steps_and_one_by_time_do_not_go_on_as_each_other(understanding, tmp_path: Path) -> None:
    tiny.run(tiny.trainer(tiny.recipe(steps=2), understanding, tmp_path / "steps"))
    with pytest.raises(InputError, match=r"ends by its steps: leave out --time, or choose another folder with --run"):
        tiny.trainer(timed(9), understanding, tmp_path / "steps")
    tiny.run(tiny.trainer(timed(2), understanding, tmp_path / "time"))
    with pytest.raises(InputError, match=r"ends when its time is over: give --time, or choose another"):
        tiny.trainer(tiny.recipe(steps=9), understanding, tmp_path / "time")


def test_a_time_is_a_number_with_a_unit() -> None:
    assert [parse_duration(text) for text in ("90s", "12m", "1.5h", " 2h ")] == [90, 720, 5400, 7200]
    for text in ("12", "m", "0m", "-3m", "1h30m", "12 m", "12M", "1e3s", "nans", "infh", ""):
        with pytest.raises(ValueError, match=r"is no time such as 90s, 12m or 1\.5h"):
            parse_duration(text)
    assert as_clock(3723.4) == "1:02:03"


def test_a_time_replaces_the_steps_and_steps_the_time_of_a_recipe(tmp_path: Path, encoder_folder: Path) -> None:
    assert load_recipe("train-smoke", {"time": 60.0}).train.steps is None
    staged = load_recipe("train-emoji-256", {"time": 720.0})
    assert [stage.steps for stage in staged.stages] == [2500, 2600]
    path = tiny.write_recipe(tmp_path, encoder_folder)
    path.write_text(path.read_text().replace("steps = 8", 'time = "2m"'))
    assert load_recipe(str(path)).train.time == 120
    by_steps = load_recipe(str(path), {"steps": 3}).train
    assert (by_steps.time, by_steps.steps) == (None, 3)
    for wrong, message in (('time = "2 minutes"', "train.time"), ("time = 0", "train.time"), ("", "either")):
        path.write_text(path.read_text().replace('time = "2m"', wrong))
        with pytest.raises(UsageError, match=message):
            load_recipe(str(path))
        path.write_text(path.read_text().replace(wrong, 'time = "2m"') if wrong else path.read_text())


def test_the_command_trains_for_a_time_and_goes_on(mos, tmp_path: Path, encoder_folder: Path) -> None:
    recipe, run = tiny.write_recipe(tmp_path, encoder_folder), tmp_path / "run"
    result = mos("train", recipe, "--run", run, "--time", "5s")
    assert result.exit_code == 0, result.stderr
    assert "0:00:05 of steps of 8 pictures" in result.stderr
    assert "seconds of training 5/5  step 5  loss" in result.stderr
    assert result.stdout.strip() == str(run / "bundle")
    result = mos("train", recipe, "--run", run, "--time", "0.1m")
    assert result.exit_code == 0, result.stderr
    assert "going on from step 5 with 0:00:01 left" in result.stderr
    assert [row["step"] for row in tiny.rows(run)] == ["1", "2", "3", "4", "5", "6"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--time", "5s", "--steps", 3), "--time and --steps exclude each other"),
        (("--time", "5s", "--extend"), "--extend is for more --steps"),
        (("--time", "5"), "--time: '5' is no time such as 90s, 12m or 1.5h"),
        (("--time", "-5s"), "--time: '-5s' is no time"),
    ],
)
def test_what_a_time_excludes_is_said_in_a_line(mos, tmp_path: Path, encoder_folder: Path, options, message) -> None:
    recipe = tiny.write_recipe(tmp_path, encoder_folder)
    result = mos("train", recipe, "--run", tmp_path / "run", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
    router = mos("train", "train-router-prx", "--time", "5s")
    assert (router.exit_code, len(router.stderr.strip().splitlines())) == (2, 1)
