"""The precision that a device computes in unless a user names one."""

import platform
from pathlib import Path

import pytest
import torch

from mos_cli.errors import DeviceError
from mos_cli.utils import devices


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "vendor", "precision"),
    [
        (True, True, "GenuineIntel", "bf16"),
        (False, True, "GenuineIntel", "fp32"),
        (False, True, "AuthenticAMD", "bf16"),
        (False, False, "AuthenticAMD", "fp32"),
    ],
)
@pytest.mark.parametrize("linux", [True, False])
def test_a_cpu_computes_in_what_is_faster(
    amx: bool, avx512_bf16: bool, vendor: str, precision: str, linux: bool, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    cpuinfo = tmp_path / "cpuinfo"
    if linux:
        cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(devices, "CPUINFO", cpuinfo)
    monkeypatch.setattr(platform, "processor", lambda: f"64 Family 6 Model 207, {vendor}")
    assert devices.choose_precision(torch.device("cpu")) == precision


@pytest.mark.parametrize(("kind", "device"), [("Apple GPU", "mps"), ("AMD GPU", "cuda")])
def test_a_gpu_that_nothing_was_tested_on_is_refused_and_auto_is_the_cpu(kind: str, device: str, monkeypatch) -> None:
    if kind == "AMD GPU":
        monkeypatch.setattr(torch.version, "hip", "7.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    else:
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.choose_device("auto") == torch.device("cpu")
    with pytest.raises(DeviceError, match=rf"{kind} .*not supported: use --device cpu"):
        devices.choose_device(device)
