"""The models that a training recipe refers to: finding and fetching them."""

from dataclasses import dataclass
from pathlib import Path

import torch

from mos_cli.bundles.bundle import Bundle, find_bundle, load_tower_spec
from mos_cli.bundles.sources import fetch_tower, hub_snapshot
from mos_cli.bundles.specs import TOWER_SUFFIXES, HubSource, TowerSpec
from mos_cli.errors import ModelError
from mos_cli.towers.autoencoder import Autoencoder, Pixels, load_autoencoder
from mos_cli.towers.efficientnet import features_spec, read_weights
from mos_cli.towers.image_encoder import ImageEncoder
from mos_cli.towers.understanding import UnderstandingTower
from mos_cli.towers.vision_language import load_understanding
from mos_cli.training.recipe import TrainRecipe
from mos_cli.utils.files import expand, sha256_of
from mos_cli.utils.folders import models_folder
from mos_cli.utils.migration import part_folder


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


@dataclass(frozen=True)
class Parts:
    """What a run trains with beside the network itself: all of it stays as it is.

    `start` is the model that the run continues, `spec` and `folder` describe the understanding tower.
    """

    spec: TowerSpec
    folder: Path
    understanding: UnderstandingTower
    autoencoder: Autoencoder
    image_encoder: ImageEncoder | None
    start: Bundle | None


def find_parts(recipe: TrainRecipe, device: torch.device, dtype: torch.dtype) -> Parts:
    """The parts that a recipe names, or those of the model that it continues.

    Raises:
        ModelError: one cannot be found, fetched or loaded.
    """
    start = None if recipe.start_from is None else find_bundle(recipe.start_from)
    spec, folder = understanding_of(recipe, start)
    understanding = load_understanding(folder, dtype=dtype, device=str(device))
    autoencoder = find_autoencoder(recipe.autoencoder, device)
    if recipe.autoencoder is None and start is not None and (start.folder / "autoencoder").is_dir():
        autoencoder = load_autoencoder(start.folder / "autoencoder", dtype=torch.float32, device=str(device))
    image_encoder = None
    if recipe.image_encoder is not None:
        image_encoder = find_image_encoder(understanding.layers, device, dtype)
    elif start is not None and recipe.generation.get("image_state_widths"):
        try:
            image_encoder = ImageEncoder.from_pretrained(part_folder(start.folder, "image_encoder"))
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(f"the image encoder of {recipe.start_from} cannot be loaded: {error}") from None
        image_encoder = image_encoder.to(device, dtype)  # type: ignore[arg-type, union-attr]
    return Parts(spec, folder, understanding, autoencoder, image_encoder, start)  # type: ignore[arg-type]


def understanding_of(recipe: TrainRecipe, start: Bundle | None) -> tuple[TowerSpec, Path]:
    """The understanding tower that a recipe names, or that of the model it continues; raises as `find_parts`."""
    if recipe.understanding is not None:
        return find_understanding(recipe.understanding)
    assert start is not None
    return start.index.understanding, fetch_tower(start.index.understanding)


def find_image_encoder(layers: int, device: torch.device, dtype: torch.dtype) -> ImageEncoder:
    """The image encoder with `layers` states for a token; raises ModelError if its weights cannot be fetched."""
    image_encoder = ImageEncoder(layers=layers)
    weights, names = read_weights(fetch_tower(features_spec())), image_encoder.trunk.state_dict().keys()
    image_encoder.trunk.load_state_dict({name: value for name, value in weights.items() if name in names})
    return image_encoder.to(device, dtype)  # type: ignore[arg-type, return-value]
