"""The models that a training recipe refers to: finding and fetching them."""

from pathlib import Path

import torch

from mos_cli.bundles.bundle import load_tower_spec
from mos_cli.bundles.sources import fetch_tower, hub_snapshot
from mos_cli.bundles.specs import TOWER_SUFFIXES, HubSource, TowerSpec
from mos_cli.towers.autoencoder import Autoencoder, Pixels, load_autoencoder
from mos_cli.towers.efficientnet import features_spec, read_weights
from mos_cli.towers.image_encoder import ImageEncoder
from mos_cli.utils.files import expand, sha256_of
from mos_cli.utils.folders import models_folder


def find_understanding(reference: str) -> tuple[TowerSpec, Path]:
    """An understanding tower by name, .json file or hub id: its description and its folder.

    A hub id is described by the files of its newest revision and their hashes, so that an exported bundle pins them.
    Raises ModelError if it cannot be fetched.
    """
    if "/" not in reference or reference.endswith(".json"):
        spec = load_tower_spec(reference)
        return spec, fetch_tower(spec)
    folder = hub_snapshot(reference, None, [f"*{suffix}" for suffix in TOWER_SUFFIXES if suffix != ".gguf"])
    files = [path for path in sorted(folder.iterdir()) if path.suffix in TOWER_SUFFIXES]
    spec = TowerSpec(
        schema="mos-tower/1",
        name=reference.rpartition("/")[2],
        description=f"{reference}, from the model hub",
        license="see the model's card",
        format="safetensors",
        files={path.name: sha256_of(path) for path in files},
        size=sum(path.stat().st_size for path in files),
        sources=(HubSource(kind="hub", repo_id=reference, revision=folder.name),),
    )
    return spec, folder


def find_autoencoder(reference: str | None, device: torch.device) -> Autoencoder:
    """An autoencoder by the name of one in the package, by folder or hub id, in fp32; None is `Pixels`."""
    if reference is None:
        return Pixels()
    folder = models_folder() / reference
    if not folder.is_dir():
        folder = expand(reference)
    if not folder.is_dir():
        folder = hub_snapshot(reference, None, ["*.json", "*.safetensors"])
    return load_autoencoder(folder, dtype=torch.float32, device=str(device))


def find_image_encoder(layers: int, device: torch.device, dtype: torch.dtype) -> ImageEncoder:
    """The image encoder with `layers` states for a token; raises ModelError if its weights cannot be fetched."""
    image_encoder = ImageEncoder(layers=layers)
    weights, names = read_weights(fetch_tower(features_spec())), image_encoder.trunk.state_dict().keys()
    image_encoder.trunk.load_state_dict({name: value for name, value in weights.items() if name in names})
    return image_encoder.to(device, dtype)  # type: ignore[arg-type, return-value]
