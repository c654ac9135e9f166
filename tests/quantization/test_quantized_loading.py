"""Loading quantised towers: where it is done, where the result is, and what it takes of memory."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mos_cli.inference.offload import Part
from mos_cli.quantization.checkpoint import WEIGHTS
from mos_cli.quantization.method import METHODS
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.quantized import load_generation
from tests.helpers.quantized_towers import output, same, tensors_of

CPU = torch.device("cpu")


def places(tower: GenerationTower) -> set[str]:
    """The kinds of devices that hold a tower's tensors, those that quantised layers keep beside their weights too."""
    return {tensor.device.type for tensor in tensors_of(tower)}


@pytest.mark.parametrize("method", METHODS)
def test_layers_are_quantised_in_one_place_and_kept_in_another(source: Path, method: Any) -> None:
    assert same(
        load_generation(source, method, device=CPU, quantised_on=CPU), load_generation(source, method, device=CPU)
    )
    # There is nothing to quantise with on "meta": it was done elsewhere, and all of it came home.
    assert places(load_generation(source, method, device=torch.device("meta"), quantised_on=CPU)) == {"meta"}


@pytest.mark.cuda
@pytest.mark.parametrize("method", METHODS)
def test_a_tower_quantised_on_the_card_and_kept_at_home_is_the_one_on_the_card(source: Path, method: Any) -> None:
    card = torch.device("cuda")
    there = load_generation(source, method, device=card)
    home = load_generation(source, method, device=CPU, quantised_on=card)
    assert places(home) == {"cpu"}
    assert same(there, home)
    part = Part(home, device=card)
    part.offload()
    part.onload()
    assert places(home) == {"cuda"}
    assert torch.equal(output(there), output(home))


MEASURE = """
import os
import sys
from pathlib import Path
import torch
from torch import nn
from mos_cli.quantization.method import Quantisation
from mos_cli.towers.quantized import load, quantise

def megabytes(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6

def measure(method, folder):
    if method != "none":
        quantise(nn.Sequential(nn.Linear(64, 64)), Quantisation(method=method, kept=()))
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(24)))
    before = megabytes("VmRSS")
    load(model, folder, None if method == "none" else method, kept=(), device=torch.device("cpu"))
    print(megabytes("VmHWM") - before)

for method in sys.argv[2:]:
    # The highest use is that of a process, so that each has one, with the libraries of this one.
    if os.fork() == 0:
        measure(method, Path(sys.argv[1]))
        sys.exit()
    assert os.wait()[1] == 0
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the highest use of memory where Linux tells it")
def test_loading_never_holds_a_network_twice(tmp_path: Path) -> None:
    """201 MB in bf16: in full precision it takes that and a margin, quantised less than that."""
    save_file(
        {f"{i}.weight": torch.randn(2048, 2048).bfloat16() for i in range(24)}, tmp_path / WEIGHTS, {"format": "pt"}
    )
    bounds = {"none": 240, "int8": 180, "nf4": 130}
    command = [sys.executable, "-u", "-c", MEASURE, str(tmp_path), *bounds]
    grown = map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    for (method, bound), megabytes in zip(bounds.items(), grown, strict=True):
        assert megabytes < bound, (method, megabytes)
