"""Choosing the device and its precision."""

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mos_cli.errors import DeviceError, UsageError

if TYPE_CHECKING:
    import torch

Precision = Literal["bf16", "fp32"]

CPUINFO = Path("/proc/cpuinfo")
"""Where Linux describes the CPU."""


def choose_device(requested: str) -> "torch.device":
    """Resolves "auto", "cuda", "cuda:1" or "cpu". "auto" is the CPU where the GPU is an unsupported one.

    Raises:
        UsageError: the text names no device.
        DeviceError: the device does not exist, or is not supported.
    """
    import torch

    unsupported = unsupported_gpu()
    if requested == "auto":
        return torch.device("cuda" if torch.cuda.is_available() and unsupported is None else "cpu")
    try:
        device = torch.device(requested)
    except RuntimeError:
        raise UsageError(f"unknown device '{requested}': use auto, cpu or cuda") from None
    if unsupported is not None and device.type in ("mps", "cuda"):
        raise DeviceError(f"{unsupported} is not supported: use --device cpu")
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"device '{requested}' is not supported: use auto, cpu or cuda")
    # device_count includes GPUs whose driver is too old.
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise DeviceError(f"no GPU for device '{requested}': use --device cpu, or see `mos doctor`")
    return device


def unsupported_gpu() -> str | None:
    """The kind of GPU that PyTorch was built for, if it is one on which nothing was ever tested."""
    import torch

    if torch.version.hip is not None:
        return "an AMD GPU (ROCm)"
    return "an Apple GPU (MPS)" if torch.backends.mps.is_available() else None


def choose_precision(device: "torch.device") -> Precision:
    """The precision in which the device computes matrix products fastest."""
    import torch

    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if torch.cpu._is_amx_tile_supported():
        return "bf16"
    # Products in AVX512-BF16 take four times less time than in fp32 on AMD, and 1.8 times more on Intel (docs/LOG.md).
    return "bf16" if torch.cpu._is_avx512_bf16_supported() and not _is_intel() else "fp32"


def _is_intel() -> bool:
    return "GenuineIntel" in (CPUINFO.read_text() if CPUINFO.exists() else platform.processor())


def device_name(device: "torch.device") -> str:
    """The name of the device for the record of a picture."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
