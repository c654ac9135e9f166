"""What is shipped: bundles match their hashes, and the default bundle draws the golden pictures."""

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
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_default_bundle_draws_what_it_drew(prompt: str, tmp_path: Path) -> None:
    """Golden pictures, drawn in full precision; other machines round differently, so that 30 dB are enough.

    `python tests/project/test_shipped.py` draws them anew.
    """
    golden = _golden(prompt)
    drawn = tmp_path / golden.name
    _draw(prompt, drawn)
    assert psnr(Image.open(drawn), Image.open(golden)) > 30


def _golden(prompt: str) -> Path:
    return GOLDEN / f"{prompt.replace(',', '').replace(' ', '-')}.png"


def _draw(prompt: str, path: Path) -> None:
    command = [sys.executable, "-c", "from mos_cli.__main__ import main; main()", "generate", prompt, "--seed", "7"]
    options = ["--precision", "fp32", "--trace", "off", "-q", "--overwrite", "-o", str(path)]
    subprocess.run([*command, *options], check=True)


if __name__ == "__main__":
    for prompt in PROMPTS:
        _draw(prompt, _golden(prompt))
