"""The precision that a device computes in unless a user names one."""

import platform
from pathlib import Path

import pytest
import torch

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
