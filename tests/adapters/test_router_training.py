"""Training a router: a planted route is found, a useless router is not kept, and nothing else is trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import Result

from mos_cli.adapters.recipe import RouterRecipe, load_base_model_recipe
from mos_cli.bundles.adapters import RouterShape, read_adapter, verify_adapter
from mos_cli.datasets.captioned_folders import load_captioned
from mos_cli.errors import InputError
from mos_cli.training.router import TRAINED, RouterTrainer, StaticAdapter, export
from mos_cli.utils.folders import presets_folder
from tests.helpers.adapted import PROMPT, random_picture, trainable, trained_adapter
from tests.helpers.failing_rename import fail_first_rename

Mos = Callable[..., Result]
WORDS = ("fox", "dog", "chessboard", "morning", "light")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten small pictures with captions."""
    made = tmp_path / "pictures"
    made.mkdir()
    for number in range(10):
        random_picture(number).image.save(made / f"{number}.png")
        caption = f"a red {WORDS[number % 5]} and a blue {WORDS[(number + 2) % 5]}"
        (made / f"{number}.txt").write_text(caption)
    return made


def recipe_of(**changes: Any) -> RouterRecipe:
    fields = {
        "name": "router-tiny",
        "base": "tiny",
        "objective": "few-steps",
        "steps": 4,
        "held_out": 3,
        "canvas": 64,
        "lr": 3e-3,
        "gate_lr": 3e-2,
        "shape": {"width": 32, "depth": 1, "heads": 2},
    }
    return RouterRecipe(**fields | changes)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["klein", "z-image", "prx"])
def test_a_planted_route_is_found(base_folders: Callable[[str], Path], folder: Path, tmp_path: Path, name: str) -> None:
    """The router learns to draw as under rules that tell two words apart, which no static weight can.

    What is scored is the prediction, not the name of the layer: two layers may be read alike.
    """
    pipeline = trainable(base_folders(name))
    routes = ("red=2", "blue=4", "a=1") if name != "klein" else ("red=2", "blue=25", "a=13")
    steps = {"klein": 16, "z-image": 40, "prx": 60}[name]
    recipe = recipe_of(objective="routes", routes=routes, steps=steps, gate_lr=0.08, epsilon=0.0)
    adapter, result = RouterTrainer(pipeline, recipe, load_captioned(folder)).train(tmp_path / "run")
    assert result.better, result
    assert result.router < 0.8 * result.baselines["gates 0"]
    assert 0 <= adapter.gates_JZ.min() <= adapter.gates_JZ.max() <= 1
    assert not any(p.requires_grad or p.grad is not None for p in pipeline.pipe.transformer.parameters())


@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
@pytest.mark.parametrize("name", ["klein", "z-image", "prx"])
def test_gradients_reach_router_and_gates(
    base_folders: Callable[[str], Path], folder: Path, name: str, quant: str
) -> None:
    """Through quantised layers and through checkpoints, which give the same gradients as without them."""
    pipeline = trainable(base_folders(name), quant)
    trainer = RouterTrainer(pipeline, recipe_of(epsilon=0.0), load_captioned(folder))
    adapter = trained_adapter(pipeline, 0.4).train().requires_grad_(True)
    found = []
    for checkpointed in (True, False):
        pipeline.pipe.transformer.gradient_checkpointing = checkpointed
        adapter.zero_grad()
        generator = torch.Generator().manual_seed(0)
        with trainer.error(trainer.samples[0], 0.6, generator, adapter) as error:
            error.backward()
        gradients = [parameter.grad.clone() for parameter in adapter.parameters() if parameter.grad is not None]
        assert len(gradients) == len(list(adapter.parameters()))
        found.append(gradients)
    assert adapter.gates_JZ.grad is not None
    assert adapter.gates_JZ.grad.abs().min() > 0
    assert adapter.router.head.weight.grad is not None
    assert adapter.router.head.weight.grad.abs().max() > 0
    for first, second in zip(*found, strict=True):
        # bf16 rounds what is computed again in another order.
        torch.testing.assert_close(first, second, rtol=1e-3 if quant == "none" else 0.2, atol=1e-6)


def test_closed_gates_are_the_base_model_and_the_mean_is_not(base_folders: Callable[[str], Path], folder: Path) -> None:
    pipeline = trainable(base_folders("prx"))
    trainer = RouterTrainer(pipeline, recipe_of(objective="flow"), load_captioned(folder))
    closed = trainer.loss(None)
    assert closed == trainer.loss(None)
    assert closed == pytest.approx(trainer.loss(trained_adapter(pipeline, 0.0)), abs=0)
    static = StaticAdapter(pipeline.layers, pipeline.blocks, len(pipeline.own_layers))
    static.gates_JZ.data.fill_(1.0)
    assert closed != trainer.loss(static)


def test_a_router_that_is_not_better_is_not_kept(
    mos: Mos, base_folders: Callable[[str], Path], folder: Path, tmp_path: Path
) -> None:
    """A router that has learned nothing is as good as gates 0, and not better."""
    recipe = write_recipe(tmp_path, base_folders("prx"), lr="1e-30", gate_lr="1e-30", steps="1")
    trained = mos("train", recipe, "--data", folder, "--run", tmp_path / "run")
    assert trained.exit_code == 1, trained.output
    assert "not kept" in trained.output
    for name in ("gates 0", "mean of all layers", "one static weight per block"):
        assert name in trained.output
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_run_that_was_stopped_goes_on_to_the_same_router(
    base_folders: Callable[[str], Path], folder: Path, tmp_path: Path
) -> None:
    """In the middle of the router, in that of its baseline, and from the checkpoint before a damaged one."""
    recipe = recipe_of(steps=3, epsilon=0.5)
    whole = RouterTrainer(trainable(base_folders("prx")), recipe, load_captioned(folder))
    straight, expected = whole.train(tmp_path / "a")
    trainer = RouterTrainer(trainable(base_folders("prx")), recipe, load_captioned(folder))
    seen: list[tuple[str, int]] = []

    def stopping(what: str, step: int, loss: float) -> None:
        seen.append((what, step))
        if len(seen) in (2, 5):
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            trainer.train(tmp_path / "b", stopping)
    newest = tmp_path / "b" / "checkpoints" / "00000005"
    next(newest.glob("*.distcp")).write_bytes(b"damaged")
    said: list[str] = []
    adapter, result = trainer.train(tmp_path / "b", stopping, said.append)
    router, static = TRAINED
    stopped = [(router, 1), (router, 2), (router, 3), (static, 1), (static, 2)]
    assert seen == [*stopped, (router, 3), (static, 1), (static, 2), (static, 3)]
    assert len(said) == 1
    assert "damaged" in said[0]
    assert said[0].endswith("going on from step 2")
    assert result == expected
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, adapter.state_dict()[name]), name


def test_a_run_of_another_recipe_is_not_taken_up(
    mos: Mos, base_folders: Callable[[str], Path], folder: Path, tmp_path: Path
) -> None:
    def train(**fields: str) -> Result:
        recipe = write_recipe(tmp_path, base_folders("prx"), **fields)
        return mos("train", recipe, "--data", folder, "--run", tmp_path / "run")

    assert train(lr="1e-30", gate_lr="1e-30", steps="1").exit_code == 1
    other = train(lr="1e-3", gate_lr="1e-30", steps="1")
    assert (other.exit_code, other.output.count("change back lr")) == (3, 1)
    (folder / "9.png").unlink()
    fewer = train(lr="1e-30", gate_lr="1e-30", steps="1")
    assert (fewer.exit_code, fewer.output.count("change back pictures")) == (3, 1)


def test_an_adapter_that_cannot_be_replaced_stays(
    base_folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, made = trainable(base_folders("prx")), tmp_path / "adapter"
    for gates, name in ((0.0, "first"), (1.0, "second")):
        export(trained_adapter(pipeline, gates), recipe_of(name=name), pipeline.bundle, made)
        assert read_adapter(made).index.name == name
    fail_first_rename(monkeypatch, made)
    with pytest.raises(InputError, match=r"cannot write .*adapter: Permission denied"):
        export(trained_adapter(pipeline, 0.0), recipe_of(name="third"), pipeline.bundle, made)
    assert read_adapter(made).index.name == "second"
    verify_adapter(read_adapter(made))
    assert list(tmp_path.iterdir()) == [made]


@pytest.mark.slow
def test_a_trained_router_draws_and_is_bound_to_its_base_model(
    mos: Mos,
    base_folders: Callable[[str], Path],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MOS_PRECISION", "fp32")
    planted = {"objective": '"routes"', "routes": '["red=2", "blue=4", "a=1"]', "steps": "40"}
    recipe = write_recipe(tmp_path, base_folders("prx"), **planted)
    trained = mos("train", recipe, "--data", folder, "--run", tmp_path / "run")
    assert trained.exit_code == 0, trained.output
    made = tmp_path / "run" / "adapter"
    options = ("--size", "64", "--steps", "2", "-s", "1", "-q")
    assert mos("generate", PROMPT, "-m", made, *options, "-o", tmp_path / "a.png").exit_code == 0
    assert mos("generate", PROMPT, "-m", base_folders("prx"), *options, "-o", tmp_path / "b.png").exit_code == 0
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    assert mos("replay", tmp_path / "a.png", "--verify").output.strip().endswith("exact")
    shown = " ".join(mos("inspect-routing", tmp_path / "a.png").output.split())
    assert "what its router adds" in shown
    assert mos("routing", "diff", tmp_path / "a.png", tmp_path / "b.png").exit_code == 0
    weights = made / "router.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    refused = mos("generate", PROMPT, "-m", made, *options, "-o", tmp_path / "c.png")
    assert refused.exit_code == 4
    assert "does not match its sha256" in refused.output


def write_recipe(tmp_path: Path, base_model: Path, **fields: str) -> Path:
    table = {
        "name": '"router-tiny"',
        "base": f'"{base_model}"',
        "objective": '"few-steps"',
        "steps": "2",
        "held_out": "3",
        "canvas": "64",
        "lr": "3e-3",
        "gate_lr": "3e-2",
        "epsilon": "0.0",
        "shape": "{ width = 32, depth = 1, heads = 2 }",
    }
    path = tmp_path / "recipe.toml"
    path.write_text("[router]\n" + "".join(f"{name} = {value}\n" for name, value in (table | fields).items()))
    return path


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"objective": '"routes"'}, "routes are given"),
        ({"steps": "0"}, "steps"),
        ({"base": '"emoji"'}, "not a base model"),
        ({"held_out": "10"}, "too few"),
        ({"canvas": "100"}, "canvas"),
    ],
)
def test_a_wrong_recipe_is_one_line(
    mos: Mos, base_folders: Callable[[str], Path], folder: Path, tmp_path: Path, fields: dict[str, str], told: str
) -> None:
    recipe = write_recipe(tmp_path, base_folders("prx"), **fields)
    refused = mos("train", recipe, "--data", folder, "--run", tmp_path / "run")
    assert refused.exit_code in (2, 3, 4)
    assert told in refused.output
    assert len(refused.output.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["klein", "z-image", "prx"])
def test_the_shipped_recipes_are_valid(mos: Mos, name: str) -> None:
    recipe = load_base_model_recipe(presets_folder() / f"train-router-{name}.toml", {})
    assert isinstance(recipe, RouterRecipe)
    assert (recipe.base, recipe.shape) == (name, RouterShape(width=512, depth=2, heads=8))
    missing = mos("train", f"train-router-{name}")
    assert missing.exit_code == 3
    assert "--data" in missing.output
