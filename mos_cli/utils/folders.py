"""Folders: the user's cache and data, and the models and presets of the package."""

import os
from pathlib import Path

from mos_cli.utils.files import expand

BLUEPRINT = "blueprint.json"
"""The file of a model without weights."""
_PACKAGE = Path(__file__).resolve().parents[1]


def cache_folder() -> Path:
    """The folder for files that can be fetched or made again: `$MOS_CACHE`, else the user's cache folder."""
    if chosen := os.environ.get("MOS_CACHE"):
        return expand(chosen)
    import platformdirs

    return platformdirs.user_cache_path("mos")


def user_data_folder() -> Path:
    """The folder for data that mos keeps: `$MOS_DATA`, else the user's data folder."""
    if chosen := os.environ.get("MOS_DATA"):
        return expand(chosen)
    import platformdirs

    return platformdirs.user_data_path("mos")


def models_folder() -> Path:
    """The folder of the bundles that come with mos; its `towers/` describes understanding towers."""
    return _data_folder("models")


def list_blueprints() -> dict[str, Path]:
    """The blueprints that come with mos, by name: their files."""
    return {path.parent.name: path for path in sorted(models_folder().glob(f"*/{BLUEPRINT}"))}


def presets_folder() -> Path:
    """The folder of the presets that come with mos."""
    return _data_folder("presets")


def _data_folder(name: str) -> Path:
    # A wheel has the data inside the package, an editable install beside it.
    packaged = _PACKAGE / "_data" / name
    return packaged if packaged.is_dir() else _PACKAGE.parent / name
