"""A training run that learns to draw and to edit, with random art."""

from pathlib import Path

import pytest
import torch
from paired_steps import Operations
from PIL import Image

from mos_cli.datasets.art.file import Art
from mos_cli.datasets.scenes import compositor
from mos_cli.training.picks import kind_of
from mos_cli.training.recipe import TrainRecipe
from mos_cli.training.samples import draw_samples
from tests.helpers import edit_training
from tests.helpers import tiny_training as tiny


def test_a_run_learns_both_and_shows_both(understanding, art: Art, tmp_path: Path) -> None:
    recipe = edit_training.recipe()
    trainer = edit_training.trainer(recipe, understanding, art, tmp_path)
    kinds = [kind_of(trainer.curriculum, recipe.train.seed, step)[1] for step in range(trainer.curriculum.steps)]
    assert set(kinds) == {False, True}
    batches = list(trainer.batches.stream(0))
    assert [batch.references_BCHW is not None for batch in batches] == kinds
    edit = batches[kinds.index(True)]
    assert edit.references_BCHW is not None
    assert edit.references_BCHW.shape == edit.z0_BCHW.shape
    assert not torch.equal(edit.references_BCHW, edit.z0_BCHW)

    before = {name: value.clone() for name, value in trainer.tower.state_dict().items()}
    trainer.run(lambda _: None, draw_samples)
    changed = [name for name, value in trainer.tower.state_dict().items() if not torch.equal(value, before[name])]
    assert {"reference_in.weight", "image_states_in.0.weight", "router.image_states_in.weight"} <= set(changed)
    width, height = Image.open(tmp_path / "samples" / "000008.png").size
    assert width > height


@pytest.mark.parametrize(("edits", "most"), [(False, 211), (True, 410)])
def test_the_process_with_the_gpu_starts_few_operations_for_a_batch(
    understanding, art: Art, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edits: bool, most: int
) -> None:
    """At most a tenth above the count when this was written; `benchmarks/training.py host` shows the time they take."""
    monkeypatch.setattr(compositor, "_rows", lambda _: slice(None))
    recipe = edit_training.recipe()
    batches = edit_training.trainer(recipe, understanding, art, tmp_path).batches
    step = next(step for step in range(8) if kind_of(batches.curriculum, recipe.train.seed, step)[1] == edits)
    picked = batches.picks[step]
    with Operations() as operations:
        batches.finish(picked)
    assert operations.computing.total() <= most


def test_a_run_stopped_before_its_first_edit_goes_on(understanding, art: Art, tmp_path: Path) -> None:
    """Parts that only edits use have no gradient until the first of them; seed 4 begins with two steps without."""
    recipe = edit_training.recipe(seed=4, save_every=2, steps=6)
    whole = edit_training.trainer(recipe, understanding, art, tmp_path / "whole")
    assert [kind_of(whole.curriculum, 4, step)[1] for step in range(3)] == [False, False, True]
    stopped = edit_training.trainer(recipe, understanding, art, tmp_path / "stopped")

    def stop(metrics) -> None:
        if metrics.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped.run(stop, lambda _: None)
    resumed = edit_training.trainer(recipe, understanding, art, tmp_path / "stopped")
    assert resumed.step == 2
    assert tiny.run(resumed) == tiny.run(whole)[2:]


def test_steps_that_edit_ask_for_words_and_styles() -> None:
    table = edit_training.recipe().model_dump(exclude_none=True)
    for less in ({"styles": ["noto"]}, {"words": dict(list(table["data"]["words"].items())[:7])}):
        with pytest.raises(ValueError, match="eight words and two styles"):
            TrainRecipe.model_validate({**table, "data": table["data"] | less})


def test_steps_that_edit_ask_for_eyes() -> None:
    table = edit_training.recipe().model_dump(exclude_none=True)
    for left_out in ("image_encoder", "bundle"):
        less = {name: value for name, value in table.items() if name != left_out}
        if left_out == "bundle":
            less["bundle"] = {name: value for name, value in table["bundle"].items() if name != "edits"}
        with pytest.raises(ValueError, match="edit"):
            TrainRecipe.model_validate(less)
