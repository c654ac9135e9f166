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
import torch
from PIL import Image
from torch import Tensor

from mos_cli.bundles.bundle import Bundle, find_bundle, verify_bundle, write_index
from mos_cli.bundles.quantized import write_quantised_bundle
from mos_cli.bundles.shapes import Header
from mos_cli.bundles.sources import tower_folder
from mos_cli.config.recipe import PictureRecord
from mos_cli.images.outputs import read_drawing
from mos_cli.quantization.method import Quantisation
from mos_cli.routing.trace import Trace, load_recording
from mos_cli.towers.image_encoder import ImageEncoder
from mos_cli.towers.quantized import load_generation
from mos_cli.towers.understanding import UnderstandingTower
from mos_cli.training import checkpoint
from mos_cli.training.checkpoint import renamed
from mos_cli.training.loop import Trainer
from mos_cli.training.recipe import TrainRecipe, load_recipe
from mos_cli.utils import migration
from mos_cli.utils.folders import models_folder, presets_folder
from mos_cli.utils.migration import current_weight, earlier_weight, part_folder
from tests.helpers import tiny_training as tiny

OLD = Path(__file__).parents[1] / "fixtures" / "0.1.0"
PICTURES = OLD / "pictures"
CLOSE = "close (PSNR "
CPU = torch.device("cpu")


@pytest.fixture
def old_model(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The old bundle, found by its name, with the image encoder of the default model, and its encoder in the cache."""
    folder = tmp_path / "models" / "fixture"
    shutil.copytree(OLD / "models" / "fixture", folder)
    weights = "diffusion_pytorch_model.safetensors"
    shutil.copyfile(models_folder() / "emoji" / "image_encoder" / weights, folder / "eyes" / weights)
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


def names_in(bundle: Bundle) -> set[str]:
    """Folders, fields and weights of a bundle."""
    found = {part for file in bundle.index.files for part in file.split("/")}
    for path in bundle.folder.rglob("config.json"):
        config = json.loads(path.read_bytes())
        found |= {*config, config["_class_name"]}
    weights = Header.of(bundle.folder / "generation").shapes
    return found | {part for name in weights for part in name.split(".")}


EARLIER_FIELDS = {new: old for old, new in migration.FIELDS.items()}
EARLIER = {*migration.FIELDS, *migration.MODULES, *migration.FOLDERS, *migration.CLASSES}


def test_the_table_has_an_inverse() -> None:
    for table in (migration.FIELDS, migration.MODULES, migration.FOLDERS, migration.CLASSES):
        assert len(set(table.values())) == len(table)
        assert not table.keys() & set(table.values())
    for name in ("reference_in.weight", "router.image_states_in.weight", "blocks.0.mlp.down.weight"):
        assert current_weight(earlier_weight(name)) == name


def test_an_old_bundle_written_anew_draws_the_same(mos, old_model: Path, tmp_path: Path) -> None:
    old = find_bundle("fixture")
    assert len(names_in(old) & EARLIER) == 6
    new = tmp_path / "new"
    load_generation(old_model / "generation", device=CPU, dtype=torch.float32).save_pretrained(new / "generation")
    ImageEncoder.from_pretrained(part_folder(old_model, "image_encoder")).save_pretrained(new / "image_encoder")
    shutil.copytree(old_model / "scheduler", new / "scheduler")
    index = old.index
    described = {"license": index.license, "understanding": index.understanding, "canvas": index.canvas}
    settings = {"defaults": index.defaults, "edits": index.edits}
    bundle = write_index(new, name="new", description=index.description, **described, **settings)
    assert names_in(bundle) & EARLIER == set()
    drawn = []
    for model in ("fixture", str(new)):
        output = tmp_path / f"{len(drawn)}.png"
        edited = mos("edit", PICTURES / "apple.png", "a green apple", "-m", model, "-s", "3", "-o", output)
        assert edited.exit_code == 0, edited.output
        drawn.append(read_drawing(output)[1].sha256)
    assert drawn[0] == drawn[1]


def test_a_bundle_made_of_an_old_one_has_present_names(old_model: Path, tmp_path: Path) -> None:
    def write_tower(source: Path, target: Path) -> None:
        load_generation(source, device=CPU).save_pretrained(target)

    made = write_quantised_bundle(find_bundle("fixture"), tmp_path / "made", "nf4", write_tower)
    assert names_in(made) & EARLIER == set()
    verify_bundle(made)
    shipped = write_quantised_bundle(find_bundle("emoji"), tmp_path / "shipped", "nf4", write_tower)
    recipe = json.loads((shipped.folder / "recipe.json").read_bytes())
    assert not {*recipe, *recipe["generation"]} & EARLIER
    assert recipe["image_encoder"] == "efficientnet-lite0"


def test_an_old_quantised_file_keeps_the_same_modules() -> None:
    stored = json.dumps({"method": "nf4", "kept": ["router", *migration.MODULES]})
    assert Quantisation.model_validate_json(stored).kept == ("router", *migration.MODULES.values())


@pytest.mark.parametrize("name", ["apple", "cat", "green", "dog"])
def test_old_records_are_written_with_present_names(name: str) -> None:
    with Image.open(PICTURES / f"{name}.png") as opened:
        text = opened.info["mos"]
    assert '"together":' in text
    record = PictureRecord.model_validate_json(text)
    assert record.made.batched_guidance == json.loads(text)["made"]["together"]
    written = record.to_json()
    assert not any(f'"{field}":' in written for field in EARLIER)
    assert PictureRecord.model_validate_json(written) == record
    trace = load_recording(PICTURES / f"{name}.json").trace
    head = trace.model_dump_json(exclude_none=True)
    assert not any(f'"{field}":' in head for field in EARLIER)
    assert Trace.model_validate_json(head) == trace


def test_old_training_recipes_are_read(tmp_path: Path) -> None:
    present = json.loads((models_folder() / "emoji" / "recipe.json").read_bytes())
    widths = EARLIER_FIELDS["image_state_widths"]
    table = {EARLIER_FIELDS.get(name, name): value for name, value in present.items()}
    table["generation"] = {EARLIER_FIELDS.get(name, name): value for name, value in present["generation"].items()}
    assert {*table, *table["generation"]} & EARLIER == {"eyes", widths}
    recipe = TrainRecipe.model_validate(table)
    assert recipe == TrainRecipe.model_validate(present)
    assert TrainRecipe.model_validate(recipe.model_dump()) == recipe
    text = (presets_folder() / "train-emoji.toml").read_text(encoding="utf-8")
    earlier = text.replace("image_encoder =", "eyes =").replace("image_state_widths =", f"{widths} =")
    assert earlier != text
    (tmp_path / "earlier.toml").write_text(earlier)
    assert load_recipe(str(tmp_path / "earlier.toml")) == load_recipe("train-emoji")


def test_a_checkpoint_with_earlier_names_is_read(tmp_path: Path) -> None:
    def trained() -> Trainer:
        recipe = tiny.recipe().model_dump(exclude_unset=True)
        recipe["generation"] |= {"image_state_widths": [8, 8, 8, 8]}
        return tiny.trainer(TrainRecipe.model_validate(recipe), UnderstandingTower(OLD / "encoder"), tmp_path / "run")

    trainer = trained()
    trainer.advance(trainer.batches.make(0))
    state = renamed(trainer._state(), earlier_weight)
    assert earlier_weight("router.image_states_in.weight") in state["tower"].keys() - trainer.tower.state_dict().keys()
    plan = checkpoint.Plan(steps=trainer.curriculum.steps, decay_from=trainer.curriculum.decay_from)
    checkpoint.save(tmp_path / "run", trainer.step, state, plan, trainer.accelerator)
    resumed = trained()
    assert resumed.step == 1
    assert digest(dict(resumed.tower.named_parameters())) == digest(dict(trainer.tower.named_parameters()))
    assert digest(resumed.ema.averages["0.05"]) == digest(trainer.ema.averages["0.05"])
    for loaded, saved in zip(resumed._bare_optimisers(), trainer._bare_optimisers(), strict=True):
        assert loaded.state_dict()["state"].keys() == saved.state_dict()["state"].keys()
        for number, values in saved.state_dict()["state"].items():
            for name, value in values.items():
                assert torch.equal(loaded.state_dict()["state"][number][name], value)
