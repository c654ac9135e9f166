"""LoRA files on base models: loaded, named and scaled by diffusers and peft."""

from collections.abc import Sequence
from typing import Any

import torch

from mos_cli.bundles.loras import LoraFile
from mos_cli.errors import InputError, ModelError, UsageError
from mos_cli.utils.extras import require

PREFIX = "transformer."
"""What diffusers puts before the names of a transformer's layers."""


def add_loras(pipe: Any, loras: Sequence[LoraFile], name: str, *, quantised: bool) -> None:
    """Adds LoRA files to the transformer of a pipeline, in every format that diffusers reads for it.

    Args:
        name: the base model's, for messages.
        quantised: whether the transformer is quantised.

    Raises:
        UsageError: peft is missing, the transformer is quantised, or diffusers has no LoRA for this base model.
        InputError: a file is no LoRA, is damaged, or has values that are not finite.
        ModelError: a LoRA changes layers that the transformer does not have, or has in another size.
    """
    if not loras:
        return
    check_takes_loras(pipe, name)
    if quantised:
        raise UsageError(f"{name} takes a LoRA only where its transformer is not quantised: leave out --quant")
    layers = {layer for layer, _ in pipe.transformer.named_modules()}
    for index, lora in enumerate(loras):
        file = lora.path
        try:
            weights = pipe.lora_state_dict(str(file), use_safetensors=True, local_files_only=True)
        except Exception:  # the formats of other tools are converted, and what is none of them fails in any way
            raise InputError(f"{file} is no LoRA file, or damaged") from None
        if not weights or not all("lora" in key or "lokr" in key for key in weights):
            raise InputError(f"{file} is no LoRA file: it has other weights")
        for key, weight in weights.items():
            layer = key.removeprefix(PREFIX).partition(".lora_")[0].partition(".lokr_")[0]
            if not key.startswith(PREFIX) or layer not in layers:
                raise ModelError(f"the LoRA {file.name} does not fit {name}, which has no layer {layer}")
            if isinstance(weight, torch.Tensor) and not weight.isfinite().all():
                raise InputError(f"{file} has values that are not finite")
        try:
            pipe.load_lora_weights(str(file), adapter_name=_adapter(index), use_safetensors=True, local_files_only=True)
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            reason = str(error).strip().splitlines()[-1].strip()[:200]
            raise ModelError(f"the LoRA {file.name} does not fit {name}: {reason}") from None
    pipe.set_adapters([_adapter(index) for index in range(len(loras))], [lora.scale for lora in loras])


def check_takes_loras(pipe: Any, name: str) -> None:
    """Raises UsageError if peft is missing, or diffusers has no LoRA for this base model."""
    require("a LoRA for a base model", "train", "peft")
    if not hasattr(pipe.transformer, "load_lora_adapter"):
        raise UsageError(f"{name} takes no LoRA: diffusers loads none for its transformer")


def _adapter(index: int) -> str:
    return f"lora_{index}"
