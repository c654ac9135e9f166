"""Quantised towers: they reload bit by bit, keep what the policy keeps, and stay near the network they were."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, BertConfig, BertModel, LlamaConfig, LlamaModel

from mos_cli.bundles.bundle import find_bundle
from mos_cli.errors import ModelError
from mos_cli.quantization import layers as quantised_linear
from mos_cli.quantization.checkpoint import SHARDS, WEIGHTS
from mos_cli.quantization.method import METHODS, Quantisation
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.quantized import (
    GENERATION_KEPT,
    empty_generation,
    load_generation,
    quantise,
    quantise_generation,
    survey,
    understanding_config,
)
from tests.helpers.quantized_towers import output, same, small_tower
from tests.helpers.tiny_bundle import WORDS

CPU = torch.device("cpu")
bnb = quantised_linear.bitsandbytes()
QUANTISED = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
STATE = "blocks.0.mlp.down.weight.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_tower_reloads_bit_by_bit(source: Path, tmp_path: Path, method: Any) -> None:
    quantise_generation(source, tmp_path / "made", method)
    again = load_generation(tmp_path / "made", device=CPU)
    on_load = load_generation(source, method, device=CPU)
    assert same(on_load, again)
    assert torch.equal(output(on_load), output(again))
    in_memory = GenerationTower.from_pretrained(source, torch_dtype=torch.bfloat16).eval()
    quantise(in_memory, Quantisation(method=method, kept=GENERATION_KEPT))
    assert torch.equal(output(in_memory), output(again))


@pytest.mark.parametrize("method", METHODS)
def test_pieces_make_what_bitsandbytes_makes_in_one(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    monkeypatch.setattr(quantised_linear, "_AT_ONCE", 7 * 128)
    parts = quantised_linear.quantised_parts(weight, method)
    if method == "nf4":
        layer: Any = bnb.nn.Linear4bit(128, 96, bias=False, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(weight, quant_type="nf4", module=layer)
    else:
        layer = bnb.nn.Linear8bitLt(128, 96, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False)
    expected = layer.to("cpu").state_dict()
    assert parts.keys() == expected.keys()
    assert all(torch.equal(parts[name], expected[name]) for name in parts)


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_says_nothing_at_its_calls(method: Any, caplog: pytest.LogCaptureFixture, recwarn) -> None:
    """In a notebook, where nothing else silences the library."""
    caplog.set_level(logging.WARNING, logger="bitsandbytes")
    layer = nn.Linear(64, 64).eval()
    parts = quantised_linear.quantised_parts(layer.weight.detach(), method)
    made = quantised_linear.assembled(layer, method, parts, torch.device("cpu"))
    with torch.inference_mode():
        made(torch.randn(2, 64))
    assert not caplog.records
    assert not [str(warning.message) for warning in recwarn]


@pytest.mark.parametrize("method", METHODS)
def test_what_the_policy_keeps_is_not_touched(source: Path, method: Any) -> None:
    full, tower = (load_generation(source, asked, device=CPU, dtype=torch.float32) for asked in (None, method))
    layers = {name: layer for name, layer in tower.named_modules() if isinstance(layer, nn.Linear)}
    made = {name for name, layer in layers.items() if isinstance(layer, QUANTISED)}
    assert {name.split(".")[0] for name in made} == {"blocks"}
    assert made == {name for name in layers if name.startswith("blocks.")}
    for name, value in full.state_dict().items():
        if name.removesuffix(".weight") not in made:
            assert torch.equal(tower.state_dict()[name], value)


@pytest.mark.parametrize("method", METHODS)
def test_the_survey_says_beforehand_what_the_weights_take(source: Path, method: Any) -> None:
    empty = empty_generation(source)
    report = survey(empty, Quantisation(method=method, kept=GENERATION_KEPT))
    states = load_generation(source, method, device=CPU).state_dict()
    taken = sum(t.numel() * t.itemsize for name, t in states.items() if "quant_state" not in name)
    assert report.bytes_after == taken < report.bytes_before
    assert report.bytes_before == sum(t.numel() * 2 for t in empty.state_dict().values())


def test_layers_of_other_sizes_stay_and_are_named() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64), nn.Linear(64, 40), nn.Linear(64, 64))
    report = quantise(model, Quantisation(method="nf4", kept=("3",)))
    assert report.quantised == ("0",)
    assert report.kept == {"1": "sizes 32 -> 64", "2": "sizes 64 -> 40", "3": "policy"}
    assert [isinstance(layer, QUANTISED) for layer in model] == [True, False, False, False]
    with pytest.raises(ModelError, match="too small"):
        quantise(nn.Linear(8, 8), Quantisation(method="nf4", kept=()))


def test_a_name_keeps_what_is_below_it_and_nothing_beside_it() -> None:
    quantisation = Quantisation(method="nf4", kept=("modulation", "router"))
    assert quantisation.keeps("modulation")
    assert quantisation.keeps("router.blocks.0.mlp.down")
    assert not quantisation.keeps("modulation_out")
    assert not quantisation.keeps("blocks.0.router")


@pytest.mark.parametrize(("method", "bound"), [("nf4", 0.05), ("int8", 0.01)])
def test_a_trained_tower_stays_near_what_it_was(method: Any, bound: float) -> None:
    """The weights that ship, in fp32, on a noised picture of a square."""
    folder, generator = find_bundle("emoji").folder / "generation", torch.Generator().manual_seed(0)
    square = torch.full((1, 3, 64, 64), 0.8)
    square[:, :, 16:48, 16:48] = torch.tensor([0.5, -0.5, -0.6])[:, None, None]
    noise, states = (torch.randn(shape, generator=generator) for shape in (square.shape, (1, 6, 7, 384)))
    made = []
    for asked in (None, method):
        tower = load_generation(folder, asked, device=CPU, dtype=torch.float32)
        with torch.inference_mode():
            made.append(tower(0.7 * square + 0.3 * noise, torch.tensor([0.3]), tower.project_states(states))[0])
    error = (made[1] - made[0]).norm() / made[0].norm()
    assert 0 < error < bound


@pytest.mark.parametrize("method", [None, *METHODS])
def test_shards_are_read_as_one_file_is(source: Path, tmp_path: Path, method: Any) -> None:
    whole = load_generation(source, method, device=CPU)
    GenerationTower.from_pretrained(source).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert same(whole, load_generation(tmp_path / "shards", method, device=CPU))


def test_full_precision_is_read_as_diffusers_reads_it(source: Path) -> None:
    expected = GenerationTower.from_pretrained(source, torch_dtype=torch.bfloat16)
    assert same(expected, load_generation(source, device=CPU))


@pytest.mark.parametrize("choices", [{"fusion": "last"}, {"context": "tokens"}, {"context": "cross"}])
def test_other_fusions_are_quantised_too(tmp_path: Path, choices: dict[str, str]) -> None:
    small_tower(**choices).save_pretrained(tmp_path / "source")
    quantise_generation(tmp_path / "source", tmp_path / "made", "nf4")
    assert output(load_generation(tmp_path / "made", device=CPU)).isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_quantising_twice_is_refused(source: Path, tmp_path: Path, method: Any) -> None:
    quantise_generation(source, tmp_path / "made", method)
    with pytest.raises(ModelError, match=f"quantised already .{method}."):
        load_generation(tmp_path / "made", "nf4", device=CPU)


def change(file: Path, name: str, value: Tensor | None) -> None:
    """Writes a tensor in the place of another, or none."""
    tensors = load_file(file)
    tensors.pop(name, None)
    if value is not None:
        tensors[name] = value
    save_file(tensors, file, Quantisation(method="nf4", kept=GENERATION_KEPT).metadata)


def as_tensor(said: dict[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


LIES = {"quant_type": "nf4", "blocksize": 4096, "dtype": "bfloat16", "shape": [64, 64], "nested_blocksize": 256}
DAMAGE = {
    "truncated": (lambda f: f.write_bytes(f.read_bytes()[:-100]), "cannot be read"),
    "cut in its header": (lambda f: f.write_bytes(f.read_bytes()[:20]), "cannot be read"),
    "a tensor missing": (lambda f: change(f, "patches_in.bias", None), "lack patches_in.bias"),
    "a scale missing": (lambda f: change(f, "blocks.0.mlp.down.weight.absmax", None), "lack blocks.0.mlp.down"),
    "fewer scales": (
        lambda f: change(f, "blocks.0.mlp.down.weight.absmax", torch.zeros(3, dtype=torch.uint8)),
        "does not fit",
    ),
    "weights of another kind": (
        lambda f: change(f, "blocks.0.mlp.down.weight", torch.zeros(2048, 1, dtype=torch.int8)),
        "does not fit",
    ),
    "a tensor too many": (lambda f: change(f, "patches_in.extra", torch.zeros(3)), "it has no patches_in.extra"),
    "a state that lies": (lambda f: change(f, STATE, as_tensor(LIES)), "damaged"),
    "a state of noise": (lambda f: change(f, STATE, torch.full((9,), 255, dtype=torch.uint8)), "damaged"),
    "an unknown method": (
        lambda f: save_file(load_file(f), f, {"mos_quantisation": '{"method": "int3", "kept": []}'}),
        "unknown way",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_in_one_line(source: Path, tmp_path: Path, damage: str) -> None:
    quantise_generation(source, tmp_path / "made", "nf4")
    spoil, message = DAMAGE[damage]
    spoil(tmp_path / "made" / WEIGHTS)
    with pytest.raises(ModelError, match=message) as caught:
        load_generation(tmp_path / "made", device=CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "damaged"), ('{"weight_map": {"a": "../a.safetensors"}}', "not beside"), ('{"weight_map": 3}', "damaged")],
)
def test_a_damaged_list_of_shards_is_refused(source: Path, content: str, message: str) -> None:
    (source / SHARDS).write_text(content)
    with pytest.raises(ModelError, match=message):
        load_generation(source, device=CPU)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_an_understanding_tower_is_quantised_on_load(tmp_path: Path, method: Any, kind: str) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": len(WORDS),
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    # 96 is no multiple of 64: the layer it goes into stays.
    model = (
        BertModel(BertConfig(**sizes, intermediate_size=96))
        if kind == "encoder"
        else LlamaModel(LlamaConfig(**sizes, intermediate_size=96))
    )
    model.save_pretrained(tmp_path)
    config = understanding_config(tmp_path, method)
    made = AutoModel.from_pretrained(tmp_path, quantization_config=config, dtype=torch.bfloat16).eval()
    kinds = {name: isinstance(m, QUANTISED) for name, m in made.named_modules() if isinstance(m, nn.Linear)}
    left = {name for name, is_quantised in kinds.items() if not is_quantised}
    out_of_96 = ("mlp.down_proj",) if kind == "decoder" else ("layer.0.output.dense", "layer.1.output.dense")
    assert left == {name for name in kinds if name.endswith(out_of_96)}
    ids = torch.tensor([[2, 4, 6, 8, 3]])
    with torch.no_grad():
        states = [m(ids).last_hidden_state.float() for m in (model.eval(), made)]
    assert 0 < (states[1] - states[0]).norm() / states[0].norm() < 0.15
