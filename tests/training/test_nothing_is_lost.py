"""What a run keeps when something goes wrong: a divergence, a full disk, damage, signals, two runs in one folder."""

import csv
import errno
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mos_cli.errors import DivergenceError, InputError, UsageError
from mos_cli.training import checkpoint
from mos_cli.training.checkpoint import CHECKPOINTS, found, newest
from mos_cli.training.metrics import METRICS
from mos_cli.training.picks import Picked
from mos_cli.utils.files import LOCK, sole_user
from tests.helpers import tiny_training as tiny


def states(folder: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in found(folder)]


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_state(understanding, tmp_path: Path) -> None:
    recipe = tiny.recipe(steps=20, save_every=1, warmup=6, muon_lr=1e30, adamw_lr=1e30)
    with pytest.raises(DivergenceError, match=r"finite.*of step \d+ is kept|finite.*no state.*pictures") as raised:
        tiny.run(tiny.trainer(recipe, understanding, tmp_path))
    assert raised.value.exit_code == 8
    assert "The pictures of that step: " in str(raised.value)
    for path in found(tmp_path):
        state = tiny.trainer(tiny.recipe(steps=20), understanding, tmp_path / path.name)._state()
        checkpoint.load(path, state, processes=1)
        assert all(weight.isfinite().all() for weight in state["tower"].values())


def test_the_pictures_of_the_step_are_named(understanding, tmp_path: Path) -> None:
    batches = tiny.batches(tiny.recipe(drop_caption=0.0), understanding)
    picked = replace(batches.picks, tokenizer=None)[3]
    assert isinstance(picked, Picked)
    assert batches.names(3) == picked.captions
    source = batches.sources["train", False]
    batches.sources["train", False] = replace(source, name=lambda random: f"{random.random():.2f}.png")
    assert all(name.endswith(".png") for name in batches.names(3))


def test_a_loss_far_above_its_start_ends_the_run(understanding, tmp_path: Path) -> None:
    trainer = tiny.trainer(tiny.recipe(steps=40, save_every=40), understanding, tmp_path)
    advance = trainer.advance

    def worse(batch):
        row = advance(batch)
        row[0] *= 100 if trainer.step > 15 else 1
        return row

    trainer.advance = worse
    with pytest.raises(DivergenceError, match="that of the first was"):
        tiny.run(trainer)


def test_weights_that_are_not_finite_are_not_saved(understanding, tmp_path: Path) -> None:
    trainer = tiny.trainer(tiny.recipe(), understanding, tmp_path)
    tiny.run(trainer)
    next(iter(trainer._parameters().values())).data[0] = torch.nan
    trainer.step += 1
    with pytest.raises(DivergenceError, match="weights are no longer finite"):
        trainer.save()
    assert states(tmp_path) == [8, 5]


def test_the_last_two_states_are_kept_and_the_last_before_the_decay(understanding, tmp_path: Path) -> None:
    tiny.run(tiny.trainer(tiny.recipe(steps=20, save_every=2), understanding, tmp_path))
    assert states(tmp_path) == [20, 18, 13]
    assert not [path for path in (tmp_path / CHECKPOINTS).iterdir() if not path.name.isdigit()]


@pytest.mark.parametrize("damage", [b"", b"no checkpoint", None])
def test_a_damaged_state_is_said_and_the_one_before_taken(understanding, tmp_path: Path, damage: bytes | None) -> None:
    whole = tiny.run(tiny.trainer(tiny.recipe(save_every=3), understanding, tmp_path))
    path = newest(tmp_path)
    assert path is not None
    file = next(file for file in path.iterdir() if file.suffix == ".distcp")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content) if damage is None else damage)
    said: list[str] = []
    batches = tiny.batches(tiny.recipe(), understanding)
    trainer = tiny.Trainer(
        tiny.recipe(), batches, tmp_path, tiny.start_accelerator(tiny.recipe().train, tmp_path), say=said.append
    )
    assert trainer.step == 6
    assert ["damaged" in line and "going on from step 6" in line for line in said] == [True]
    assert tiny.run(trainer) == whole[6:]
    assert states(tmp_path)[0] == 8
    assert tiny.trainer(tiny.recipe(), understanding, tmp_path).step == 8


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"plan": {'])
def test_a_state_whose_description_is_damaged_is_neither_taken_nor_kept(
    understanding, tmp_path: Path, damage: bytes
) -> None:
    def resumed(steps: int, damaged: int, *, extend: bool = False) -> tiny.Trainer:
        (tmp_path / CHECKPOINTS / f"{damaged:08d}" / checkpoint.DESCRIPTION).write_bytes(damage)
        longer = tiny.recipe(steps=steps, save_every=3)
        accelerator = tiny.start_accelerator(longer.train, tmp_path)
        return tiny.Trainer(longer, tiny.batches(longer, understanding), tmp_path, accelerator, extend=extend)

    tiny.run(tiny.trainer(tiny.recipe(save_every=3), understanding, tmp_path))
    assert states(tmp_path) == [8, 6, 5]
    newest_damaged = resumed(9, damaged=8)
    assert newest_damaged.step == 6
    tiny.run(newest_damaged)
    assert states(tmp_path) == [9, 6, 5]
    older_damaged = resumed(10, damaged=6)
    assert older_damaged.step == 9
    tiny.run(older_damaged)
    assert states(tmp_path) == [10, 9, 5]
    assert resumed(12, damaged=10, extend=True).step == 5


def test_every_file_of_a_state_is_on_the_disk_before_it_has_its_name(
    understanding, tmp_path: Path, monkeypatch
) -> None:
    """A power cut leaves no empty file."""
    written: dict[int, int] = {}

    def fsync(file: int) -> None:
        assert not found(tmp_path)
        written[os.fstat(file).st_ino] = os.fstat(file).st_size

    monkeypatch.setattr(checkpoint.os, "fsync", fsync)
    trainer = tiny.trainer(tiny.recipe(steps=1), understanding, tmp_path)
    written.clear()
    tiny.run(trainer)
    (state,) = found(tmp_path)
    sizes = {path.stat().st_ino: path.stat().st_size for path in state.iterdir()}
    assert sizes == {inode: written.get(inode) for inode in sizes}


def test_a_full_disk_is_one_line_and_leaves_the_state_before(understanding, tmp_path: Path, monkeypatch) -> None:
    tiny.run(tiny.trainer(tiny.recipe(steps=4), understanding, tmp_path))

    def full(*_: object, checkpoint_id: Path, **__: object) -> None:
        checkpoint_id.mkdir(parents=True)
        (checkpoint_id / "part").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write", full)
        with pytest.raises(InputError, match=r"No space left on device.*the same command goes on"):
            tiny.run(tiny.trainer(tiny.recipe(), understanding, tmp_path))
    assert states(tmp_path)[0] == 4
    assert len(tiny.run(tiny.trainer(tiny.recipe(), understanding, tmp_path))) == 4


def test_a_line_of_the_metrics_that_was_cut_is_dropped(understanding, tmp_path: Path) -> None:
    tiny.run(tiny.trainer(tiny.recipe(steps=8), understanding, tmp_path))
    with (tmp_path / METRICS).open("a") as file:
        file.write("1")
    tiny.run(tiny.trainer(tiny.recipe(steps=10), understanding, tmp_path))
    rows = list(csv.DictReader((tmp_path / METRICS).open()))
    assert [int(row["step"]) for row in rows] == list(range(1, 11))
    assert b"\r" not in (tmp_path / METRICS).read_bytes()


def test_a_run_killed_while_it_removes_a_state_leaves_no_half_of_it(understanding, tmp_path: Path, monkeypatch) -> None:
    def killed(folder: Path, **_: object) -> None:
        if folder.is_dir() and any(folder.iterdir()):
            next(folder.iterdir()).unlink()
            raise MemoryError

    tiny.run(tiny.trainer(tiny.recipe(steps=9, save_every=3), understanding, tmp_path))
    assert states(tmp_path) == [9, 6]
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.shutil, "rmtree", killed)
        with pytest.raises(MemoryError):
            tiny.run(tiny.trainer(tiny.recipe(steps=14, save_every=3), understanding, tmp_path))
    for path in found(tmp_path):
        checkpoint.verify(path)
    assert states(tmp_path) == [14, 12, 6]
    tiny.run(tiny.trainer(tiny.recipe(steps=15, save_every=3), understanding, tmp_path))
    assert all(path.name.isdigit() for path in (tmp_path / CHECKPOINTS).iterdir())


def test_fewer_steps_than_are_done_are_refused(understanding, tmp_path: Path) -> None:
    tiny.run(tiny.trainer(tiny.recipe(steps=8), understanding, tmp_path))
    with pytest.raises(UsageError, match=r"at step 8, past the 5 steps asked for"):
        tiny.trainer(tiny.recipe(steps=5), understanding, tmp_path)


def test_a_longer_run_says_that_its_decay_had_begun_and_extend_equals_a_straight_one(
    understanding, tmp_path: Path
) -> None:
    straight = tiny.run(tiny.trainer(tiny.recipe(steps=14), understanding, tmp_path / "straight"))
    folder, said = tmp_path / "parts", list[str]()
    tiny.run(tiny.trainer(tiny.recipe(steps=8), understanding, folder))
    kept = tmp_path / "kept"
    shutil.copytree(folder, kept)
    longer = tiny.recipe(steps=14)

    def resumed(folder: Path, *, extend: bool) -> tiny.Trainer:
        accelerator = tiny.start_accelerator(longer.train, folder)
        return tiny.Trainer(
            longer, tiny.batches(longer, understanding), folder, accelerator, extend=extend, say=said.append
        )

    assert tiny.run(resumed(folder, extend=False)) != straight[8:]
    assert len(said) == 1
    assert "planned for 8 steps" in said[0]
    assert "--extend" in said[0]
    assert tiny.run(resumed(kept, extend=True)) == straight[5:]
    assert len(said) == 1
    shutil.rmtree(folder / CHECKPOINTS)
    with pytest.raises(InputError, match="no state from before"):
        resumed(folder, extend=True)


def test_a_refused_resume_names_what_differs_and_a_description_is_no_difference(understanding, tmp_path: Path) -> None:
    recipe = tiny.recipe(steps=2)
    tiny.run(tiny.trainer(recipe, understanding, tmp_path))
    described = recipe.model_copy(update={"bundle": recipe.bundle.model_copy(update={"description": "other words"})})
    assert tiny.trainer(described, understanding, tmp_path).step == 2
    with pytest.raises(InputError, match=r"train\.seed = 7 \(it was 0\), train\.clip = 2\.0 \(it was 1\.0\)"):
        tiny.trainer(tiny.recipe(steps=2, seed=7, clip=2.0), understanding, tmp_path)


def test_one_process_at_a_time_works_in_a_folder(tmp_path: Path) -> None:
    with (
        sole_user(tmp_path, "another training"),
        pytest.raises(InputError, match="another training is running in"),
        sole_user(tmp_path, "another training"),
    ):
        pass
    with sole_user(tmp_path, "another training"):
        assert (tmp_path / LOCK).exists()


@pytest.mark.slow
def test_signals_save_and_a_second_run_in_the_folder_is_refused(mos, tmp_path: Path, encoder_folder: Path) -> None:
    recipe = tiny.write_recipe(tmp_path, encoder_folder, steps=4000, save_every=4000)
    folder = tmp_path / "runs" / "tiny"
    before = 0
    # Under nohup a hangup is ignored, by this process and those that it starts.
    hangup = (signal.SIGHUP,) if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL else ()
    for number in (signal.SIGTERM, *hangup):
        process = tiny.start_mos("train", recipe, folder=tmp_path)
        deadline = time.monotonic() + 120
        while not (folder / METRICS).exists() or len((folder / METRICS).read_text().splitlines()) < before + 6:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        if number == signal.SIGTERM:
            other = mos("train", recipe, "--run", folder)
            assert other.exit_code == 3, other.output
            assert "another training is running in" in " ".join(other.stderr.split())
        process.send_signal(number)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == 130, output
        assert "Traceback" not in output
        step = states(folder)[0]
        assert step > before
        before = step
