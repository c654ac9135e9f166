"""LoRA of linear layers (arXiv 2106.09685): trained by peft, in a generation tower merged into the weights for drawing.

A linear layer with the weight W becomes W + scale * alpha / rank * B A.
Shapes: I inputs and O outputs of a linear layer, R rank.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mos_cli.bundles.loras import LORA_METADATA, LoraFile, read_metadata
from mos_cli.errors import InputError, ModelError
from mos_cli.utils.files import atomic_write

PREFIX = "transformer."
"""What diffusers puts before the names of a transformer's layers."""
PER_LAYER = ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
"""Settings of peft with which the change of a layer is not alpha / rank B A, with the same alpha and rank for all."""


@dataclass(frozen=True)
class Lora:
    """The changes of a network's linear layers, by their names: A_RI and B_OR, and the factor alpha / rank."""

    name: str
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    factor: float

    def change(self, layer: str, scale: float) -> Tensor:
        """What is added to the weight of a layer, [O, I] in fp32."""
        a_RI, b_OR = self.pairs[layer]
        return scale * self.factor * (b_OR.float() @ a_RI.float())


def load_lora(path: Path) -> Lora:
    """Reads a LoRA file; raises InputError if it is damaged, holds other things, or is one of another kind."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    settings = read_metadata(path)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError):
        raise InputError(f"{path} is no LoRA file, or damaged") from None
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.removeprefix(PREFIX).removesuffix(".weight").rpartition(".lora_")
        if part not in ("A", "B") or tensor.ndim != 2 or not tensor.is_floating_point():
            raise InputError(f"{path} is no LoRA file of linear layers: it has {name}")
        if not tensor.isfinite().all():
            raise InputError(f"{path} cannot be used: {name} has values that are not finite")
        parts.setdefault(layer, {})[part] = tensor
    if not parts or any(len(pair) < 2 for pair in parts.values()):
        raise InputError(f"{path} is no LoRA file: a layer lacks one of its two parts")
    pairs = {layer: (pair["A"], pair["B"]) for layer, pair in parts.items()}
    ranks = {a_RI.shape[0] for a_RI, _ in pairs.values()}
    if len(ranks) > 1 or any(settings.get(name) for name in PER_LAYER):
        raise InputError(f"{path} cannot be used: it is no plain LoRA with one rank and one alpha for all layers")
    rank = ranks.pop()
    alpha = settings.get("lora_alpha", rank)
    if rank == 0 or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise InputError(f"{path} is damaged: its rank is {rank}, its lora_alpha {alpha!r}")
    return Lora(path.name, pairs, alpha / rank)


@dataclass(frozen=True)
class LoraSet:
    """LoRAs with their scales, whose changes are added to the weights of a network as they are read."""

    loras: tuple[tuple[Lora, float], ...] = ()

    @classmethod
    def of(cls, files: Iterable[LoraFile]) -> "LoraSet":
        """Reads files; raises InputError as `load_lora` does."""
        return cls(tuple((load_lora(file.path), file.scale) for file in files))

    def check(self, network: nn.Module, name: str) -> None:
        """Raises ModelError if a LoRA changes a layer that the network does not have, or has in another size."""
        layers = {layer: module for layer, module in network.named_modules() if isinstance(module, nn.Linear)}
        for lora, _ in self.loras:
            for layer, (a_RI, b_OR) in lora.pairs.items():
                module = layers.get(layer)
                if module is None:
                    raise ModelError(f"the LoRA {lora.name} does not fit {name}, which has no layer {layer}")
                size, rank = (b_OR.shape[0], a_RI.shape[1]), a_RI.shape[0]
                if size != (module.out_features, module.in_features) or b_OR.shape[1] != rank:
                    own = (module.out_features, module.in_features)
                    raise ModelError(f"the LoRA {lora.name} does not fit {name}: {layer} is {own} there, not {size}")

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """A weight by its name with the changes of all LoRAs, on the CPU."""
        layer = name.removesuffix(".weight")
        changes = [lora.change(layer, scale) for lora, scale in self.loras if layer in lora.pairs]
        return weight if not changes else torch.stack([weight.float(), *changes]).sum(0).to(weight.dtype)


def add_lora(network: nn.Module, rank: int, alpha: float, blocks: Sequence[str] = ("blocks",)) -> None:
    """Adds a LoRA to all linear layers in the lists of blocks, and makes only its weights learn."""
    from peft import LoraConfig, inject_adapter_in_model

    targets = _targets(network, blocks)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, bias="none")  # type: ignore[arg-type]
    inject_adapter_in_model(config, network)


def save_lora(path: Path, weights: Mapping[str, Tensor], rank: int, alpha: float, **metadata: str) -> None:
    """Writes the LoRA of `add_lora` by the names of its weights, in bfloat16, replacing an earlier file.

    Args:
        metadata: further entries of the header.

    Raises:
        InputError: it cannot be written, or a value is not finite.
    """
    from safetensors.torch import save

    tensors = {PREFIX + plain_name(name): weight.bfloat16().cpu().contiguous() for name, weight in weights.items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(f"the LoRA is not written: {name} has values that are not finite")
    settings = {"r": rank, "lora_alpha": alpha, "target_modules": sorted({_layer(name) for name in tensors})}
    described = json.dumps({PREFIX + name: value for name, value in settings.items()})
    data = save(tensors, {"format": "pt", LORA_METADATA: described, **metadata})
    atomic_write(path, data, overwrite=True)


def merge_lora(weights: Mapping[str, Tensor], rank: int, alpha: float) -> dict[str, Tensor]:
    """The weights of a network without LoRA from those of one with it, by the names in each."""
    plain = {name.replace(".base_layer.", "."): weight for name, weight in weights.items() if ".lora_" not in name}
    for name, b_OR in weights.items():
        if ".lora_B." in name:
            a_RI, target = weights[name.replace(".lora_B.", ".lora_A.")], f"{name.partition('.lora_B.')[0]}.weight"
            plain[target] = plain[target] + alpha / rank * (b_OR @ a_RI)
    return plain


def plain_name(name: str) -> str:
    """The name of a LoRA weight in files, from its name in a network with the adapter "default"."""
    return name.replace(".default.", ".")


def _layer(name: str) -> str:
    return name.removeprefix(PREFIX).partition(".lora_")[0]


def _targets(network: nn.Module, blocks: Sequence[str]) -> str:
    """An expression for all linear layers in the lists of blocks; a router has blocks of its own."""
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    return "|".join(name.replace(".", r"\.") for name in names if name.partition(".")[0] in blocks)
