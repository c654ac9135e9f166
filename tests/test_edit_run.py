"""An evaluation of editing from bundle to table, and a run that learns to edit; random weights and random art."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_training as tiny
import torch
from PIL import Image
from test_eval_run import tiny_judge

from mos_cli.bundles.bundle import Bundle
from mos_cli.bundles.sources import fetch_tower
from mos_cli.datasets.art.file import Art
from mos_cli.datasets.scenes.compositor import Compositor
from mos_cli.datasets.scenes.edits import EDIT_KINDS
from mos_cli.datasets.scenes.vocabulary import load_vocabulary
from mos_cli.datasets.tables import DataTable
from mos_cli.errors import UsageError
from mos_cli.evaluation.edit_run import EditEvaluation, evaluate_edits
from mos_cli.evaluation.editbench import read_edit_bench
from mos_cli.evaluation.examine import TrueScenes
from mos_cli.evaluation.scenebench import bench_data
from mos_cli.inference.pipeline import MoSPipeline
from mos_cli.towers.autoencoder import Pixels
from mos_cli.towers.image_encoder import ImageEncoder
from mos_cli.training.batches import Batches, kind_of
from mos_cli.training.launch import start_accelerator
from mos_cli.training.loop import Trainer
from mos_cli.training.recipe import TrainRecipe
from mos_cli.training.run import edits_of
from mos_cli.training.samples import draw_samples
from mos_cli.training.stages import curriculum


def test_an_evaluation_of_edits_from_bundle_to_table(editor: Bundle, art: Art, tmp_path: Path) -> None:
    pipeline = MoSPipeline(
        editor, fetch_tower(editor.index.understanding), device=torch.device("cpu"), precision="fp32"
    )
    judge, entries = tiny_judge(tmp_path / "judge", tuple(bench_data().words)), read_edit_bench(1)
    common = {"model": "editor", "steps": 1, "cfg": 1.0, "cfg_interval": (0.0, 1.0), "precision": "fp32"}
    common |= {"negative": "", "width": 32, "height": 32}
    folder = tmp_path / "out"
    result = evaluate_edits(pipeline, entries, judge, TrueScenes(art), folder, common, 1.0, lambda *_: None)
    assert EditEvaluation.model_validate_json((folder / "edit.json").read_text()) == result
    assert [one.category for one in result.scores] == [*EDIT_KINDS, "all"]
    assert result.no_op_error > 0
    text = (folder / "edit.md").read_text()
    assert all(f"| {kind} | 1 |" in text for kind in EDIT_KINDS)
    Image.open(folder / "edits.png").verify()
    assert len(list((folder / "edits").iterdir())) == len(entries)
    with pytest.raises(UsageError, match="square"):
        evaluate_edits(pipeline, entries, judge, TrueScenes(art), folder, common | {"width": 48}, 1.0, lambda *_: None)


def test_only_what_edits_is_asked_to(mos, bundle: Bundle, editor: Bundle) -> None:
    refused = mos("eval", "--suite", "edit", "-m", "tiny")
    assert (refused.exit_code, len(refused.stderr.splitlines())) == (4, 1)
    assert mos("eval", "--image-cfg", "2").exit_code == 2
    assert mos("eval", "--suite", "paint").exit_code == 2


def _editing(**train: object) -> TrainRecipe:
    table = json.loads(json.dumps(tiny.TABLE))
    data = bench_data()
    table["data"] = {"styles": list(data.styles), "words": {k: list(v) for k, v in data.words.items()}, "edits": 0.5}
    table["image_encoder"] = "efficientnet-lite0"
    table["bundle"]["edits"] = {"steps": 2, "cfg": 2.0, "cfg_interval": [0.0, 1.0], "image_cfg": 1.0}
    table["generation"] |= {"image_state_widths": list(ImageEncoder(layers=4).widths)}
    table["train"] |= train
    return TrainRecipe.model_validate(table)


def _trainer(recipe: TrainRecipe, understanding, art: Art, folder: Path) -> Trainer:
    assert isinstance(recipe.data, DataTable)
    vocabulary = load_vocabulary(art, recipe.data)
    source = edits_of(vocabulary, Compositor(vocabulary.sprites_VHW4).draw)
    # The tiny tower reads 24 tokens.
    short = replace(source, pick=lambda random, canvas: (source.pick(random, canvas)[0], "a dog"))
    torch.manual_seed(0)
    batches = Batches(
        curriculum(recipe),
        recipe.train,
        {("train", False): tiny.scenes(), ("train", True): short},
        understanding,
        Pixels(),
        torch.device("cpu"),
        image_encoder=ImageEncoder(layers=4),
    )
    return Trainer(recipe, batches, folder, start_accelerator(recipe.train, folder))


@pytest.fixture(scope="module")
def understanding(encoder_folder: Path):
    from mos_cli.towers.understanding import UnderstandingTower

    return UnderstandingTower(encoder_folder)


def test_a_run_learns_both_and_shows_both(understanding, art: Art, tmp_path: Path) -> None:
    recipe = _editing()
    trainer = _trainer(recipe, understanding, art, tmp_path)
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


def test_a_run_stopped_before_its_first_edit_goes_on(understanding, art: Art, tmp_path: Path) -> None:
    """Parts that only edits use have no gradient until the first of them; seed 4 begins with two steps without."""
    recipe = _editing(seed=4, save_every=2, steps=6)
    whole = _trainer(recipe, understanding, art, tmp_path / "whole")
    assert [kind_of(whole.curriculum, 4, step)[1] for step in range(3)] == [False, False, True]
    stopped = _trainer(recipe, understanding, art, tmp_path / "stopped")

    def stop(metrics) -> None:
        if metrics.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped.run(stop, lambda _: None)
    resumed = _trainer(recipe, understanding, art, tmp_path / "stopped")
    assert resumed.step == 2
    assert tiny.run(resumed) == tiny.run(whole)[2:]


def test_steps_that_edit_ask_for_words_and_styles() -> None:
    table = _editing().model_dump(exclude_none=True)
    for less in ({"styles": ["noto"]}, {"words": dict(list(table["data"]["words"].items())[:7])}):
        with pytest.raises(ValueError, match="eight words and two styles"):
            TrainRecipe.model_validate({**table, "data": table["data"] | less})


def test_steps_that_edit_ask_for_eyes() -> None:
    table = _editing().model_dump(exclude_none=True)
    for left_out in ("image_encoder", "bundle"):
        less = {name: value for name, value in table.items() if name != left_out}
        if left_out == "bundle":
            less["bundle"] = {name: value for name, value in table["bundle"].items() if name != "edits"}
        with pytest.raises(ValueError, match="edit"):
            TrainRecipe.model_validate(less)
