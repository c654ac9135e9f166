"""The recipe in a run's folder, with which a run goes on."""

import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from mos_cli.bundles.bundle import find_bundle
from mos_cli.errors import InputError
from mos_cli.training.recipe import TrainRecipe
from mos_cli.utils.files import atomic_write, make_folder
from mos_cli.utils.migration import current_recipe

RECIPE = "recipe.json"
MAY_CHANGE: dict[str, Any] = {
    "train": {"steps", "compile", "ema", "log_every", "save_every", "sample_every", "sample_prompts"},
    "bundle": {"name", "description", "license", "defaults", "edits"},
}
"""Settings that may differ when a run is resumed; so may the steps of its last stage."""


def keep_recipe(recipe: TrainRecipe, folder: Path, accelerator: Accelerator) -> None:
    """Compares a recipe with the one in the run's folder, apart from `MAY_CHANGE`, and writes it there.

    All processes call it, and the main one writes.

    Raises:
        InputError: the folder holds a run of another recipe, or cannot be written.
    """
    path, wanted, timed = folder / RECIPE, recipe.model_dump(mode="json"), recipe.train.time is not None
    if (recipe.lora or recipe.distil) and recipe.start_from is not None:
        # The weights that the state does not have: those that a LoRA changes, and those of a teacher.
        wanted["start_hash"] = find_bundle(recipe.start_from).hash
    if path.exists():
        there = read_recipe(path, wanted)
        if timed != (there["train"]["time"] is not None):
            raise InputError(
                f"{folder} holds a run that ends {'by its steps' if timed else 'when its time is over'}: "
                f"{'leave out' if timed else 'give'} --time, or choose another folder with --run"
            )
        there["train"]["time"] = wanted["train"]["time"]
        if differences := _differences(_fixed(there), _fixed(wanted)):
            raise InputError(
                f"{folder} holds a run of another recipe: choose another folder with --run, or change back "
                f"{', '.join(differences[:5])}"
            )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        make_folder(folder)
        atomic_write(path, json.dumps(wanted, indent=2).encode(), overwrite=True)
    accelerator.wait_for_everyone()


def read_recipe(path: Path, otherwise: dict[str, Any] | None = None) -> dict[str, Any]:
    """The recipe in a run's folder, as JSON, with the defaults of settings that there were not yet.

    Args:
        otherwise: the recipe from which settings in `MAY_CHANGE` come that an earlier version did not write.

    Raises:
        InputError: it is damaged, or lacks settings.
    """
    try:
        there = current_recipe(json.loads(path.read_bytes()))
        start_hash = {name: there.pop(name) for name in ("start_hash",) if name in there}
        if otherwise is not None:
            for name, keys in MAY_CHANGE.items():
                there[name] = {key: otherwise[name][key] for key in keys if key in otherwise[name]} | there[name]
            if there.get("stages") and there["stages"][-1]["steps"] is None:
                there["stages"][-1]["steps"] = otherwise["stages"][-1]["steps"]
        return TrainRecipe.model_validate_json(json.dumps(there)).model_dump(mode="json") | start_hash
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, OSError):
        raise InputError(f"{path} is damaged: restore it, or choose another folder with --run") from None


def _fixed(recipe: dict[str, Any]) -> dict[str, Any]:
    """The part of a recipe that stays the same when a run is resumed."""
    fixed = {
        name: {key: one for key, one in value.items() if key not in MAY_CHANGE.get(name, ())}
        if isinstance(value, dict)
        else value
        for name, value in recipe.items()
    }
    stages = fixed.get("stages") or []
    return fixed | {"stages": [*stages[:-1], *({**stage, "steps": None} for stage in stages[-1:])]}


def _differences(there: Any, wanted: Any, name: str = "") -> list[str]:
    """What differs between two recipes, by name."""
    if isinstance(there, dict) and isinstance(wanted, dict):
        names = [*wanted, *(key for key in there if key not in wanted)]
        parts = (_differences(there.get(key), wanted.get(key), f"{name}.{key}" if name else key) for key in names)
        return [difference for part in parts for difference in part]
    if there == wanted:
        return []
    shown = [text if len(text := json.dumps(value)) <= 40 else "..." for value in (wanted, there)]
    return [f"{name} = {shown[0]} (it was {shown[1]})"]
