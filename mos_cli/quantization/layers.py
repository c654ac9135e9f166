"""Quantised linear layers of bitsandbytes: the tensors that replace a weight, and the layer made of them.

NF4 has 4 bits per weight and a scale for every 64, which is quantised itself (double quantisation). int8 has 8 bits and
a scale for every row; its inputs are quantised row by row, too.
"""

import json
import logging
from collections.abc import Mapping
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from mos_cli.errors import DeviceError, ModelError
from mos_cli.quantization.method import Method

COMPUTE = torch.bfloat16
"""The type in which NF4 layers compute, and that of weights before they are quantised."""
COLUMNS, ROWS = 64, 32
"""bitsandbytes supports on every CPU inputs and outputs whose sizes are multiples of these."""

_AT_ONCE = 2**18
"""Weights quantised at once: bitsandbytes needs about 17 bytes for each on a CPU."""
_STATE = "weight.quant_state.bitsandbytes__nf4"


def bitsandbytes() -> Any:
    """The library, imported on first use: the import takes seconds, and not every platform has it."""
    try:
        import bitsandbytes as library
    except ImportError:
        raise DeviceError("quantised models need bitsandbytes, which is not installed here") from None
    # An int8 layer warns at every call that it computes in half precision, as it always does.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return library


def expected_parts(method: Method, layer: nn.Linear) -> dict[str, tuple[torch.dtype, tuple[int, ...] | None]]:
    """Type and shape of the tensors that replace a quantised weight, by their names in the layer's state."""
    rows, columns = layer.out_features, layer.in_features
    if method == "int8":
        return {
            "weight": (torch.int8, (rows, columns)),
            "SCB": (torch.float32, (rows,)),
            "weight_format": (torch.uint8, ()),
        }
    scales = rows * columns // COLUMNS
    return {
        "weight": (torch.uint8, (rows * columns // 2, 1)),
        "weight.absmax": (torch.uint8, (scales,)),
        "weight.quant_map": (torch.float32, (16,)),
        "weight.nested_absmax": (torch.float32, (ceil(scales / 256),)),
        "weight.nested_quant_map": (torch.float32, (256,)),
        _STATE: (torch.uint8, None),
    }


def quantised_parts(weight: Tensor, method: Method, device: torch.device | None = None) -> dict[str, Tensor]:
    """Quantises a weight to the tensors of `expected_parts`, in pieces; equal to bitsandbytes' result in one piece."""
    functional = bitsandbytes().functional
    rows = max(1, _AT_ONCE // weight.shape[1])
    pieces = (piece.to(device or weight.device, COMPUTE) for piece in weight.split(rows))
    if method == "int8":
        made = [functional.int8_vectorwise_quant(piece.half())[:2] for piece in pieces]
        values, scales = (torch.cat(parts) for parts in zip(*made, strict=True))
        return {"weight": values, "SCB": scales, "weight_format": torch.zeros((), dtype=torch.uint8)}
    made = [functional.quantize_4bit(piece, blocksize=COLUMNS, quant_type="nf4") for piece in pieces]
    scales = torch.cat([state.absmax for _, state in made])
    offset = scales.mean()
    scales, nested = functional.quantize_blockwise(scales - offset, blocksize=256)
    state = functional.QuantState(
        scales, weight.shape, made[0][1].code, COLUMNS, "nf4", COMPUTE, offset=offset, state2=nested
    )
    named = {f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}
    return {"weight": torch.cat([values for values, _ in made]), **named}


def check_state(parts: Mapping[str, Tensor], name: str, layer: nn.Linear) -> None:
    """Checks the description of an NF4 weight in a file, which the kernels do not; raises ModelError."""
    if _STATE not in parts:
        return
    expected = {
        "quant_type": "nf4",
        "blocksize": COLUMNS,
        "dtype": "bfloat16",
        "shape": [layer.out_features, layer.in_features],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
    }
    try:
        stored = json.loads(parts[_STATE].numpy().tobytes())
        assert isinstance(stored.pop("nested_offset"), float)
    except (ValueError, KeyError, AttributeError, AssertionError):
        stored = None
    if stored != expected:
        raise ModelError(f"{name} is not quantised as it should be: the file is damaged")


def assembled(layer: nn.Linear, method: Method, parts: Mapping[str, Tensor], device: torch.device) -> nn.Linear:
    """The bitsandbytes layer that replaces `layer`, with its bias."""
    nn_ = bitsandbytes().nn
    sizes = (layer.in_features, layer.out_features, layer.bias is not None)
    if method == "int8":
        made = nn_.Linear8bitLt(*sizes, has_fp16_weights=False, device="meta")
        values, scales = parts["weight"].to(device), parts["SCB"].to(device)
        made.weight = nn_.Int8Params(values, requires_grad=False, CB=values, SCB=scales)
    else:
        made = nn_.Linear4bit(*sizes, COMPUTE, quant_type="nf4", device="meta")
        stats = {name.removeprefix("weight."): part for name, part in parts.items() if name != "weight"}
        made.weight = nn_.Params4bit.from_prequantized(parts["weight"], stats, device=device, module=made)
    made.bias = layer.bias
    return made.train(layer.training)
