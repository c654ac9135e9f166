"""What a run tells: metrics, the loss of held-out pictures, trackers, and how long the rest takes."""

from pathlib import Path
from random import Random

import numpy as np
import pytest
from accelerate.tracking import GeneralTracker
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mos_cli.datasets.captioned_folders import load_captioned
from mos_cli.training.loop import Trainer
from mos_cli.training.metrics import METRICS, TENSORBOARD, Journal
from mos_cli.training.pace import EDIT, Pace
from mos_cli.training.picks import kind_of
from mos_cli.training.sources import captioned_source
from mos_cli.training.stages import curriculum
from tests.helpers import tiny_training as tiny


def with_pictures(understanding, folder: Path, **train) -> Trainer:
    """A trainer on discs, of which one is held out."""
    tiny.write_discs(folder / "discs")
    captioned, recipe = load_captioned(folder / "discs", held_out=0.1), tiny.recipe(**train)
    trainer = tiny.trainer(recipe, understanding, folder / "run")
    trainer.batches.sources["train", False] = captioned_source(captioned, trainer.device)
    return trainer


def test_the_rates_of_every_step_are_in_the_metrics_with_one_kind_of_line_ending(understanding, tmp_path: Path) -> None:
    tiny.run(tiny.trainer(tiny.recipe(warmup=2, muon_lr=1e-2, adamw_lr=1e-3), understanding, tmp_path))
    found = tiny.rows(tmp_path)
    assert [float(row["muon_lr"]) for row in found[:3]] == [0.005, 0.01, 0.01]
    for row in found:
        assert float(row["adamw_lr"]) == pytest.approx(float(row["muon_lr"]) / 10)
        assert float(row["images_per_second"]) > 0
        assert row["validation_loss"] == ""
    assert 0 < float(found[-1]["muon_lr"]) < 0.005
    content = (tmp_path / METRICS).read_bytes()
    assert content.endswith(b"\n")
    assert b"\r" not in content


def test_metrics_of_an_earlier_version_get_the_present_columns(understanding, tmp_path: Path) -> None:
    tiny.run(tiny.trainer(tiny.recipe(), understanding, tmp_path))
    earlier = ["step", "loss", "gradient_norm", "images_per_second", "route_entropy", "layer_0", "threads"]
    before = tiny.rows(tmp_path)
    lines = [",".join(earlier), *(",".join(row[name] for name in earlier) for row in before)]
    (tmp_path / METRICS).write_bytes("\r\n".join([*lines, ""]).encode())
    tiny.run(tiny.trainer(tiny.recipe(steps=9), understanding, tmp_path))
    found = tiny.rows(tmp_path)
    assert [row["step"] for row in found] == [str(step) for step in range(1, 10)]
    assert [row["loss"] for row in found[:8]] == [row["loss"] for row in before]
    assert (found[7]["muon_lr"], found[8]["muon_lr"] != "") == ("", True)
    assert b"\r" not in (tmp_path / METRICS).read_bytes()


def test_no_process_reads_the_losses_of_steps_that_were_given_up(tmp_path: Path) -> None:
    """The main process removes them before any other goes on."""
    lines = ["step,loss", *(f"{step},{step / 10}" for step in range(1, 7))]
    (tmp_path / METRICS).write_text("\n".join([*lines, ""]))

    class Alone:
        is_main_process, log_with = True, ()

        def wait_for_everyone(self) -> None: ...
        def init_trackers(self, project: str) -> None: ...

    class Other(Alone):
        is_main_process = False

        def wait_for_everyone(self) -> None:
            Journal(tmp_path, 4, Alone(), 2, "tiny")  # type: ignore[arg-type]

    assert Journal(tmp_path, 4, Other(), 2, "tiny").losses() == [0.1, 0.2, 0.3, 0.4]  # type: ignore[arg-type]


def test_the_loss_of_held_out_pictures_is_measured_at_every_save(understanding, tmp_path: Path) -> None:
    trainer = with_pictures(understanding, tmp_path, steps=6, save_every=2, log_every=2)
    tiny.run(trainer)
    found = tiny.rows(tmp_path / "run")
    assert [row["step"] for row in found if row["validation_loss"]] == ["2", "4", "6"]
    last = float(found[-1]["validation_loss"])
    assert trainer.validate() == pytest.approx(last, rel=1e-4)
    # Measuring is no part of the run: its losses are the same.
    again = with_pictures(understanding, tmp_path / "again", steps=6, save_every=6)
    assert tiny.run(again) == pytest.approx([float(row["loss"]) for row in found], rel=1e-4)
    assert [batch.z0_BCHW.shape for batch in trainer.batches.validation(6)] == [(1, 3, 16, 16)] * 4


def test_held_out_pictures_are_never_trained_on_and_stay_the_same(tmp_path: Path) -> None:
    tiny.write_discs(tmp_path)
    captioned = load_captioned(tmp_path, held_out=0.34)
    held_out = {example.caption for example in captioned.held_out}
    assert len(held_out) == 2
    assert not held_out & {captioned.pick(Random(seed), 16)[1] for seed in range(100)}
    Image.new("RGB", (20, 20)).save(tmp_path / "new.png")
    (tmp_path / "new.txt").write_text("a new one")
    assert len(held_out & {example.caption for example in load_captioned(tmp_path, held_out=0.34).held_out}) >= 1
    # One picture alone is trained on.
    (tmp_path / "one").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "one" / "new.png")
    assert not load_captioned(tmp_path / "one", caption="x", held_out=0.9).held_out


def test_samples_are_in_tensorboard_by_their_prompts(understanding, tmp_path: Path) -> None:
    trainer = tiny.trainer(tiny.recipe(steps=1), understanding, tmp_path)
    trainer.journal.show([(Image.new("RGB", (16, 16), "red"), "a dog")], 1)
    tiny.run(trainer)
    trainer.accelerator.end_training()
    events = EventAccumulator(str(tmp_path / TENSORBOARD), {"images": 0, "scalars": 0}).Reload()
    assert events.Tags()["images"] == ["samples/0 a dog"]
    assert {"loss", "muon_lr", "adamw_lr", "images_per_second"} <= set(events.Tags()["scalars"])


class Recording(GeneralTracker):
    """A tracker of accelerate that keeps what it is given."""

    name, requires_logging_directory = "recording", False
    logged: dict[int, dict] = {}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()

    def start(self) -> None: ...
    def store_init_configuration(self, values: dict) -> None: ...
    def log(self, values: dict, step: int | None, **kwargs: object) -> None:
        self.logged[step or 0] = values

    @property
    def tracker(self) -> "Recording":
        return self


def test_other_trackers_of_accelerate_get_the_metrics(understanding, tmp_path: Path) -> None:
    recipe = tiny.recipe(steps=2)
    accelerator = tiny.start_accelerator(recipe.train, tmp_path, trackers=[Recording()])
    tiny.run(Trainer(recipe, tiny.batches(recipe, understanding), tmp_path, accelerator))
    assert list(Recording.logged) == [1, 2]
    assert {"loss", "muon_lr"} <= Recording.logged[1].keys()
    assert any((tmp_path / TENSORBOARD).iterdir())


def test_a_tracker_that_is_not_there_is_refused_in_a_line(mos, tmp_path: Path, encoder_folder: Path) -> None:
    recipe = tiny.write_recipe(tmp_path, encoder_folder)
    for name, words in (("nothing", "accelerate has no tracker nothing"), ("wandb", "pip install wandb")):
        result = mos("train", recipe, "--run", tmp_path / "run", "--tracker", name)
        assert result.exit_code == 2
        (line,) = result.stderr.splitlines()
        assert words in line


@pytest.mark.parametrize("edits", [0.0, 0.3])
def test_what_is_left_is_right_within_a_fifth_after_a_minute(edits: float) -> None:
    """Steps of one to three seconds, edits twice as long, the first one longer, and two stages."""
    data = tiny.recipe().data.model_copy(update={"edits": edits})
    plan = curriculum(tiny.recipe(({**tiny.STAGES[0], "steps": 200}, {**tiny.STAGES[1], "steps": 300}), steps=None))
    plan = type(plan)(tuple(type(s)(**{**vars(s), "data": data}) for s in plan.stages), plan.warmup, plan.decay)
    random, now, times = Random(1), 0.0, []
    pace = Pace(plan, 0, 0, clock=lambda: now)
    said: list[tuple[float, float]] = []
    for step in range(500):
        stage, kind = plan.stage_at(step), kind_of(plan, 0, step)
        work = stage.batch * stage.canvas**2 / 2048 * (EDIT if kind[1] else 1)
        now += work * random.uniform(0.5, 1.5) + (20 if step == 0 else 0)
        left = pace.seconds_left(step + 1)
        times.append(now)
        if left is not None:
            said.append((now, left))
    checked = [(at, left) for at, left in said if 60 <= at < 0.9 * now]
    assert len(checked) > 100
    for at, left in checked:
        assert left == pytest.approx(now - at, rel=0.2)


def test_a_number_of_pictures_shows_as_often_as_its_folder_is_repeated(tmp_path: Path) -> None:
    for name in ("zog", "cat"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (20, 20)).save(tmp_path / name / "1.png")
    captioned = load_captioned(tmp_path, caption="{folder}", repeats={"zog": 4})
    captions = [captioned.pick(Random(seed), 16)[1] for seed in range(300)]
    assert np.mean([caption == "zog" for caption in captions]) == pytest.approx(0.8, abs=0.06)


def test_a_log_file_has_lines_of_progress_and_says_where_a_run_goes_on(
    mos, tmp_path: Path, encoder_folder: Path
) -> None:
    recipe = tiny.write_recipe(tmp_path, encoder_folder, steps=3, sample_every=100)
    result = mos("train", recipe, "--run", tmp_path / "run")
    assert result.exit_code == 0, result.stderr
    lines = result.stderr.splitlines()
    assert lines[0] == f"training tiny in {tmp_path / 'run'}"
    assert "checking the pictures 6/6" in lines
    assert any("6 different captions, 1 of them held out" in line for line in lines)
    assert any("96,928 parameters learn" in line and "GiB of memory" in line for line in lines)
    progress = [line for line in lines if line.startswith("training ") and "/3 " in line]
    assert progress[0].startswith("training 1/3  loss ")
    assert progress[-1].startswith("training 3/3  loss ")
    assert "  validation " in progress[-1]
    assert progress[-1].endswith("0:00:00 left")
    assert not [line for line in lines if "━" in line]
    result = mos("train", recipe, "--run", tmp_path / "run", "--steps", 4)
    assert any("going on from step 3 of 4" in line for line in result.stderr.splitlines())
