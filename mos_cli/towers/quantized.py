"""Quantised towers: which layers bitsandbytes takes over, and loading weights into them one tensor at a time.

What is kept in high precision is a policy of the kind of tower, measured in docs/quantisation.md. `load` serves full
precision, too: no tower is ever in memory twice.
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

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

GENERATION_KEPT = (
    # By itself 0.045 of NF4's whole error of 0.057, with 0.5 % of the weights.
    "patches_out",
    # Every decision is discrete: in NF4 a router reads other layers in 2 % of its choices, up to 7 % along a picture.
    "router",
    # All that comes in passes these: 16 and 4 times the squared error per weight that the blocks have.
    "patches_in",
    "states_in",
    # Hardly more sensitive than a block; kept because every block shares them and they are 1 to 2 % of a large tower.
    "time_in",
    "modulation",
    "modulation_out",
    # Used once per picture, for edits: there is no time to win, and most sizes of sight_in cannot be quantised.
    "under_in",
    "sight_in",
)
UNDERSTANDING_KEPT = (
    # The states are read before it.
    "lm_head",
    # The eyes, small beside the language model. Not measured: no pretrained one can be had here.
    "visual",
    "vision_tower",
    # What joins the two, a layer or two.
    "multi_modal_projector",
)

_Model = TypeVar("_Model", bound=nn.Module)


@dataclass(frozen=True)
class QuantizationReport:
    """What becomes of a network's linear layers, `kept` with the reason why, and the bytes of all its weights."""

    quantised: tuple[str, ...]
    kept: dict[str, str]
    bytes_before: int
    bytes_after: int


def survey(model: nn.Module, quantisation: Quantisation, dtype: torch.dtype = COMPUTE) -> QuantizationReport:
    """What `quantisation` makes of a network; it may be on the meta device, so this needs no weights.

    Layers whose sizes bitsandbytes cannot do on every CPU stay, too: it takes multiples of 64 going in, 32 coming out.

    Args:
        dtype: the type of what is not quantised.
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
            taken = sum(prod(size) * kind.itemsize for kind, size in parts if size is not None)
            saved += layer.weight.numel() * dtype.itemsize - taken
    tensors = model.state_dict().values()
    before = sum(t.numel() * (dtype if t.is_floating_point() else t.dtype).itemsize for t in tensors)
    return QuantizationReport(tuple(quantised), kept, before, before - saved)


def quantise(model: nn.Module, quantisation: Quantisation) -> QuantizationReport:
    """Quantises a network in place, on the device where it is.

    Raises ModelError if none of its layers can be quantised.
    """
    report = _report_of_some(model, quantisation)
    for name in report.quantised:
        layer = _linear(model, name)
        parts = quantised_parts(layer.weight.detach(), quantisation.method)
        model.set_submodule(name, assembled(layer, quantisation.method, parts, layer.weight.device))
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
) -> _Model:
    """Fills a network that is on the meta device from a checkpoint, one tensor at a time, each straight to the device.

    A quantised checkpoint is loaded as it is; of any other, layers are quantised while they are read if a method is
    given. The host holds one tensor at a time beside what is on the device.

    Args:
        kept: what stays in high precision where the quantising is done here.
        quantised_on: where layers are quantised, one by one, on their way to the device; by default there. A GPU is
            quicker at it than a CPU, and what it makes may differ from that in single bits.
        dtype: the type of what is not quantised.

    Raises:
        ModelError: the checkpoint is damaged, of another network, or quantised already while a method is given.
    """
    checkpoint = Checkpoint(folder)
    made = checkpoint.quantisation
    if made is not None and method is not None:
        raise ModelError(
            f"{folder} is quantised already ({made.method}): use it as it is, or the model it was made from"
        )
    wanted = made if method is None else Quantisation(method=method, kept=kept)
    chosen = () if wanted is None else _report_of_some(model, wanted).quantised
    unread = set(checkpoint.names)

    def take(name: str, size: Sequence[int] | None, kind: torch.dtype | None = None) -> Tensor:
        tensor = checkpoint.read(name)
        unread.discard(name)
        right = tensor.is_floating_point() if kind is None else tensor.dtype == kind
        if not right or (size is not None and tensor.shape != tuple(size)):
            raise ModelError(f"{name} in {folder} does not fit: it is {tensor.dtype} of {tuple(tensor.shape)}")
        return tensor

    weights = {f"{name}.weight" for name in chosen}
    for name, empty in list(model.state_dict().items()):
        if name not in weights:
            _place(model, name, take(name, empty.shape).to(device, dtype))
    for name in chosen:
        assert wanted is not None
        layer = _linear(model, name)
        if made is None:
            parts = quantised_parts(take(f"{name}.weight", layer.weight.shape), wanted.method, quantised_on or device)
        else:
            expected = expected_parts(wanted.method, layer)
            parts = {part: take(f"{name}.{part}", size, kind) for part, (kind, size) in expected.items()}
            check_state(parts, name, layer)
        model.set_submodule(name, assembled(layer, wanted.method, parts, device))
    if unread:
        raise ModelError(f"the weights in {folder} are of another network: it has no {min(unread)}")
    return model.eval().requires_grad_(False)


def empty_generation(folder: Path) -> GenerationTower:
    """The generation tower that the config in `folder` describes, on the meta device: without weights."""
    with torch.device("meta"):
        return GenerationTower.from_config(GenerationTower.load_config(folder))  # type: ignore[return-value]


def load_generation(
    folder: Path,
    method: Method | None = None,
    *,
    device: torch.device,
    quantised_on: torch.device | None = None,
    dtype: torch.dtype = COMPUTE,
) -> GenerationTower:
    """The generation tower in `folder`, quantised on the way where a method is given; see `load`.

    Raises ModelError as `load` does, and what diffusers does for a config that is missing or not one of its own.
    """
    tower = empty_generation(folder)
    return load(tower, folder, method, kept=GENERATION_KEPT, device=device, quantised_on=quantised_on, dtype=dtype)


def save_quantised(tower: GenerationTower, quantisation: Quantisation, folder: Path) -> None:
    """Writes a quantised tower with its config. It must not have run: on CPUs the first forward repacks the weights."""
    states = (getattr(module, "quant_state", None) for module in tower.modules())
    assert not any(getattr(state, "packing_format_for_cpu", False) for state in states)
    tower.save_config(folder)
    save_file(tower.state_dict(), folder / WEIGHTS, quantisation.metadata)
    # safetensors makes files that their owner alone may read.
    shutil.copymode(folder / tower.config_name, folder / WEIGHTS)


def quantise_generation(source: Path, folder: Path, method: Method) -> QuantizationReport:
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
        # What is quantised of a model that sees is its language part, by the names that has on its own.
        model = AutoModel.from_config(AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config())
    report = _report_of_some(model, Quantisation(method=method, kept=UNDERSTANDING_KEPT))
    return BitsAndBytesConfig(
        load_in_4bit=method == "nf4",
        load_in_8bit=method == "int8",
        llm_int8_skip_modules=list(report.kept),
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=COMPUTE,
    )


def _report_of_some(model: nn.Module, quantisation: Quantisation) -> QuantizationReport:
    report = survey(model, quantisation)
    if not report.quantised:
        raise ModelError(
            "no layer of this model can be quantised: "
            f"they take multiples of {COLUMNS} going in and of {ROWS} coming out, this one is too small"
        )
    return report


def _linear(model: nn.Module, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def _place(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Puts a tensor in the place of the parameter or buffer that has this name."""
    module, _, part = name.rpartition(".")
    owner = model.get_submodule(module)
    if part in dict(owner.named_parameters(recurse=False)):
        owner.register_parameter(part, nn.Parameter(tensor, requires_grad=False))
    else:
        owner.register_buffer(part, tensor)
