"""Writing what a run has learned: a bundle, or a LoRA file. It is drawn with once before it counts as written."""

import copy
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from mos_cli.bundles.bundle import INDEX, Bundle, find_bundle, write_index
from mos_cli.bundles.loras import SUFFIX as LORA_SUFFIX
from mos_cli.bundles.loras import LoraFile, check_lora_name, record_lora
from mos_cli.config.recipe import make_recipe
from mos_cli.errors import InputError, ModelError
from mos_cli.inference.pipeline import MoSPipeline
from mos_cli.towers.autoencoder import Autoencoder, Pixels
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.image_encoder import ImageEncoder
from mos_cli.towers.lora import add_lora, save_lora
from mos_cli.training.checkpoint import load_averages
from mos_cli.training.loop import Trainer
from mos_cli.training.recipe import TrainRecipe
from mos_cli.training.references import Parts, find_parts, understanding_of
from mos_cli.training.run_recipe import RECIPE, read_recipe
from mos_cli.training.start import start_tower
from mos_cli.utils.devices import choose_device
from mos_cli.utils.files import check_folder, link_or_copy, make_folder, replace_folder, sha256_of

CARD = "card.md"


def export(trainer: Trainer, folder: Path) -> Path | None:
    """Writes the averaged weights as a bundle in bfloat16, or as a LoRA file, and draws a picture with it.

    A bundle that is there is replaced when the new one is whole; its card.md is kept and listed. All processes call it;
    the main one writes and returns the path.

    Raises:
        InputError: it cannot be written; an earlier one is as it was.
        ModelError: what was written cannot be drawn with.
    """
    recipe = trainer.recipe
    learned = trainer.averaged_tower() if recipe.lora is None else trainer.averaged_weights()
    if not trainer.accelerator.is_main_process:
        return None
    return _write(recipe, _parts_of(trainer), learned, folder, trainer.device)


def export_run(run: Path, target: Path | None = None) -> Path:
    """Writes what `export` does from the last checkpoint of a run in the folder `run`, which may go on meanwhile.

    Args:
        target: where the bundle or the LoRA file goes; by default into the run's folder, named after the step.

    Raises:
        InputError: there is no run or no checkpoint, or it is damaged; the target cannot be written, or has files of
            something else.
        ModelError: a part of the run is missing, or what was written cannot be drawn with.
    """
    if not (run / RECIPE).is_file():
        raise InputError(f"{run} has no training run: name the folder with its {RECIPE}")
    kept = read_recipe(run / RECIPE)
    start_hash = kept.pop("start_hash", None)
    recipe = TrainRecipe.model_validate_json(json.dumps(kept))
    if recipe.start_from is not None and start_hash not in (None, find_bundle(recipe.start_from).hash):
        raise ModelError(f"{recipe.start_from} is no longer the model that the run in {run} began with")
    if target is not None and recipe.lora is None:
        check_folder(target, INDEX, CARD)
    elif target is not None:
        check_lora_name(target)
    device = choose_device("cpu")
    parts = find_parts(recipe, device, torch.float32)
    tower = start_tower(recipe)
    if recipe.lora is not None:
        add_lora(tower, recipe.lora.rank, recipe.lora.scaling)
    weights = {name: weight for name, weight in tower.named_parameters() if weight.requires_grad}
    averages, step = load_averages(run, weights)
    learned: GenerationTower | dict[str, torch.Tensor] = averages[recipe.train.ema]
    name = f"{recipe.bundle.name}-{step:08d}"
    if recipe.lora is None:
        tower.load_state_dict(averages[recipe.train.ema])
        learned = tower.eval()
    else:
        name += LORA_SUFFIX
    return _write(recipe, parts, learned, target or run / name, device)


def _write(
    recipe: TrainRecipe,
    parts: Parts,
    learned: GenerationTower | dict[str, torch.Tensor],
    folder: Path,
    device: torch.device,
) -> Path:
    """Writes a network as a bundle, or the weights of a LoRA as a file, and draws a picture; raises as `export`."""
    if isinstance(learned, dict):
        assert recipe.lora is not None
        assert parts.start is not None
        origin = {"model": parts.start.ref, "bundle_hash": parts.start.hash}
        save_lora(folder, learned, recipe.lora.rank, recipe.lora.scaling, **origin)
        check_drawing(parts.start, parts, recipe, device, [LoraFile(folder)])
        record_lora(folder, sha256_of(folder))
        return folder
    make_folder(folder.parent)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        made = Path(temporary) / "bundle"
        made.mkdir()
        if (folder / CARD).is_file():
            link_or_copy(folder / CARD, made / CARD)
        check_drawing(write_bundle(recipe, learned, parts, made), parts, recipe, device)
        replace_folder(made, folder)
    return folder


def write_bundle(recipe: TrainRecipe, tower: GenerationTower, parts: Parts, folder: Path) -> Bundle:
    """Writes a network and the other parts of a run as a bundle, in bfloat16.

    Raises:
        InputError: the folder cannot be written.
        ModelError: a weight is not finite.
    """
    for name, weight in tower.state_dict().items():
        if not weight.isfinite().all():
            raise ModelError(f"the bundle is not written: {name} has values that are not finite")
    try:
        tower.bfloat16().save_pretrained(folder / "generation")
        FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
        _save_frozen(parts.autoencoder, parts.image_encoder, folder)
        text = json.dumps(recipe.model_dump(), indent=2) + "\n"
        (folder / "recipe.json").write_text(text, encoding="utf-8")
    except Exception as error:
        # safetensors has errors of its own for a full disk.
        raise InputError(f"cannot write {folder}: {getattr(error, 'strerror', None) or error}") from None
    return write_index(folder, understanding=parts.spec, **recipe.bundle.model_dump())


def _save_frozen(autoencoder: Autoencoder, image_encoder: ImageEncoder | None, folder: Path) -> None:
    if not isinstance(autoencoder, Pixels):
        autoencoder.save_pretrained(folder / "autoencoder")
        _remove_path(folder / "autoencoder" / "config.json")
    if image_encoder is not None:
        copy.deepcopy(image_encoder).bfloat16().save_pretrained(folder / "image_encoder")
        _remove_path(folder / "image_encoder" / "config.json")


def _remove_path(config: Path) -> None:
    """Removes the path that diffusers stores in a config: a bundle contains no paths of a machine."""
    fields = json.loads(config.read_text(encoding="utf-8"))
    fields.pop("_name_or_path", None)
    config.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _parts_of(trainer: Trainer) -> Parts:
    """The parts that a run has loaded."""
    recipe, batches = trainer.recipe, trainer.batches
    start = None if recipe.start_from is None else find_bundle(recipe.start_from)
    spec, folder = understanding_of(recipe, start)
    return Parts(spec, folder, batches.understanding, batches.autoencoder, batches.image_encoder, start)


def check_drawing(
    bundle: Bundle, parts: Parts, recipe: TrainRecipe, device: torch.device, loras: Sequence[LoraFile] = ()
) -> None:
    """Loads a bundle and draws one picture of one step with it; raises ModelError if that is not possible."""
    precision = recipe.train.precision
    pipeline = MoSPipeline(bundle, parts.folder, device=device, precision=precision, loras=loras)
    width, height = bundle.index.canvas.native
    settings = {"steps": 1, "cfg": 1.0, "cfg_interval": (0.0, 1.0), "precision": precision}
    pipeline.draw(make_recipe(prompt="a picture", model=bundle.ref, seed=0, width=width, height=height, **settings))
