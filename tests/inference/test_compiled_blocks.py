"""Compiled blocks: the same picture whatever was drawn before, replayed as it was made, refused where it cannot be."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.exc import TritonMissing

from mos_cli.bundles.bundle import Bundle, write_index
from mos_cli.config.recipe import make_recipe
from mos_cli.errors import DeviceError
from mos_cli.images.outputs import read_drawing
from mos_cli.inference.pipeline import MoSPipeline
from tests.helpers.quantized_towers import small_tower


@pytest.fixture
def fresh():
    """What one test compiled is not taken again by the next."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_picture_does_not_depend_on_the_one_before_it(mos, bundle, tmp_path: Path, fresh) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog\na red apple on a green table in the snow\na cat\n")
    how = ("--compile", "--precision", "fp32", "-s", 1, "-o", f"{tmp_path}/{{number}}.png")
    assert mos("generate", f"@{prompts}", *how).exit_code == 0
    first, *_, last = sorted(tmp_path.glob("*.png"))
    assert read_drawing(last)[1].made.compiled
    torch._dynamo.reset()
    assert mos("replay", last, "--verify").stdout.strip() == "exact"
    assert mos("replay", first, "--verify", "--no-compile").stdout.startswith(("exact", "close"))


def test_compiled_blocks_cannot_be_looked_into(mos, bundle, tmp_path: Path) -> None:
    result = mos("generate", "a dog", "--compile", "--regions", "-o", tmp_path / "a.png")
    assert result.exit_code == 2
    assert "drop --regions, or draw with --no-compile" in result.stderr
    assert not list(tmp_path.glob("*.png"))


def test_nf4_weights_are_not_compiled_on_a_cpu(mos, bundle, tmp_path: Path) -> None:
    small_tower(states_width=32).save_pretrained(bundle.folder / "generation")
    kept = ("name", "description", "license", "understanding", "canvas", "defaults")
    write_index(bundle.folder, **{name: getattr(bundle.index, name) for name in kept})
    asked = ("generate", "a dog", "--quant", "none,nf4", "--device", "cpu", "-o", tmp_path / "a.png")
    result = mos(*asked, "--compile")
    assert result.exit_code == 6
    said = result.stderr.strip().splitlines()[-1]
    assert said == "error: NF4 weights cannot be compiled on a CPU: draw with --no-compile"
    assert mos(*asked, "--no-compile").exit_code == 0


@pytest.mark.slow
def test_without_a_compiler_one_line_says_so(bundle, tmp_path: Path) -> None:
    environment = os.environ | {"CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = "import sys; from mos_cli.__main__ import main; main()"
    asked = [
        "generate",
        "a dog",
        "-m",
        str(bundle.folder),
        "--compile",
        "--device",
        "cpu",
        "-o",
        str(tmp_path / "a.png"),
    ]
    run = subprocess.run([sys.executable, "-c", command, *asked], env=environment, capture_output=True, text=True)
    assert run.returncode == 6
    assert run.stderr.strip().splitlines()[-1].startswith("error: the blocks cannot be compiled here")
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("compiled", [False, True])
def test_what_a_compiler_raises_is_no_traceback(
    bundle: Bundle, encoder_folder: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    """As on a GPU that is too old for Triton. Other errors are passed on as they are."""
    options: dict[str, Any] = {"device": torch.device("cpu"), "precision": "fp32", "compiled": compiled}
    pipeline = MoSPipeline(bundle, encoder_folder, **options)
    sizes = {"width": 32, "height": 32, "steps": 1, "cfg": 1.0, "cfg_interval": (0.0, 1.0)}
    recipe = make_recipe(prompt="a dog", model="tiny", seed=1, precision="fp32", **sizes)
    for error, expected in (
        (TritonMissing(None), DeviceError if compiled else TritonMissing),
        (RuntimeError("of another kind"), RuntimeError),
    ):
        monkeypatch.setattr(pipeline.tower, "forward", raising(error))
        with pytest.raises(expected) as caught:
            pipeline.draw(recipe)
        assert (caught.value is error) == (expected is not DeviceError)
        if expected is DeviceError:
            assert "the blocks cannot be compiled here" in str(caught.value)
            assert "triton" in str(caught.value).lower()


def raising(error: Exception) -> Callable[..., None]:
    def forward(*_: object, **__: object) -> None:
        raise error

    return forward
