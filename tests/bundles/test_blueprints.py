"""What blueprints promise: their numbers are those of real networks, and `mos models init` makes bundles of them."""

import inspect
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from safetensors import safe_open
from safetensors.torch import load_file

from mos_cli.bundles.blueprints import Blueprint, find_blueprint, find_network
from mos_cli.bundles.bundle import find_bundle, verify_bundle
from mos_cli.bundles.shapes import GenerationShape, read_generation
from mos_cli.bundles.sources import fetch_tower
from mos_cli.errors import InputError, ModelError, UsageError
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.random_weights import Start, write_fresh_bundle
from mos_cli.utils.folders import list_blueprints, models_folder
from tests.helpers.vlm_towers import LAYERS, WIDTH, qwen3_vl

NAMES = ("mos-s", "mos-l")


def on_meta(shape: GenerationShape) -> GenerationTower:
    with torch.device("meta"):
        return GenerationTower(**shape.model_dump())


def small(depth: int = 3, width: int = 32, **changes: Any) -> Blueprint:
    """A blueprint of the shapes of mos-s for the small encoder of the tests; `width` 32 makes 60 thousand weights."""
    numbers = json.loads(find_blueprint("mos-s").model_dump_json())
    sizes = {"width": width, "depth": depth, "heads": 2, "hidden": 2 * width, "router_width": 32, "router_heads": 2}
    numbers["generation"] |= {**sizes, "channels": 4, **changes}
    blocks, channels = ["ResBlock", "ResBlock", "EfficientViTBlock"], [16, 32, 32]
    numbers["autoencoder"]["config"] |= {"latent_channels": 4} | {
        f"{half}_{name}": value
        for half in ("encoder", "decoder")
        for name, value in {
            "block_types": blocks,
            "block_out_channels": channels,
            "layers_per_block": [1, 1, 1],
            "qkv_multiscales": [[], [], [5]],
        }.items()
    }
    numbers["canvas"] = {"native": [32, 32], "multiple": 4, "min": 16, "max": 64}
    numbers["defaults"]["steps"] = 2
    # The encoder of the tests does not see.
    numbers["edits"] = None
    numbers["generation"]["has_vision"] = False
    sizes = {"layers": 3, "width": 32, "hidden": 64, "linear": 1, "other": 1, "vision": 0}
    numbers["understanding"] = {"tiny-encoder": sizes}
    return Blueprint.model_validate(numbers)


def start(blueprint: Blueprint, **changes: Any) -> Start:
    settings = {"tower": "tiny-encoder", "understanding": None, "seed": 0, "shard": 2 * 10**9}
    return Start(blueprint=blueprint, **{**settings, **changes})


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_network(name: str) -> None:
    blueprint = find_blueprint(name)
    # The towers make the same difference to both: all are built where building is quick.
    for tower in list(blueprint.understanding.values())[: 1 if name == "mos-l" else None]:
        shape = blueprint.shape(tower)
        real = on_meta(shape)
        assert real.router is not None
        assert shape.parameters == real.num_parameters()
        assert shape.router_parameters == sum(p.numel() for p in real.router.parameters())
        assert shape.block_parameters == sum(p.numel() for p in real.blocks.parameters())
    with torch.device("meta"):
        autoencoder = AutoencoderDC.from_config(blueprint.autoencoder.config)
    assert blueprint.autoencoder.parameters == autoencoder.num_parameters()  # type: ignore[union-attr]


@pytest.mark.parametrize(("name", "billions"), [("mos-s", 3), ("mos-l", 5)])
def test_sizes_are_those_of_the_paper(name: str, billions: int) -> None:
    blueprint = find_blueprint(name)
    for tower in blueprint.understanding.values():
        shape = blueprint.shape(tower)
        assert shape.parameters == pytest.approx(billions * 1e9, rel=0.02)
        assert shape.router_parameters == pytest.approx(1e8, rel=0.15)


@pytest.mark.parametrize(
    "config",
    [
        {"context": "tokens"},
        {"context": "joint", "fusion": "last"},
        {"context": "cross", "fusion": "mean"},
        {"fusion": "aligned"},
        {"has_vision": True},
        {"router_inputs": ("tokens",), "routing": "sample"},
        {"router_inputs": ("tokens", "time"), "image_state_widths": (16,) * 7},
    ],
)
def test_parameters_of_every_kind_of_fusion(config: dict[str, Any]) -> None:
    shape = GenerationShape(**config)
    real = on_meta(shape)
    assert shape.parameters == real.num_parameters()
    linears = [m for m in real.blocks.modules() if isinstance(m, torch.nn.Linear)]
    assert sum(i * o for i, o in shape.linears) == sum(m.weight.numel() for m in linears)


def test_parameters_of_the_default_bundle() -> None:
    folder = models_folder() / "emoji" / "generation"
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert read_generation(folder).parameters == sum(weight.numel() for weight in weights.values())


def test_a_shape_has_the_fields_of_the_network() -> None:
    parameters = inspect.signature(GenerationTower.__init__).parameters
    assert {name: p.default for name, p in parameters.items() if name != "self"} == GenerationShape().model_dump()


def test_both_blueprints_know_the_same_towers() -> None:
    assert set(list_blueprints()) == set(NAMES)
    first, second = (find_blueprint(name) for name in NAMES)
    assert first.understanding == second.understanding
    assert first.autoencoder == second.autoencoder


def test_models_that_edit_see_and_say_so(tmp_path: Path) -> None:
    for name in NAMES:
        blueprint = find_blueprint(name)
        assert blueprint.edits is not None
        assert blueprint.shape(blueprint.tower(None)[1]).has_vision
    numbers = json.loads(small().model_dump_json())
    numbers |= {"edits": {**numbers["defaults"], "image_cfg": 1.0}}
    file = tmp_path / "blind.json"
    for cell, has_vision in ((0, True), (32, False)):
        numbers["generation"]["has_vision"], numbers["understanding"]["tiny-encoder"]["image_token_size"] = (
            has_vision,
            cell,
        )
        file.write_text(json.dumps(numbers))
        with pytest.raises(ModelError, match="edits: has_vision must be true"):
            find_blueprint(str(file))


def test_a_bundle_of_a_blueprint_that_edits_edits(tmp_path: Path, cache: Path) -> None:
    folder = qwen3_vl(tmp_path / "tower")
    numbers = json.loads(small().model_dump_json())
    numbers |= {"edits": {**numbers["defaults"], "image_cfg": 1.0}, "name": "sees"}
    numbers["canvas"] = {"native": [64, 64], "multiple": 32, "min": 32, "max": 64}
    numbers["generation"]["has_vision"] = True
    numbers["understanding"] = {
        "tiny-encoder": {
            "layers": LAYERS,
            "width": WIDTH,
            "hidden": 128,
            "linear": 1,
            "other": 1,
            "vision": 1,
            "image_token_size": 32,
        }
    }
    blueprint = Blueprint.model_validate(numbers)
    write_fresh_bundle(start(blueprint, understanding=folder), tmp_path / "made")
    bundle = find_bundle(str(tmp_path / "made"))
    assert bundle.index.edits == blueprint.edits
    fetch_tower(bundle.index.understanding)
    network = find_network(str(tmp_path / "made"), references=1)
    assert network.understanding.image_token_size == 32


TEXTS = {
    "qwen3-vl-8b": {"num_hidden_layers": 36, "num_attention_heads": 32, "vocab_size": 151936, "head_dim": 128},
    "internvl3-14b": {"num_hidden_layers": 48, "num_attention_heads": 40, "vocab_size": 151674, "model_type": "qwen2"},
    "perception-lm-8b": {"num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 128256},
}
"""Their public configs; eight heads of keys and values in all. What PerceptionLM sees with needs timm to build."""


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXTS)
def test_numbers_of_the_understanding_towers(name: str) -> None:
    from transformers import AutoModel, InternVLConfig, LlamaConfig, Qwen3VLConfig

    shape = find_blueprint("mos-l").understanding[name]
    text = TEXTS[name] | {"hidden_size": shape.width, "intermediate_size": shape.hidden, "num_key_value_heads": 8}
    if name == "qwen3-vl-8b":
        config: Any = Qwen3VLConfig(text_config=text, vision_config={"out_hidden_size": 4096})
    elif name == "internvl3-14b":
        config = InternVLConfig(text_config=text, vision_config={"attention_bias": True})
    else:
        config = LlamaConfig(**text)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    reader = getattr(model, "language_model", model)
    linear = sum(m.weight.numel() for m in reader.modules() if isinstance(m, torch.nn.Linear))
    assert shape.linear == linear
    assert shape.other == reader.num_parameters() - linear
    assert len(reader.layers) == shape.layers
    if reader is not model:
        assert shape.parameters == model.num_parameters()


def test_what_is_made_starts_as_the_network_does(tmp_path: Path) -> None:
    blueprint = small(depth=2, width=64)
    write_fresh_bundle(start(blueprint), tmp_path / "made")
    made = GenerationTower.from_pretrained(tmp_path / "made" / "generation")
    torch.manual_seed(1)
    real = GenerationTower(**blueprint.shape(blueprint.understanding["tiny-encoder"]).model_dump()).state_dict()
    assert set(made.state_dict()) == set(real)
    for name, weight in made.state_dict().items():
        if real[name].std() == 0 or name.endswith("modulation_bias"):
            assert torch.equal(weight, real[name]), name
        else:
            assert weight.std() == pytest.approx(real[name].std().item(), rel=0.15), name
            assert abs(weight.mean()) < 0.1 * weight.std(), name
    draws = made.eval().project_states(torch.randn(1, 4, 4, 32))
    picture, _ = made(torch.randn(1, 4, 8, 8), torch.tensor([0.5]), draws)
    assert not picture.any()


def test_shards_hold_the_same_weights_whatever_their_size(tmp_path: Path) -> None:
    blueprint = small(width=64)
    for name, changes in (("one", {}), ("many", {"shard": 60_000}), ("other", {"seed": 1})):
        write_fresh_bundle(start(blueprint, **changes), tmp_path / name)
    one, many, other = (GenerationTower.from_pretrained(tmp_path / n / "generation") for n in ("one", "many", "other"))
    assert [path.name for path in (tmp_path / "one" / "generation").glob("*.safetensors")] == [
        "diffusion_pytorch_model.safetensors"
    ]
    files = sorted((tmp_path / "many" / "generation").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"diffusion_pytorch_model-00001-of-{len(files):05}.safetensors"
    with safe_open(files[0], framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, many.state_dict()[name])
    assert not torch.equal(one.states_in.weight, other.states_in.weight)


@pytest.mark.slow
def test_memory_stays_below_a_shard_and_a_margin(tmp_path: Path) -> None:
    """In a process of its own: what its memory grows by once all is imported and used."""
    (tmp_path / "small.json").write_text(small().model_dump_json())
    (tmp_path / "big.json").write_text(small(depth=12, width=512).model_dump_json())
    code = """
import resource
from pathlib import Path
from mos_cli.bundles.blueprints import find_blueprint
from mos_cli.towers.random_weights import Start, write_fresh_bundle
for name in ("small", "big"):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write_fresh_bundle(Start(find_blueprint(f"{name}.json"), "tiny-encoder", None, 0, 8_000_000), Path(name))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    written = sum(path.stat().st_size for path in (tmp_path / "big").rglob("*.safetensors"))
    shard, margin = 8_000_000, 24_000_000
    assert written > 2 * (shard + margin)
    assert int(done.stdout) < shard + margin


def test_a_bundle_with_its_tower_draws(tmp_path: Path, cache: Path, encoder_folder: Path) -> None:
    from mos_cli.config.recipe import Recipe
    from mos_cli.inference.pipeline import MoSPipeline

    write_fresh_bundle(start(small(), understanding=encoder_folder), tmp_path / "made")
    bundle = find_bundle(str(tmp_path / "made"))
    verify_bundle(bundle)
    tower = fetch_tower(bundle.index.understanding)
    pipeline = MoSPipeline(bundle, tower, device=torch.device("cpu"), precision="fp32")
    recipe = Recipe(
        prompt="a red apple", negative="", model="made", seed=1, steps=2, cfg=2.0, cfg_interval=(0.0, 1.0),
        width=32, height=32, precision="fp32",
    )  # fmt: skip
    assert pipeline.draw(recipe).image.size == (32, 32)


def test_without_its_tower_it_is_no_bundle_yet_but_can_be_planned(mos, tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text(small().model_dump_json())
    result = mos("models", "init", tmp_path / "b.json", "--out", tmp_path / "made")
    assert result.exit_code == 0, result.output
    assert "--tower DIR" in result.output
    with pytest.raises(ModelError, match="no bundle"):
        find_bundle(str(tmp_path / "made"))
    assert mos("plan", tmp_path / "made", "--max-vram", 8).exit_code == 0


def test_init_refuses_in_one_line(mos, tmp_path: Path, decoder_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="exists"):
        write_fresh_bundle(start(small()), tmp_path / "there")
    with pytest.raises(InputError, match="cannot be a model's name"):
        write_fresh_bundle(start(small()), tmp_path / "a b")
    with pytest.raises(ModelError, match="is not tiny-encoder"):
        write_fresh_bundle(start(small(), understanding=decoder_folder), tmp_path / "made")
    full = namedtuple("Usage", "total used free")(10**9, 10**9 - 10**6, 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(InputError, match=r"0\.0 GB free, 0\.1 GB are needed"):
        write_fresh_bundle(start(small()), tmp_path / "made")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.toml", "there"]
    assert mos("models", "init", "mos-x", "--out", tmp_path / "made").exit_code == ModelError.exit_code
    wrong = mos("models", "init", "mos-l", "--understanding", "gpt", "--out", tmp_path / "made")
    assert wrong.exit_code == UsageError.exit_code
