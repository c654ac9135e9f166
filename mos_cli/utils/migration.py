"""Names in files of mos 0.1.0 and the names that replace them: the one table for everything that reads a file.

Only the new names are written. A bundle is pinned by the hash of its bytes, so an old one stays as it is and is read
through this table. Each table maps the old name to the new one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, model_validator

from mos_cli.utils.validation import Frozen

FIELDS = {
    # A generation tower's config, alone or in a recipe or blueprint.
    "sees": "has_vision",
    "sight_widths": "image_state_widths",
    # An understanding tower in a blueprint.
    "cell": "image_token_size",
    "seen": "image_size",
    # A training recipe.
    "eyes": "image_encoder",
    # The record of a picture and the head of a trace.
    "together": "batched_guidance",
    # The entries of SceneBench and EditBench.
    "ground": "background",
}
"""Fields of JSON and TOML files."""
MODULES = {"sight_in": "image_states_in", "under_in": "reference_in"}
"""Modules of the generation tower: parts of the dotted names of weights."""
FOLDERS = {"eyes": "image_encoder"}
"""Folders of a bundle."""
CLASSES = {"Eyes": "ImageEncoder"}
"""Classes of networks, as `_class_name` in their config."""


def current_fields(fields: Any) -> Any:
    """The fields of one object under their present names; anything but a mapping is returned as it is."""
    return {FIELDS.get(name, name): value for name, value in fields.items()} if isinstance(fields, Mapping) else fields


def current_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """The fields of a training recipe under their present names, those of its network included.

    Stages that name no spacing of the patches are from before there was one.
    """
    fields = current_fields(recipe)
    if "generation" in fields:
        fields["generation"] = current_fields(fields["generation"])
    if "stages" in fields:
        fields["stages"] = [{"patch_spacing": 1.0, **stage} for stage in fields["stages"]]
    return fields


def current_weight(name: str) -> str:
    """The present name of a weight or module of the generation tower, from its dotted name in a file."""
    return ".".join(MODULES.get(part, part) for part in name.split("."))


def earlier_weight(name: str) -> str:
    """The inverse of `current_weight`: the name in a file that has earlier names."""
    earlier = {new: old for old, new in MODULES.items()}
    return ".".join(earlier.get(part, part) for part in name.split("."))


def current_file(name: str) -> str:
    """The present name of a file of a bundle, from its path inside the bundle."""
    folder, separator, rest = name.partition("/")
    return FOLDERS.get(folder, folder) + separator + rest


def part_folder(bundle: Path, name: str) -> Path:
    """The folder of a part of a bundle, by its present name; it need not exist."""
    earlier = (bundle / old for old, new in FOLDERS.items() if new == name)
    return next((folder for folder in earlier if folder.is_dir()), bundle / name)


class Migrated(Frozen):
    """A value read from a file in which earlier versions named some fields otherwise."""

    @model_validator(mode="before")
    @classmethod
    def _current_fields(cls, fields: Any) -> Any:
        return current_fields(fields)


GenerationConfig = Annotated[dict[str, Any], BeforeValidator(current_fields)]
"""The config of a generation tower as a table of a recipe or blueprint."""
