"""Bundles with random weights, made from a blueprint and written shard by shard: one shard at a time is in memory.

The weights are distributed as at the start of a training run. A test compares the rules here with `GenerationTower`:
some parameters are zero or one, the others normal noise. (The network truncates it at 2, more than 30 standard
deviations.) The autoencoder has uniform noise, as convolutions start with, and biases of zero.
"""

import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from mos_cli.bundles.blueprints import Blueprint
from mos_cli.bundles.bundle import check_new_folder, check_tower_folder, write_index
from mos_cli.bundles.shapes import UnderstandingShape
from mos_cli.bundles.specs import TOWER_SUFFIXES, FolderSource, TowerSpec
from mos_cli.errors import InputError
from mos_cli.towers.generation import GenerationTower
from mos_cli.utils.files import expand, make_folder, sha256_of
from mos_cli.utils.folders import BLUEPRINT

Values = Callable[[str, tuple[int, ...], torch.Generator], Tensor]
"""Makes the initial values of a parameter, in fp32, from its name and shape."""

_ZERO = re.compile(
    r"(modulation|modulation_out|patches_out|reference_in|blocks\.\d+\.(attention\.to_out|mlp\.down|cross\.to_out))\.weight"
)
_OTHER_FILES = 64 * 2**20
"""Bytes of the files that are no weights, at most."""


@dataclass(frozen=True)
class Start:
    """A bundle to write.

    Args:
        tower: name of one of the blueprint's understanding towers.
        understanding: the folder of that tower; without it the bundle gets no index and cannot draw.
        shard: bytes of a shard, at most.
    """

    blueprint: Blueprint
    tower: str
    understanding: Path | None
    seed: int
    shard: int


def write_fresh_bundle(start: Start, folder: Path, report: Callable[[str], None] = lambda what: None) -> None:
    """Writes a bundle with random weights; the folder appears whole or not at all.

    Every parameter has a seed of its own, so that the weights do not depend on the size of the shards.

    Raises:
        InputError: the folder exists, cannot be written or has no valid name, or the disk is too full.
        ModelError: the understanding tower does not fit the blueprint.
    """
    folder = expand(folder).absolute()
    blueprint = start.blueprint
    shape = blueprint.understanding[start.tower]
    check_new_folder(folder)
    spec = None if start.understanding is None else _tower_in(start.understanding, start.tower, shape)
    with torch.device("meta"):
        tower = GenerationTower(**blueprint.shape(shape).model_dump())
        autoencoder = AutoencoderDC.from_config(blueprint.autoencoder.config)
    assert isinstance(autoencoder, AutoencoderDC)
    _check_free_space(folder, 2 * (tower.num_parameters() + autoencoder.num_parameters()) + _OTHER_FILES)
    make_folder(folder.parent)
    made = folder.with_name(f".{secrets.token_hex(6)}")
    try:
        write_shards(tower, made / "generation", generation_values, start.seed, start.shard, report)
        write_shards(autoencoder, made / "autoencoder", autoencoder_values, start.seed, start.shard, report)
        FlowMatchEulerDiscreteScheduler().save_pretrained(made / "scheduler")
        (made / BLUEPRINT).write_text(blueprint.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (made / "card.md").write_text(_card(start), encoding="utf-8")
        if spec is not None:
            report("hashing")
            write_index(
                made,
                name=folder.name,
                description=blueprint.description,
                license=blueprint.license,
                understanding=spec,
                canvas=blueprint.canvas,
                defaults=blueprint.defaults,
                edits=blueprint.edits,
            )
        made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def write_shards(
    network: ModelMixin,
    folder: Path,
    values: Values,
    seed: int,
    shard: int,
    report: Callable[[str], None] = lambda what: None,
) -> None:
    """Writes the config and bf16 weights of a network on the meta device, in shards as diffusers names them."""
    shapes = {name: tensor.to(torch.bfloat16) for name, tensor in network.state_dict().items()}
    pattern = "diffusion_pytorch_model{suffix}.safetensors"
    split = split_torch_state_dict_into_shards(shapes, filename_pattern=pattern, max_shard_size=shard)
    network.save_config(folder)
    for number, (file, names) in enumerate(split.filename_to_tensors.items(), start=1):
        report(f"{folder.name}, shard {number} of {len(split.filename_to_tensors)}")
        save_file({name: _drawn(name, shapes[name], values, seed) for name in names}, folder / file, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / pattern.format(suffix="")).with_suffix(".safetensors.index.json").write_text(text, encoding="utf-8")


def generation_values(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """The initial values of a parameter of the generation tower, distributed as in `GenerationTower`."""
    if name.endswith("modulation_bias"):
        gates = torch.zeros(shape)
        gates[[2, 5]] = 1.0
        return gates
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    if _ZERO.fullmatch(name):
        return torch.zeros(shape)
    std = 0.02 if name == "router.head.weight" else shape[1] ** -0.5
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def autoencoder_values(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """The initial values of a parameter of the autoencoder."""
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    bound = prod(shape[1:]) ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def _drawn(name: str, like: Tensor, values: Values, seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    return values(name, tuple(like.shape), generator).to(like.dtype)


def _check_free_space(folder: Path, needed: int) -> None:
    there = next(parent for parent in folder.parents if parent.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise InputError(f"{there} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed")


def _tower_in(folder: Path, name: str, shape: UnderstandingShape) -> TowerSpec:
    """Describes the understanding tower in a folder; raises ModelError if it is another one."""
    folder = expand(folder).absolute()
    check_tower_folder(folder, name, shape)
    files = [path for path in sorted(folder.iterdir()) if path.suffix in TOWER_SUFFIXES and path.suffix != ".gguf"]
    return TowerSpec(
        schema="mos-tower/1",
        name=name,
        description=f"{shape.hub_id or name}, from a folder",
        license="see the model's card",
        format="safetensors",
        files={path.name: sha256_of(path) for path in files},
        size=sum(path.stat().st_size for path in files),
        sources=(FolderSource(kind="folder", path=str(folder)),),
    )


def _card(start: Start) -> str:
    return (
        f"# {start.blueprint.name}\n\nRandom weights (seed {start.seed}), for planning, benchmarks and as the start of "
        f"training: it draws grey. Understanding tower: {start.tower}.\n"
    )
