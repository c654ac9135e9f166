"""Training a LoRA of a base model: its file draws here and in diffusers what was trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import Result

from mos_cli.adapters.recipe import BaseLoraRecipe, load_base_model_recipe
from mos_cli.bundles.loras import LoraFile, read_metadata
from mos_cli.datasets.captioned_folders import load_captioned
from mos_cli.training.base_loras import LoraTrainer
from mos_cli.utils.folders import presets_folder
from tests.helpers.adapted import PROMPT, plain_arguments, plain_pipeline, random_picture, recipe_of, trainable

pytestmark = pytest.mark.usefixtures("in_fp32")
Mos = Callable[..., Result]
Folders = Callable[[str], Path]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three small pictures with captions."""
    made = tmp_path / "pictures"
    made.mkdir()
    for number in range(3):
        random_picture(number).image.save(made / f"{number}.png")
        (made / f"{number}.txt").write_text(f"a red fox and {number} blue dogs")
    return made


def lora_recipe(**changes: Any) -> BaseLoraRecipe:
    fields = {"name": "tiny", "base": "tiny", "objective": "few-steps", "steps": 3, "held_out": 1, "canvas": 64}
    return BaseLoraRecipe(**fields | {"lr": 1e-2, "rank": 4} | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["klein", "z-image"])
def test_the_file_draws_what_was_trained(base_folders: Folders, folder: Path, tmp_path: Path, name: str) -> None:
    pipeline = trainable(base_folders(name))
    plain = pipeline.draw(recipe_of(pipeline)).image
    frozen = {key: one.clone() for key, one in pipeline.pipe.transformer.state_dict().items()}
    trainer = LoraTrainer(pipeline, lora_recipe(), load_captioned(folder))
    trainer.train(tmp_path / "run")
    file = tmp_path / "tiny.safetensors"
    trainer.export(file)
    for key, one in pipeline.pipe.transformer.state_dict().items():
        if ".lora_" not in key:
            assert torch.equal(one, frozen[key.replace(".base_layer.", ".")]), key
    # The file is in bfloat16: it draws what the weights draw when they are rounded.
    for weight in trainer.weights.values():
        weight.data = weight.data.bfloat16().float()
    trained = pipeline.draw(recipe_of(pipeline)).image
    assert trained.tobytes() != plain.tobytes()
    assert (
        trainable(base_folders(name), loras=(LoraFile(file),)).draw(recipe_of(pipeline)).image.tobytes()
        == trained.tobytes()
    )
    diffusers = plain_pipeline(base_folders(name))
    diffusers.load_lora_weights(str(file))
    assert diffusers(**plain_arguments(name, recipe_of(pipeline))).images[0].tobytes() == trained.tobytes()


@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
def test_the_loss_falls(base_folders: Folders, folder: Path, tmp_path: Path, quant: str) -> None:
    """On the pictures themselves, through quantised layers too."""
    trainer = LoraTrainer(trainable(base_folders("klein"), quant), lora_recipe(steps=8), load_captioned(folder))
    trainer.held_out = trainer.samples
    result = trainer.train(tmp_path / "run")
    assert result.lora < 0.98 * result.without


def distilling(base_folders: Folders, folder: Path, **changes: Any) -> LoraTrainer:
    fields = {"objective": "distil", "teacher": str(base_folders("klein-base"))}
    return LoraTrainer(trainable(base_folders("klein")), lora_recipe(**fields | changes), load_captioned(folder))


def test_the_steps_of_a_teacher_are_taken(base_folders: Folders, folder: Path) -> None:
    """One step without guidance of a teacher with the model's own weights is the model's own; others are not."""
    assert distilling(base_folders, folder, teacher_steps=1, teacher_cfg=1.0).loss(None) < 1e-9
    trainer = distilling(base_folders, folder, teacher_steps=2, teacher_cfg=3.0)
    pipe, base, sample = trainer.pipeline.pipe, trainer.base, trainer.samples[0]
    z_1CHW, empty = torch.randn_like(sample.z0_1CHW), trainer.pipeline.encode("")
    t, after = trainer.times[1], trainer.times[2]

    def guided(z: torch.Tensor, now: float) -> torch.Tensor:
        with torch.no_grad():
            negative = base.velocity(pipe, z, now, empty.embeds_TE, empty.mask_T)
            return negative + 3 * (base.velocity(pipe, z, now, sample.text.embeds_TE, sample.text.mask_T) - negative)

    half = (t - after) / 2
    middle_1CHW = z_1CHW - half * guided(z_1CHW, t)
    end_1CHW = middle_1CHW - half * guided(middle_1CHW, t - half)
    target_1CHW = trainer.target(sample, z_1CHW, t, torch.zeros_like(z_1CHW))
    torch.testing.assert_close(target_1CHW, (z_1CHW - end_1CHW) / (t - after), rtol=1e-4, atol=1e-4)
    assert trainer.loss(None) > 0


@pytest.mark.slow
def test_a_teacher_is_learned_from(base_folders: Folders, folder: Path, tmp_path: Path) -> None:
    trainer = distilling(base_folders, folder, steps=8, teacher_steps=1)
    trainer.held_out = trainer.samples[:1]
    result = trainer.train(tmp_path / "run")
    assert result.lora < 0.98 * result.without


@pytest.mark.parametrize("stop", [1, 2])
def test_a_run_that_was_stopped_goes_on_to_the_same_file(
    base_folders: Folders, folder: Path, tmp_path: Path, stop: int
) -> None:
    def train(run: Path, log: Any = lambda what, step, loss: None) -> dict[str, torch.Tensor]:
        trainer = LoraTrainer(trainable(base_folders("z-image")), lora_recipe(), load_captioned(folder))
        trainer.train(run, log)
        trainer.export(run / "tiny.safetensors")
        return load_file(run / "tiny.safetensors")

    def stopping(what: str, step: int, loss: float) -> None:
        if step == stop:
            raise KeyboardInterrupt

    straight = train(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b", stopping)
    resumed = train(tmp_path / "b")
    assert all(torch.equal(resumed[name], weight) for name, weight in straight.items())
    assert any(weight.any() for name, weight in straight.items() if "lora_B" in name)


def write_recipe(tmp_path: Path, base_model: Path, **fields: str) -> Path:
    table = {
        "name": '"tiny"',
        "base": f'"{base_model}"',
        "objective": '"few-steps"',
        "steps": "2",
        "held_out": "1",
        "canvas": "64",
        "lr": "1e-2",
    }
    path = tmp_path / "recipe.toml"
    path.write_text("[base_lora]\n" + "".join(f"{name} = {value}\n" for name, value in (table | fields).items()))
    return path


def test_a_folder_is_taught_and_drawn(mos: Mos, base_folders: Folders, folder: Path, tmp_path: Path) -> None:
    (folder / "2.txt").unlink()
    recipe = write_recipe(tmp_path, base_folders("klein"))
    options = ("--data", folder, "--run", tmp_path / "run", "--name", "fox")
    assert mos("train", recipe, *options, "--strict").exit_code == 3
    trained = mos("train", recipe, *options)
    assert trained.exit_code == 0, trained.output
    assert "2.png" in trained.stderr
    assert "without it" in trained.output
    file = tmp_path / "run" / "fox.safetensors"
    assert read_metadata(file)["r"] == 16
    listed = mos("loras", "ls", "--json").output
    assert '"fox.safetensors"' in listed
    common = ("generate", PROMPT, "-m", base_folders("klein"), "--size", "64", "--steps", "2", "-s", "5", "-q")
    assert mos(*common, "-o", tmp_path / "plain.png").exit_code == 0
    drawn = mos(*common, "--lora", file, "-o", tmp_path / "a.png")
    assert drawn.exit_code == 0, drawn.output
    assert Image.open(tmp_path / "a.png").tobytes() != Image.open(tmp_path / "plain.png").tobytes()
    assert mos("replay", tmp_path / "a.png", "--verify").output.strip().endswith("exact")


@pytest.mark.parametrize(
    ("base", "fields", "told"),
    [
        ("prx", {}, "takes no LoRA"),
        ("klein", {"objective": '"routes"'}, "is for routers"),
        ("klein", {"rank": "0"}, "rank"),
        ("klein", {"objective": '"distil"'}, "teacher is given"),
        ("klein", {"objective": '"distil"', "teacher": '"z-image"'}, "cannot teach"),
        ("klein", {"held_out": "3"}, "too few"),
    ],
)
def test_what_cannot_be_trained_is_one_line(
    mos: Mos, base_folders: Folders, folder: Path, tmp_path: Path, base: str, fields: dict[str, str], told: str
) -> None:
    recipe = write_recipe(tmp_path, base_folders(base), **fields)
    refused = mos("train", recipe, "--data", folder, "--run", tmp_path / "run")
    assert refused.exit_code in (2, 3, 4), refused.output
    assert told in refused.output
    assert len(refused.output.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["klein", "z-image"])
def test_the_shipped_recipes_are_valid(mos: Mos, name: str) -> None:
    recipe = load_base_model_recipe(presets_folder() / f"train-lora-{name}.toml", {})
    assert isinstance(recipe, BaseLoraRecipe)
    assert recipe.base == name
    missing = mos("train", f"lora-{name}")
    assert missing.exit_code == 3
    assert "--data" in missing.output
