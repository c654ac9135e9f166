"""Which device draws, in which precision, and on how many threads."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from mos_cli.errors import DeviceError

if TYPE_CHECKING:
    import torch

Precision = Literal["bf16", "fp32"]


def choose_device(asked: str) -> "torch.device":
    """Resolves "auto", "cuda", "cuda:1" or "cpu".

    Raises:
        DeviceError: the device asked for is not there.
    """
    import torch

    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise DeviceError(f"unknown device '{asked}': use auto, cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise DeviceError(f"device '{asked}' is not supported: use auto, cpu or cuda")
    # A card is counted though its driver is too old to be used.
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise DeviceError(f"no GPU for device '{asked}': use --device cpu, or see `mos doctor`")
    return device


def choose_precision(device: "torch.device") -> Precision:
    """bf16 where the device computes in it natively; elsewhere it would be slower than fp32."""
    import torch

    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


def device_name(device: "torch.device") -> str:
    """The device as the record of a picture names it."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def device_threads(device: "torch.device") -> int | None:
    """The CPU threads that a device computes with; None for a GPU."""
    import torch

    return torch.get_num_threads() if device.type == "cpu" else None


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Computes on so many CPU threads within the block, whatever `OMP_NUM_THREADS` says; None changes nothing."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
