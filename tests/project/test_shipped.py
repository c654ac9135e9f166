"""What is shipped: the default bundle is whole and draws what it drew, towers can be read, start-up is light."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mos_cli.bundles.bundle import Bundle, find_bundle, list_bundles, list_tower_specs, load_tower_spec, verify_bundle
from mos_cli.config.settings import RunSettings, Settings, list_presets, resolve
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.understanding import UnderstandingTower

GOLDEN = Path(__file__).parents[1] / "golden"
PROMPTS = ("a dog", "a rocket, flat style", "a cat and a dog", "a rose on a sky blue background")


def test_the_shipped_bundles_match_their_hashes() -> None:
    assert RunSettings().model in list_bundles()
    for bundle in list_bundles().values():
        assert isinstance(bundle, Bundle)
        verify_bundle(bundle)
        assert (bundle.folder / "card.md").exists()


def test_the_default_bundle_is_small_and_fits_its_understanding_tower() -> None:
    bundle = find_bundle(RunSettings().model)
    assert sum(path.stat().st_size for path in bundle.folder.rglob("*") if path.is_file()) < 32e6
    assert bundle.index.understanding in list_tower_specs()


def test_every_preset_can_be_used(cache: Path) -> None:
    cards = ["gpu-12gb", "gpu-16gb", "gpu-24gb", "gpu-8gb"]
    assert [preset.name for preset in list_presets()] == ["auto", "cpu", "faithful", "fast", *cards, "quality"]
    for preset in list_presets():
        assert preset.description
        asked = preset.settings.model_dump(exclude_none=True)
        assert asked.items() <= resolve(Settings(), preset.name).model_dump().items()


def test_listings_are_one_json_object_a_line(mos) -> None:
    for listing in ("presets", "models"):
        lines = mos(listing, "ls", "--json").stdout.splitlines()
        assert len([json.loads(line)["name"] for line in lines]) > 1
    kinds = {row["name"]: row["kind"] for row in map(json.loads, lines)}
    assert (kinds["emoji"], kinds["mos-l"]) == ("bundle", "blueprint")
    assert "blueprint" in mos("models", "ls").stdout
    (line,) = mos("presets", "show", "fast", "--json").stdout.splitlines()
    assert line in mos("presets", "ls", "--json").stdout.splitlines()


def test_help_and_looking_at_traces_need_no_heavy_library() -> None:
    heavy = ["torch", "transformers", "diffusers", "huggingface_hub", "bitsandbytes", "xformers", "accelerate"]
    script = (
        "import sys; from mos_cli.cli import app; "
        f"print([m for m in {heavy} + ['numpy', 'pydantic', 'PIL'] if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_default_bundle_draws_what_it_drew(prompt: str, tmp_path: Path) -> None:
    """Golden pictures, drawn in full precision; other machines round differently, so that 30 dB are enough.

    `python tests/project/test_shipped.py` draws them anew.
    """
    golden = _golden(prompt)
    drawn = tmp_path / golden.name
    _draw(prompt, drawn)
    error = np.asarray(Image.open(drawn), float) - np.asarray(Image.open(golden), float)
    assert 10 * np.log10(255**2 / max(1e-9, np.square(error).mean())) > 30


@pytest.mark.slow
def test_a_decoder_language_model_serves_as_understanding_tower() -> None:
    from mos_cli.bundles.sources import fetch_tower

    understanding = UnderstandingTower(fetch_tower(load_tower_spec("smollm2-135m")))
    reading = understanding.encode(["a red apple left of a dog"])
    assert reading.states_BTMS.shape[2:] == (31, 576)
    spans = [(token.start, token.end) for token in reading.tokens[0]]
    assert ["a red apple left of a dog"[slice(*span)].strip() for span in spans] == [
        "a",
        "red",
        "apple",
        "left",
        "of",
        "a",
        "dog",
    ]
    tower = GenerationTower(states_layers=31, states_width=576)
    z, t = torch.randn(1, 3, 64, 64), torch.tensor([0.5])
    _, route = tower(z, t, tower.project_states(reading.states_BTMS))
    assert route.ids_BTJK.shape == (1, 7, 8, 2)
    assert route.ids_BTJK.max() < 31


def _golden(prompt: str) -> Path:
    return GOLDEN / f"{prompt.replace(',', '').replace(' ', '-')}.png"


def _draw(prompt: str, path: Path) -> None:
    command = [sys.executable, "-c", "from mos_cli.cli.app import main; main()", "generate", prompt, "--seed", "7"]
    options = ["--precision", "fp32", "--trace", "off", "-q", "--overwrite", "-o", str(path)]
    subprocess.run([*command, *options], check=True)


if __name__ == "__main__":
    for prompt in PROMPTS:
        _draw(prompt, _golden(prompt))
