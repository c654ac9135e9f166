"""LoRA files: merged into the model, recorded by their hashes, replayed, and refused where they do not fit."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mos_cli.bundles.bundle import Bundle
from mos_cli.bundles.loras import LORA_METADATA, LoraFile, parse_lora
from mos_cli.errors import InputError, ModelError, UsageError
from mos_cli.images.outputs import read_drawing
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.lora import LoraSet, add_lora, load_lora, merge_lora, save_lora
from mos_cli.towers.quantized import load_generation, quantise_generation
from mos_cli.utils.files import sha256_of

RANK, ALPHA = 4, 2.0


def write_lora(path: Path, bundle: Bundle, seed: int = 0) -> GenerationTower:
    """A random LoRA for a bundle's generation tower; the tower with it, as peft computes it."""
    tower = load_generation(bundle.folder / "generation", device=torch.device("cpu"), dtype=torch.float32)
    add_lora(tower, RANK, ALPHA)
    torch.manual_seed(seed)
    weights = {name: weight for name, weight in tower.named_parameters() if ".lora_" in name}
    assert len(weights) == 2 * 5 * 3
    for weight in weights.values():
        # Values that bfloat16 holds exactly.
        weight.data = torch.randn(weight.shape).mul(0.2).bfloat16().float()
    save_lora(path, weights, RANK, ALPHA)
    return tower


def draw(mos, path: Path, *options: object) -> Image.Image:
    result = mos("generate", "a dog", "-s", 1, "--precision", "fp32", "-o", path, *options)
    assert result.exit_code == 0, result.stderr
    return Image.open(path)


def test_a_merged_lora_computes_what_peft_computes(bundle: Bundle, tmp_path: Path) -> None:
    tower = write_lora(tmp_path / "a.safetensors", bundle)
    merged = load_generation(
        bundle.folder / "generation",
        device=torch.device("cpu"),
        dtype=torch.float32,
        loras=LoraSet.of([LoraFile(tmp_path / "a.safetensors")]),
    )
    states, t, z = torch.randn(1, 5, 4, 32), torch.tensor([0.4]), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected, drawn = (one(z, t, one.project_states(states))[0] for one in (tower.eval(), merged))
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)
    plain = GenerationTower(**dict(merged.config))
    plain.load_state_dict(merge_lora(tower.state_dict(), RANK, ALPHA))
    torch.testing.assert_close(plain.state_dict(), dict(merged.state_dict()), rtol=1e-5, atol=1e-6)


def test_the_file_is_one_of_diffusers(bundle: Bundle, tmp_path: Path) -> None:
    """Names and header are those that diffusers writes and reads: `transformer.LAYER.lora_A.weight`."""
    from diffusers.loaders.peft import PeftAdapterMixin

    class Loading(GenerationTower, PeftAdapterMixin):
        pass

    tower = write_lora(tmp_path / "a.safetensors", bundle)
    loading = Loading(**{name: value for name, value in tower.config.items() if not name.startswith("_")})
    loading.load_lora_adapter(load_file(tmp_path / "a.safetensors"), network_alphas=None, prefix="transformer")
    loaded = {name: weight for name, weight in loading.state_dict().items() if ".lora_" in name}
    assert len(loaded) == 2 * 5 * 3
    assert loading.peft_config["default_0"].r == RANK


def test_pictures_record_a_lora_and_replay_with_it(mos, bundle: Bundle, tmp_path: Path) -> None:
    write_lora(tmp_path / "a.safetensors", bundle)
    plain = draw(mos, tmp_path / "plain.png")
    changed = draw(mos, tmp_path / "changed.png", "--lora", tmp_path / "a.safetensors")
    assert plain.tobytes() != changed.tobytes()
    assert draw(mos, tmp_path / "none.png", "--lora", f"{tmp_path}/a.safetensors:0").tobytes() == plain.tobytes()
    half = draw(mos, tmp_path / "half.png", "--lora", f"{tmp_path}/a.safetensors:0.5")
    twice = [option for _ in range(2) for option in ("--lora", f"{tmp_path}/a.safetensors:0.25")]
    assert half.tobytes() not in (plain.tobytes(), changed.tobytes())
    draw(mos, tmp_path / "twice.png", *twice)
    recorded = read_drawing(tmp_path / "half.png")[1].recipe.loras
    assert recorded is not None
    assert [(one.name, one.scale) for one in recorded] == [("a.safetensors", 0.5)]
    assert recorded[0].sha256 == sha256_of(tmp_path / "a.safetensors")
    assert read_drawing(tmp_path / "plain.png")[1].recipe.loras is None
    for name in ("changed", "half", "twice"):
        result = mos("replay", tmp_path / f"{name}.png", "--verify")
        assert (result.exit_code, result.stdout.strip()) == (0, "exact"), result.stderr


def test_a_lora_that_is_gone_or_another_is_refused_in_a_line(mos, bundle: Bundle, tmp_path: Path) -> None:
    lora = tmp_path / "a.safetensors"
    write_lora(lora, bundle)
    draw(mos, tmp_path / "p.png", "--lora", lora)
    moved = lora.rename(tmp_path / "moved.safetensors")
    result = mos("replay", tmp_path / "p.png", "--verify")
    assert result.exit_code == 3
    assert "--lora FILE" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert mos("replay", tmp_path / "p.png", "--verify", "--lora", moved).stdout.strip() == "exact"
    moved.unlink()
    write_lora(lora, bundle, seed=1)
    for options, words in (((), "no longer at"), (("--lora", lora), "is another")):
        result = mos("replay", tmp_path / "p.png", "--verify", *options)
        assert result.exit_code == 3
        assert words in result.stderr


def test_what_is_no_lora_or_does_not_fit_is_refused_in_a_line(mos, bundle: Bundle, tmp_path: Path) -> None:
    good = tmp_path / "a.safetensors"
    write_lora(good, bundle)
    tensors = load_file(good)
    first = next(name for name in tensors if name.endswith("to_out.lora_A.weight"))
    bad = {
        "nan": tensors | {first: torch.full_like(tensors[first], torch.nan)},
        "other": tensors | {first: torch.zeros(RANK, 7)},
        "stranger": {name.replace("blocks.0", "blocks.9"): tensor for name, tensor in tensors.items()},
        "half": {name: tensor for name, tensor in tensors.items() if name != first},
        "weights": {"blocks.0.attention.to_out.weight": torch.zeros(4, 4)},
    }
    for name, content in bad.items():
        save_file(content, tmp_path / f"{name}.safetensors")
    (tmp_path / "noise.safetensors").write_bytes(b"noise" * 100)
    (tmp_path / "a.bin").write_bytes(b"")
    said = {
        "nan": "not finite",
        "other": "does not fit",
        "stranger": "no layer",
        "half": "lacks one of its two parts",
        "weights": "no LoRA file",
        "noise": "no LoRA file",
    }
    for name, words in said.items():
        result = mos("generate", "a dog", "-o", tmp_path / "no.png", "--lora", tmp_path / f"{name}.safetensors")
        assert result.exit_code in (3, 4), name
        assert words in result.stderr, result.stderr
        assert [line[:6] for line in result.stderr.splitlines() if "fetching" not in line] == ["error:"]
    with pytest.raises(InputError, match="must end in"):
        parse_lora(str(tmp_path / "a.bin"))
    with pytest.raises(InputError, match="no LoRA file"):
        parse_lora(f"{tmp_path}/none.safetensors:1")
    for scale in ("x", "nan", "inf"):
        with pytest.raises(UsageError, match="FILE:SCALE"):
            parse_lora(f"{good}:{scale}")
    assert parse_lora(f"{good}:-0.5").scale == -0.5
    assert load_lora(good).factor == ALPHA / RANK


@pytest.mark.parametrize(
    "settings",
    [{"use_rslora": True}, {"alpha_pattern": {"blocks.0": 8}}, {"lora_alpha": float("nan")}, {"lora_alpha": "2"}],
)
def test_settings_that_are_not_read_are_refused(tmp_path: Path, settings: dict[str, object]) -> None:
    tensors = {f"blocks.0.to_out.lora_{part}.weight": torch.ones(RANK, RANK) for part in "AB"}
    save_file(tensors, tmp_path / "a.safetensors", {LORA_METADATA: json.dumps({"r": RANK} | settings)})
    with pytest.raises(InputError, match=r"one alpha|lora_alpha"):
        load_lora(tmp_path / "a.safetensors")


@pytest.mark.parametrize("ranks", [(0, 0), (4, 8)])
def test_layers_share_a_rank_above_zero(tmp_path: Path, ranks: tuple[int, int]) -> None:
    tensors = {}
    for layer, rank in enumerate(ranks):
        tensors[f"blocks.{layer}.to_out.lora_A.weight"] = torch.ones(rank, 6)
        tensors[f"blocks.{layer}.to_out.lora_B.weight"] = torch.ones(6, rank)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="rank"):
        load_lora(tmp_path / "a.safetensors")


def test_a_lora_goes_with_quantisation_on_load_and_not_with_a_quantised_model(tmp_path: Path) -> None:
    """On load the sum is quantised; what is quantised already cannot be changed."""
    cpu = torch.device("cpu")
    tower = GenerationTower(**{"width": 128, "depth": 1, "heads": 2, "hidden": 64, "states_width": 64})
    tower.save_pretrained(plain := tmp_path / "plain" / "generation")
    add_lora(tower, RANK, ALPHA)
    weights = {name: torch.ones_like(weight) for name, weight in tower.named_parameters() if ".lora_" in name}
    save_lora(tmp_path / "a.safetensors", weights, RANK, ALPHA)
    loras = LoraSet.of([LoraFile(tmp_path / "a.safetensors")])
    load_generation(plain, device=cpu, loras=loras).save_pretrained(merged := tmp_path / "merged" / "generation")
    changed, expected, other = (
        load_generation(folder, "int8", device=cpu, loras=chosen).state_dict()
        for folder, chosen in ((plain, loras), (merged, LoraSet()), (plain, LoraSet()))
    )
    assert changed.keys() == expected.keys()
    assert all(torch.equal(changed[name], expected[name]) for name in changed)
    assert not all(torch.equal(changed[name], other[name]) for name in changed)
    (quantised := tmp_path / "quantised").mkdir()
    quantise_generation(plain, quantised, "int8")
    with pytest.raises(ModelError, match="use a LoRA with the model it was made from"):
        load_generation(quantised, device=cpu, loras=loras)


def test_the_python_interface_takes_loras(bundle: Bundle, tmp_path: Path) -> None:
    from mos_cli import load

    write_lora(tmp_path / "a.safetensors", bundle)
    drawn = load("tiny", loras=[f"{tmp_path}/a.safetensors:0.5"]).generate("a dog", seed=1)
    assert drawn.record.recipe.loras is not None
    assert drawn.record.recipe.loras[0].scale == 0.5
