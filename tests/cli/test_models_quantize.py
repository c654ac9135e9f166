"""`mos models quantize`: a model that draws as before, in less space; and every mistake in one line."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from mos_cli.bundles.bundle import Bundle, find_bundle, verify_bundle, write_index
from mos_cli.cli.app import MosGroup
from mos_cli.cli.models_quantize import quantize
from mos_cli.config.recipe import make_recipe
from mos_cli.inference.pipeline import MoSPipeline
from mos_cli.quantization.checkpoint import Checkpoint
from mos_cli.quantization.method import METHODS
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.quantized import load_generation
from tests.helpers.tiny_bundle import randomised, write_bundle


@pytest.fixture
def models(bundle: Bundle, encoder_folder: Path) -> Path:
    """The folder of "tiny", too small to be quantised, and "small", which is large enough and has a card."""
    small = write_bundle(bundle.folder.parent / "small", encoder_folder)
    sizes = {"width": 64, "depth": 2, "heads": 2, "hidden": 64, "router_width": 32, "router_heads": 2}
    tower = randomised(GenerationTower(**sizes, states_layers=4, states_width=32))  # type: ignore[arg-type]
    tower.bfloat16().save_pretrained(small.folder / "generation")
    (small.folder / "card.md").write_text("# small\n\nRandom.\n")
    (small.folder / "recipe.json").write_text("{}\n")
    write_index(small.folder, **{name: getattr(small.index, name) for name in KEPT})
    return small.folder.parent


WEIGHTS = "generation/diffusion_pytorch_model.safetensors"
KEPT = ("name", "description", "license", "understanding", "canvas", "defaults")


@pytest.fixture
def run(models: Path) -> Callable[..., Result]:
    """Runs the command as typed; asserts that no traceback reaches the user."""
    app = typer.Typer(cls=MosGroup)
    app.command()(quantize)
    app.callback()(lambda: None)

    def typed(*arguments: object) -> Result:
        result = CliRunner().invoke(app, ["quantize", *map(str, arguments)])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return typed


@pytest.mark.parametrize("method", METHODS)
def test_a_quantised_model_is_whole_smaller_and_draws(
    run: Callable[..., Result], models: Path, encoder_folder: Path, method: Any
) -> None:
    result = run("small", "--quant", method, "--out", models / "less")
    assert result.exit_code == 0, result.output
    assert f"10 layers in {method}" in result.stdout
    made, source = find_bundle("less"), find_bundle("small")
    verify_bundle(made)
    assert made.index.files.keys() == source.index.files.keys()
    assert made.index.files["recipe.json"] == source.index.files["recipe.json"]
    card = (made.folder / "card.md").read_text()
    assert card.startswith("# small\n\nRandom.\n")
    assert source.hash[:12] in card
    assert (made.folder / WEIGHTS).stat().st_size < (source.folder / WEIGHTS).stat().st_size
    # Who may read one file of a model may read them all.
    assert (
        len({(made.folder / file).stat().st_mode for file in (WEIGHTS, "card.md", "scheduler/scheduler_config.json")})
        == 1
    )

    pipeline = MoSPipeline(source, encoder_folder, device=torch.device("cpu"), precision="bf16")
    settings = {"width": 32, "height": 32, "precision": "bf16", **source.index.defaults.model_dump()}
    recipe = make_recipe(prompt="a red apple", model="small", seed=1, **settings)
    full = pipeline.draw(recipe).image
    pipeline.tower = load_generation(made.folder / "generation", device=torch.device("cpu"))
    pipeline.prompt_encoder.clear_cache()
    less = pipeline.draw(recipe).image
    assert full.size == less.size
    assert full.tobytes() != less.tobytes()


MISTAKES = {
    "unknown method": (["small", "--quant", "int3", "-o", "{models}/less"], 2, "choose from nf4, int8"),
    "unknown model": (["smal", "--quant", "nf4", "-o", "{models}/less"], 4, "did you mean small"),
    "too small": (["tiny", "--quant", "nf4", "-o", "{models}/less"], 4, "too small"),
    "name taken": (["small", "--quant", "nf4", "-o", "{models}/tiny"], 3, "--overwrite"),
    "over itself": (["small", "--quant", "nf4", "-o", "{models}/small", "--overwrite"], 3, "in each other"),
    "into itself": (["small", "--quant", "nf4", "-o", "{models}/small/less"], 3, "in each other"),
    "around itself": (["small", "--quant", "nf4", "-o", "{models}", "--overwrite"], 3, "in each other"),
    "over what is no model": (["small", "--quant", "nf4", "-o", "{models}/../cache", "--overwrite"], 3, "not a model"),
    "a name that cannot be": (["small", "--quant", "nf4", "-o", "{models}/a b"], 3, "cannot be a model's name"),
    "below a file": (["small", "--quant", "nf4", "-o", "{models}/small/card.md/less"], 3, "card.md"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_line_and_leaves_nothing(
    run: Callable[..., Result], models: Path, cache: Path, mistake: str
) -> None:
    cache.mkdir(exist_ok=True)
    (cache / "precious").write_text("mine")
    before = sorted(path.relative_to(models) for path in models.rglob("*"))
    arguments, code, message = MISTAKES[mistake]
    result = run(*(argument.format(models=models) for argument in arguments))
    assert result.exit_code == code, result.output
    (line,) = result.stderr.splitlines()
    assert message in line
    assert sorted(path.relative_to(models) for path in models.rglob("*")) == before
    assert (cache / "precious").read_text() == "mine"


@pytest.mark.skipif(sys.platform == "win32", reason="a full disk is played by a limit that Windows does not have")
@pytest.mark.parametrize("share", [0.0, 0.5], ids=["at the first file", "at the weights"])
def test_a_full_disk_is_told_in_one_line_and_leaves_nothing(
    run: Callable[..., Result], models: Path, share: float
) -> None:
    import resource

    run("small", "--quant", "int8", "-o", models / "less")
    room = int((models / "less" / WEIGHTS).stat().st_size * share)
    before = sorted(models.rglob("*"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        result = run("small", "--quant", "int8", "-o", models / "none")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.exit_code == 3, result.output
    (line,) = result.stderr.splitlines()
    assert f"cannot write {models / 'none'}: " in line
    assert "File too large" in line
    assert sorted(models.rglob("*")) == before


def test_a_quantised_model_is_not_quantised_again(run: Callable[..., Result], models: Path) -> None:
    run("small", "--quant", "nf4", "-o", models / "less")
    result = run("less", "--quant", "int8", "-o", models / "least")
    assert result.exit_code == 4
    assert "quantised already (nf4)" in result.stderr
    assert not (models / "least").exists()


def test_a_model_is_replaced_on_request_and_a_damaged_one_is_refused(run: Callable[..., Result], models: Path) -> None:
    assert run("small", "--quant", "nf4", "-o", models / "less").exit_code == 0
    assert run("small", "--quant", "int8", "-o", models / "less", "--overwrite").exit_code == 0
    made = Checkpoint(models / "less" / "generation").quantisation
    assert made is not None
    assert made.method == "int8"
    with (models / "small" / "recipe.json").open("a") as file:
        file.write(" ")
    result = run("small", "--quant", "int8", "-o", models / "other")
    assert result.exit_code == 4
    assert "recipe.json" in result.stderr
