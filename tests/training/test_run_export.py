"""A bundle is written from a run while it goes on, and drawn with; the run is as if it had not been."""

import shutil
from pathlib import Path

from PIL import Image

from mos_cli.bundles.bundle import find_bundle, verify_bundle
from mos_cli.training import checkpoint, references
from mos_cli.training.checkpoint import CHECKPOINTS, found
from tests.helpers import tiny_training as tiny
from tests.helpers.failing_rename import fail_first_rename


def test_a_run_that_goes_on_is_exported_and_drawn_with(mos, bundle, understanding, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(references, "load_tower_spec", lambda _: bundle.index.understanding)
    run, losses = tmp_path / "run", list[float]()
    result = mos("models", "export", run)
    assert (result.exit_code, "has no training run" in result.stderr) == (3, True)

    def export_in_the_middle(metrics) -> None:
        losses.append(metrics.loss)
        if metrics.step == 2:
            result = mos("models", "export", run)
            assert (result.exit_code, "no checkpoint yet" in result.stderr) == (3, True)
        if metrics.step == 6:
            result = mos("models", "export", run)
            assert result.exit_code == 0, result.stderr
            assert result.stdout.strip() == str(run / "tiny-00000005")

    tiny.trainer(tiny.recipe(), understanding, run).run(export_in_the_middle, lambda _: None)
    assert losses == tiny.run(tiny.trainer(tiny.recipe(), understanding, tmp_path / "straight"))
    made = run / "tiny-00000005"
    verify_bundle(find_bundle(str(made)))
    result = mos("generate", "a dog", "-m", made, "-o", tmp_path / "dog.png")
    assert result.exit_code == 0, result.stderr
    assert Image.open(tmp_path / "dog.png").size == (16, 16)
    # An export under the same name is replaced, and nothing else.
    assert mos("models", "export", run, "-o", made).exit_code == 0
    # Where it cannot be replaced, it is as it was.
    before = sorted(run.iterdir())
    fail_first_rename(monkeypatch, made)
    result = mos("models", "export", run, "-o", made)
    assert (result.exit_code, result.stderr) == (3, f"error: cannot write {made}: Permission denied\n")
    verify_bundle(find_bundle(str(made)))
    assert sorted(run.iterdir()) == before
    for name in ("mine", "mine.v2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
        assert mos("models", "export", run, "-o", tmp_path / name).exit_code == 3
        assert (tmp_path / name / "notes.txt").exists()


def test_a_checkpoint_that_the_run_removes_meanwhile_gives_way_to_the_newer_one(
    understanding, tmp_path: Path, monkeypatch
) -> None:
    trainer = tiny.trainer(tiny.recipe(), understanding, tmp_path)
    tiny.run(trainer)
    newest, before = found(tmp_path)[:2]
    aside = newest.rename(tmp_path / "aside")
    read = checkpoint.verify

    def removed(path: Path) -> None:
        if path == before:
            aside.rename(newest)
            shutil.rmtree(before)
        read(path)

    monkeypatch.setattr(checkpoint, "verify", removed)
    averages, step = checkpoint.load_averages(tmp_path, trainer._parameters())
    assert step == 8
    assert averages.keys() == trainer.ema.averages.keys()
    assert [path.name for path in (tmp_path / CHECKPOINTS).iterdir()] == ["00000008"]
