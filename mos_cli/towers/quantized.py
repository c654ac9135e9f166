"""Quantised towers: which layers are quantised, and loading weights one tensor at a time.

The layers that stay in high precision depend on the kind of tower; docs/quantisation.md has the measurements. `load` is
used for full precision, too: no tower is in memory twice.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mos_cli.errors import ModelError
from mos_cli.quantization.checkpoint import WEIGHTS, Checkpoint
from mos_cli.quantization.layers import (
    COLUMNS,
    COMPUTE,
    ROWS,
    assembled,
    bitsandbytes,
    check_state,
    expected_parts,
    quantised_parts,
)
from mos_cli.quantization.method import Method, Quantisation
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.lora import LoraSet
from mos_cli.utils.migration import current_fields

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

GENERATION_KEPT = (
    # Quantised to NF4, it causes 0.045 of the whole error of 0.057, with 0.5 % of the weights.
    "patches_out",
    # Its choices are discrete: in NF4 2 % of them change, up to 7 % over a picture.
    "router",
    # All inputs pass these: their squared error per weight is 16 and 4 times that of the blocks.
    "patches_in",
    "states_in",
    # Hardly more sensitive than a block, but shared by all blocks and 1 to 2 % of a large tower.
    "time_in",
    "modulation",
    "modulation_out",
    # Used once per edit, so there is no time to save; most sizes of image_states_in cannot be quantised.
    "reference_in",
    "image_states_in",
)
UNDERSTANDING_KEPT = (
    # Not used: the states are taken before it.
    "lm_head",
    # The vision part, small compared with the language model. Not measured.
    "visual",
    "vision_tower",
    # The projection between the two, one or two layers.
    "multi_modal_projector",
)

_Model = TypeVar("_Model", bound=nn.Module)


@dataclass(frozen=True)
class QuantisationReport:
    """The quantised and kept linear layers of a network, `kept` with the reasons, and the bytes of all its weights."""

    quantised: tuple[str, ...]
    kept: dict[str, str]
    bytes_before: int
    bytes_after: int


def survey(model: nn.Module, quantisation: Quantisation, dtype: torch.dtype = COMPUTE) -> QuantisationReport:
    """Which layers of a network `quantisation` quantises. The network may be on the meta device, without weights.

    Layers whose sizes bitsandbytes does not support on every CPU stay: inputs must be multiples of 64, outputs of 32.

    Args:
        dtype: the type of the tensors that are not quantised.
    """
    quantised, kept, saved = [], {}, 0
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        if quantisation.keeps(name):
            kept[name] = "policy"
        elif layer.in_features % COLUMNS or layer.out_features % ROWS:
            kept[name] = f"sizes {layer.in_features} -> {layer.out_features}"
        else:
            quantised.append(name)
            parts = expected_parts(quantisation.method, layer).values()
            needed = sum(prod(size) * kind.itemsize for kind, size in parts if size is not None)
            saved += layer.weight.numel() * dtype.itemsize - needed
    tensors = model.state_dict().values()
    before = sum(t.numel() * (dtype if t.is_floating_point() else t.dtype).itemsize for t in tensors)
    return QuantisationReport(tuple(quantised), kept, before, before - saved)


def quantise(model: nn.Module, quantisation: Quantisation, device: torch.device | None = None) -> QuantisationReport:
    """Quantises a network in place, layer by layer on `device`, by default where it is; the layers stay there.

    Raises ModelError if none of its layers can be quantised.
    """
    report = _nonempty_survey(model, quantisation)
    for name in report.quantised:
        layer = _linear(model, name)
        on = device or layer.weight.device
        parts = quantised_parts(layer.weight.detach(), quantisation.method, on)
        model.set_submodule(name, assembled(layer, quantisation.method, parts, on))
    return report


def load(
    model: _Model,
    folder: Path,
    method: Method | None = None,
    *,
    kept: tuple[str, ...],
    device: torch.device,
    quantised_on: torch.device | None = None,
    dtype: torch.dtype = COMPUTE,
    loras: LoraSet = LoraSet(),
) -> _Model:
    """Fills a network that is on the meta device from a checkpoint, moving each tensor to the device as it is read.

    A quantised checkpoint is loaded as it is. With a method, layers of another are quantised while they are read. Main
    memory holds one tensor at a time.

    Args:
        kept: modules that stay in high precision where layers are quantised here.
        quantised_on: the device on which layers are quantised, by default `device`. A GPU is faster than a CPU; the
            results may differ in single bits.
        dtype: the type of the tensors that are not quantised.
        loras: what is added to the weights before they are rounded or quantised.

    Raises:
        ModelError: the checkpoint is damaged, of another network, or quantised already while a method or LoRAs are
            given; or a LoRA does not fit.
    """
    checkpoint = Checkpoint(folder)
    stored = checkpoint.quantisation
    if stored is not None and method is not None:
        raise ModelError(
            f"{folder} is quantised already ({stored.method}): use it as it is, or the model it was made from"
        )
    if stored is not None and loras.loras:
        raise ModelError(
            f"{folder} is quantised already: use a LoRA with the model it was made from, and --quant {stored.method}"
        )
    loras.check(model, f"the model in {folder.parent}")
    quantisation = stored if method is None else Quantisation(method=method, kept=kept)
    quantised = () if quantisation is None else _nonempty_survey(model, quantisation).quantised
    unread = set(checkpoint.names)

    def take(name: str, size: Sequence[int] | None, kind: torch.dtype | None = None) -> Tensor:
        tensor = checkpoint.read(name)
        unread.discard(name)
        fits = tensor.is_floating_point() if kind is None else tensor.dtype == kind
        if not fits or (size is not None and tensor.shape != tuple(size)):
            raise ModelError(f"{name} in {folder} does not fit: it is {tensor.dtype} of {tuple(tensor.shape)}")
        # The extremes are found without a copy of the tensor, and NaN is one.
        if kind is None and not torch.stack(tensor.aminmax()).isfinite().all():
            raise ModelError(f"the weights in {folder} cannot be used: {name} has values that are not finite")
        return tensor if kind is not None else loras.merged(name, tensor)

    weights = {f"{name}.weight" for name in quantised}
    for name, empty in list(model.state_dict().items()):
        if name not in weights:
            _place(model, name, take(name, empty.shape).to(device, dtype))
    for name in quantised:
        assert quantisation is not None
        layer = _linear(model, name)
        if stored is None:
            weight = take(f"{name}.weight", layer.weight.shape)
            parts = quantised_parts(weight, quantisation.method, quantised_on or device)
        else:
            expected = expected_parts(quantisation.method, layer)
            parts = {part: take(f"{name}.{part}", size, kind) for part, (kind, size) in expected.items()}
            check_state(parts, name, layer)
        model.set_submodule(name, assembled(layer, quantisation.method, parts, device))
    if unread:
        raise ModelError(f"the weights in {folder} are of another network: it has no {min(unread)}")
    return model.eval().requires_grad_(False)


def empty_generation(folder: Path) -> GenerationTower:
    """The generation tower of the config in `folder`, on the meta device, without weights."""
    with torch.device("meta"):
        return GenerationTower.from_config(current_fields(GenerationTower.load_config(folder)))  # type: ignore[return-value]


def load_generation(
    folder: Path,
    method: Method | None = None,
    *,
    device: torch.device,
    quantised_on: torch.device | None = None,
    dtype: torch.dtype = COMPUTE,
    loras: LoraSet = LoraSet(),
) -> GenerationTower:
    """The generation tower in `folder`, quantised while it is loaded where a method is given; see `load`.

    Raises ModelError as `load` does, and diffusers' own errors where the config is missing or damaged.
    """
    tower = empty_generation(folder)
    return load(
        tower,
        folder,
        method,
        kept=GENERATION_KEPT,
        device=device,
        quantised_on=quantised_on,
        dtype=dtype,
        loras=loras,
    )


def save_quantised(tower: GenerationTower, quantisation: Quantisation, folder: Path) -> None:
    """Writes a quantised tower with its config. It must not have run: on CPUs the first call repacks the weights."""
    states = (getattr(module, "quant_state", None) for module in tower.modules())
    assert not any(getattr(state, "packing_format_for_cpu", False) for state in states)
    tower.save_config(folder)
    save_file(tower.state_dict(), folder / WEIGHTS, quantisation.metadata)
    # safetensors creates files that only their owner may read.
    shutil.copymode(folder / tower.config_name, folder / WEIGHTS)


def quantise_generation(source: Path, folder: Path, method: Method) -> QuantisationReport:
    """Writes the generation tower in `source`, quantised, to `folder`; raises as `load_generation` does."""
    quantisation = Quantisation(method=method, kept=GENERATION_KEPT)
    report = survey(empty_generation(source), quantisation)
    save_quantised(load_generation(source, method, device=torch.device("cpu")), quantisation, folder)
    return report


def understanding_config(folder: Path, method: Method) -> "BitsAndBytesConfig":
    """The `quantization_config` with which transformers quantises the understanding tower in `folder` on load."""
    from transformers import AutoConfig, AutoModel, BitsAndBytesConfig

    bitsandbytes()
    with torch.device("meta"):
        # Of a vision-language model the language part is quantised. Names are those of the part loaded alone.
        model = AutoModel.from_config(AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config())
    report = _nonempty_survey(model, Quantisation(method=method, kept=UNDERSTANDING_KEPT))
    return BitsAndBytesConfig(
        load_in_4bit=method == "nf4",
        load_in_8bit=method == "int8",
        llm_int8_skip_modules=list(report.kept),
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=COMPUTE,
    )


def _nonempty_survey(model: nn.Module, quantisation: Quantisation) -> QuantisationReport:
    report = survey(model, quantisation)
    if not report.quantised:
        raise ModelError(
            "no layer of this model can be quantised: "
            f"inputs must be multiples of {COLUMNS} and outputs of {ROWS}, and this one is too small"
        )
    return report


def _linear(model: nn.Module, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def _place(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Replaces the parameter or buffer of this name by a tensor."""
    module, _, part = name.rpartition(".")
    owner = model.get_submodule(module)
    if part in dict(owner.named_parameters(recurse=False)):
        owner.register_parameter(part, nn.Parameter(tensor, requires_grad=False))
    else:
        owner.register_buffer(part, tensor)
