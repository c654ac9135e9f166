"""LoRA files on base models: drawn with as diffusers does, recorded, replayed, and refused where they do not fit."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import Result

from mos_cli.adapters.pipeline import AdapterPipeline
from mos_cli.bundles.adapters import read_adapter
from mos_cli.bundles.loras import LoraFile
from mos_cli.images.outputs import read_drawing
from mos_cli.utils.files import sha256_of
from tests.helpers.adapted import PROMPT, plain_arguments, plain_pipeline, recipe_of

pytestmark = pytest.mark.usefixtures("in_fp32")
Mos = Callable[..., Result]
Folders = Callable[[str], Path]
BLOCK = {"klein": "transformer_blocks.0.attn", "z-image": "layers.1.attention"}
RANK = 2


def write_lora(folder: Path, name: str, path: Path, seed: int = 0) -> Path:
    """A random LoRA for a base model, by peft's training conventions, as diffusers saves it."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = plain_pipeline(folder)
    targets = [f"{BLOCK[name]}.{layer}" for layer in ("to_q", "to_v")]
    pipe.transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets))
    torch.manual_seed(seed)
    weights = get_peft_model_state_dict(pipe.transformer)
    weights = {key: torch.randn(weight.shape) * 0.3 for key, weight in weights.items()}
    pipe.save_lora_weights(path.parent, transformer_lora_layers=weights, weight_name=path.name)
    return path


@pytest.mark.parametrize("name", ["klein", "z-image"])
def test_pictures_are_those_of_diffusers(base_folders: Folders, tmp_path: Path, name: str) -> None:
    files = [write_lora(base_folders(name), name, tmp_path / f"{seed}.safetensors", seed) for seed in (0, 1)]
    loras = [LoraFile(path, scale) for path, scale in zip(files, (1.0, 0.5), strict=True)]
    bundle = read_adapter(base_folders(name))
    pipeline = AdapterPipeline(bundle, device=torch.device("cpu"), precision="fp32", loras=loras)  # type: ignore[arg-type]
    recipe, plain = recipe_of(pipeline), plain_pipeline(base_folders(name))
    without = plain(**plain_arguments(name, recipe)).images[0]
    for number, lora in enumerate(loras):
        plain.load_lora_weights(str(lora.path), adapter_name=str(number))
    plain.set_adapters(["0", "1"], [1.0, 0.5])
    expected, drawn = plain(**plain_arguments(name, recipe)).images[0], pipeline.draw(recipe).image
    # Some CPUs round by where in memory the weights begin.
    assert _levels_apart(drawn, expected) <= 1 < _levels_apart(drawn, without)


def _levels_apart(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max())


def test_a_lora_is_recorded_and_replayed(mos: Mos, base_folders: Folders, tmp_path: Path) -> None:
    lora = write_lora(base_folders("klein"), "klein", tmp_path / "a.safetensors")
    common = ("generate", PROMPT, "-m", base_folders("klein"), "--size", "64", "--steps", "2", "-s", "5", "-q")
    result = mos(*common, "-o", tmp_path / "a.png", "--lora", f"{lora}:0.7")
    assert result.exit_code == 0, result.output
    assert mos(*common, "-o", tmp_path / "plain.png").exit_code == 0
    assert Image.open(tmp_path / "a.png").tobytes() != Image.open(tmp_path / "plain.png").tobytes()
    (recorded,) = read_drawing(tmp_path / "a.png")[1].recipe.loras or ()
    assert (recorded.name, recorded.sha256, recorded.scale) == ("a.safetensors", sha256_of(lora), 0.7)
    verified = mos("replay", tmp_path / "a.png", "--verify")
    assert (verified.exit_code, verified.output.strip().splitlines()[-1]) == (0, "exact")
    lora.unlink()
    assert "--lora FILE" in mos("replay", tmp_path / "a.png", "--verify").stderr


def test_what_does_not_fit_is_refused_in_a_line(mos: Mos, base_folders: Folders, tmp_path: Path) -> None:
    good = write_lora(base_folders("klein"), "klein", tmp_path / "good.safetensors")
    tensors = load_file(good)
    first = next(iter(tensors))
    contents = {
        "nan": tensors | {first: torch.full_like(tensors[first], torch.nan)},
        "stranger": {key.replace("blocks.0", "blocks.7"): tensor for key, tensor in tensors.items()},
        "size": tensors | {key: torch.zeros(RANK, 5) for key in tensors if "lora_A" in key},
        "weights": {"transformer.proj_out.weight": torch.zeros(3, 3)},
        "encoder": {key.replace("transformer.", "text_encoder.", 1): tensor for key, tensor in tensors.items()},
    }
    said = {
        **{"nan": (3, "not finite"), "stranger": (4, "no layer"), "size": (4, "does not fit")},
        **{"weights": (3, "no LoRA file"), "encoder": (4, "no layer"), "noise": (3, "no LoRA file")},
    }
    for name, content in contents.items():
        save_file(content, tmp_path / f"{name}.safetensors")
    (tmp_path / "noise.safetensors").write_bytes(b"noise" * 99)
    common = ("generate", PROMPT, "--size", "64", "--steps", "1", "-o", tmp_path / "no.png", "-q")
    for name, (code, words) in said.items():
        result = mos(*common, "-m", base_folders("klein"), "--lora", tmp_path / f"{name}.safetensors")
        assert result.exit_code == code, (name, result.stderr)
        (line,) = result.stderr.strip().splitlines()
        assert words in line
    for options, words in (
        (("-m", base_folders("prx")), "prx takes no LoRA"),
        (("-m", base_folders("klein"), "--quant", "none,int8"), "leave out --quant"),
    ):
        result = mos(*common, *options, "--lora", good)
        assert (result.exit_code, words in result.stderr) == (2, True), result.stderr
    assert not (tmp_path / "no.png").exists()
