"""What is shipped: bundles match their hashes, and the default bundle draws the golden pictures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mos_cli.bundles.adapters import AdapterBundle
from mos_cli.bundles.bundle import Bundle, find_bundle, list_bundles, list_tower_specs, verify_bundle
from mos_cli.config.settings import RunSettings
from mos_cli.images.differences import psnr

GOLDEN = Path(__file__).parents[1] / "golden"
PROMPTS = ("a dog", "a rocket, flat style", "a cat and a dog", "a rose on a sky blue background")


def test_the_shipped_bundles_match_their_hashes() -> None:
    assert RunSettings().model in list_bundles()
    for bundle in list_bundles().values():
        assert isinstance(bundle, Bundle)
        if isinstance(bundle, AdapterBundle):
            continue
        verify_bundle(bundle)
        assert (bundle.folder / "card.md").exists()


def test_the_default_bundle_is_small_and_fits_its_understanding_tower() -> None:
    bundle = find_bundle(RunSettings().model)
    assert sum(path.stat().st_size for path in bundle.folder.rglob("*") if path.is_file()) < 64e6
    assert bundle.index.understanding in list_tower_specs()


@pytest.mark.slow
def test_the_default_bundle_draws_what_it_drew(tmp_path: Path) -> None:
    """Golden pictures, drawn in full precision; other machines round differently, so that 30 dB are enough.

    `python tests/project/test_shipped.py` draws them anew.
    """
    _draw(tmp_path)
    for prompt in PROMPTS:
        drawn, golden = (Image.open(folder / _name(prompt)) for folder in (tmp_path, GOLDEN))
        assert psnr(drawn, golden) > 30, prompt


def _name(prompt: str) -> str:
    return f"{prompt.replace(',', '').replace(' ', '-')}.png"


def _draw(folder: Path) -> None:
    """Draws all, each with seed 7, in a process of its own: with the user's cache and model."""
    jobs = [{"prompt": prompt, "seed": 7, "output": str(folder / _name(prompt))} for prompt in PROMPTS]
    command = [sys.executable, "-c", "from mos_cli.__main__ import main; main()", "run", "-"]
    options = ["--precision", "fp32", "--trace", "off", "-q", "--overwrite"]
    subprocess.run([*command, *options], input="\n".join(map(json.dumps, jobs)), text=True, check=True)


if __name__ == "__main__":
    _draw(GOLDEN)
