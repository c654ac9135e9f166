"""Finding, verifying and writing bundles, and finding the descriptions of understanding towers.

A bundle is a folder `models/<name>/` of JSON, safetensors and a model card, pinned by its `model_index.json`. It only
refers to its understanding tower, which `mos_cli.bundles.sources` fetches.
"""

import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path

from pydantic import ValidationError

from mos_cli.bundles.shapes import UnderstandingShape, read_config
from mos_cli.bundles.sources import bad_file, hub_snapshot
from mos_cli.bundles.specs import BUNDLE_SUFFIXES, BundleIndex, Canvas, Defaults, EditDefaults, TowerSpec
from mos_cli.errors import InputError, ModelError
from mos_cli.utils.files import atomic_write, check_writable, expand, make_folder, sha256_of
from mos_cli.utils.folders import BLUEPRINT, list_blueprints, models_folder, user_data_folder
from mos_cli.utils.validation import HUB_ID, PLAIN_NAME, did_you_mean, first_problem, read_json

INDEX = "model_index.json"
ADAPTER = "adapter.json"
FORMER = {
    "defac48d2ac4edda2a0b36d8c8d40a23fbf76986ba84dfe41275fe578cdf2eb8": "0.1.0",
    "8b094b52831efb666e26d39c607763e48b7152294835534d3ce69d6531c2d681": "0.1.0",
    "482b135d7d463e47be02843ad8fe1ee7dea3dbd9a71b66e8caba5c3e0bf1d670": "0.1.0",
    "f83ed729a27e23b203cf3e845a1c877faca10c38cdbbd462504041723d422608": "0.1.0",
    "32c0b5b80a753364e5ec537013f008a58e18a20f9adc980a5c694ba373b35383": "0.1.0",
    "e9180a5726cefee2480e596aea86dd39ab86c6c4b845a32283448accd2fe01b2": "0.2.0",
}
"""Hashes of bundles of earlier releases, and their version."""
_PICKLES = {".bin", ".pt", ".ckpt", ".pkl", ".pickle", ".pth"}


@dataclass(frozen=True)
class Bundle:
    """A bundle folder and its index."""

    folder: Path
    index: BundleIndex
    hub_id: str | None = None

    @property
    def ref(self) -> str:
        """Its hub id, or its name: what finds it on any machine."""
        return self.hub_id or self.index.name

    @cached_property
    def hash(self) -> str:
        """The sha256 of model_index.json, which pins every file of the bundle and of its tower."""
        return sha256_of(self.folder / INDEX)


def find_bundle(ref: str) -> Bundle:
    """Finds a bundle by name, by its folder, or by hub id (`owner/name`, kept in the hub's cache).

    Names are looked up among the bundles that come with mos, then in the folders of `$MOS_MODELS`. No file is
    hashed here, see `verify_bundle`. Raises ModelError if there is no such bundle or it holds a pickle.
    """
    folders = bundle_folders()
    if ref in folders:
        bundle = read_bundle(folders[ref])
        if bundle.index.name != ref:
            raise ModelError(f"{bundle.folder} holds a bundle named {bundle.index.name}: rename the folder")
        return bundle
    path = expand(ref)
    if path.is_dir():
        return read_bundle(path)
    if re.fullmatch(HUB_ID, ref):
        return replace(read_bundle(_from_hub(ref)), hub_id=ref)
    if path.name != ref:
        raise ModelError(f"there is no folder {ref}")
    raise _no_model(ref, folders)


def find_recorded(name: str, bundle_hash: str, subject: str, otherwise: str, models: Sequence[str] = ()) -> Bundle:
    """The bundle that a picture was drawn with, known by its hash.

    It is looked for among `models`, at the recorded name or hub id, where a bundle of that hash was last used, among
    the bundles that are listed, and in `$MOS_MODEL`.

    Args:
        name, bundle_hash: the bundle's, as the picture's record has them.
        subject: the picture, for an error.
        otherwise: advice, for an error.
        models: those given by the user: names, folders or hub ids.

    Raises:
        ModelError: there is none, or one of `models` is not a model.
    """
    named = [find_bundle(ref) for ref in models]
    at_name = _or_none(name)
    used = (_or_none(ref) for ref in (_last_used(bundle_hash), os.environ.get("MOS_MODEL")) if ref)
    listed = (bundle for bundle in list_bundles().values() if isinstance(bundle, Bundle))
    for bundle in chain(named, [at_name], used, listed):
        if bundle is not None and _hash_or_none(bundle) == bundle_hash:
            return bundle
    origin = f", which came with mos {FORMER[bundle_hash]}" if bundle_hash in FORMER else ""
    other = named[0] if named else at_name
    other_hash = None if other is None else _hash_or_none(other)
    difference = "that model is not here"
    if other is not None and other_hash is not None:
        difference = f"{other.ref} is {other_hash[:10]} here"
    raise ModelError(f"{subject} was made by {name} {bundle_hash[:10]}{origin}; {difference}: {otherwise}")


def record_location(bundle: Bundle) -> None:
    """Records the folder of a bundle in the user's data folder, for pictures drawn with it; see `find_recorded`."""
    if bundle.hub_id is not None or bundle.folder.parent == models_folder():
        return
    # Drawing does not depend on it, so a data folder that cannot be written to is no error.
    with suppress(OSError, InputError):
        make_folder(_locations())
        atomic_write(_locations() / bundle.hash, f"{bundle.folder.resolve()}\n".encode(), overwrite=True)


def _last_used(bundle_hash: str) -> str | None:
    # It comes from a picture, which is not trusted, and becomes the name of a file.
    if not re.fullmatch(r"[0-9a-f]{64}", bundle_hash):
        return None
    try:
        return (_locations() / bundle_hash).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None


def _locations() -> Path:
    return user_data_folder() / "bundles"


def _hash_or_none(bundle: Bundle) -> str | None:
    """The hash of a bundle; None for an adapter whose base model was not fetched."""
    try:
        return bundle.hash
    except ModelError:
        return None


def _or_none(ref: str) -> Bundle | None:
    try:
        return find_bundle(ref)
    except ModelError:
        return None


def edit_defaults(bundle: Bundle) -> EditDefaults:
    """The default settings for edits; raises ModelError if the bundle does not support editing."""
    if bundle.index.edits is None:
        raise ModelError(f"{bundle.index.name} only draws: choose a model that edits, see `mos models ls`")
    return bundle.index.edits


def list_bundles() -> dict[str, Bundle | ModelError]:
    """All bundles that can be found by name, sorted; for a broken one the error."""
    return {name: _bundle_or_problem(name) for name in bundle_folders()}


def bundle_folders() -> dict[str, Path]:
    """The folders with a bundle index or an adapter, by name and sorted. Those of the package take precedence."""
    extra = [expand(root) for root in os.environ.get("MOS_MODELS", "").split(os.pathsep) if root]
    found: dict[str, Path] = {}
    for root in (models_folder(), *extra):
        for index in (*root.glob(f"*/{INDEX}"), *root.glob(f"*/{ADAPTER}")):
            found.setdefault(index.parent.name, index.parent)
    return dict(sorted(found.items()))


def read_bundle(folder: Path) -> Bundle:
    """Reads the index of a bundle folder; raises ModelError if it is invalid or there is a pickle.

    A folder with an adapter, or with a pipeline of diffusers, is an `AdapterBundle`.
    """
    from mos_cli.bundles.adapters import is_adapter, read_adapter

    if is_adapter(folder):
        return read_adapter(folder)
    if not (folder / INDEX).is_file():
        remedy = ", as mos models init --tower FOLDER writes it" if (folder / BLUEPRINT).is_file() else ""
        raise ModelError(f"{folder} is no bundle: it has no {INDEX}{remedy}")
    _refuse_pickles(folder)
    return Bundle(folder, read_json(BundleIndex, folder / INDEX))


def verify_bundle(bundle: Bundle) -> None:
    """Compares every file with the index; raises ModelError naming one missing, changed or not listed.

    A base model with its adapter is refused: it is none of mos' own networks, see `adapters.verify_adapter`.
    """
    from mos_cli.bundles.adapters import AdapterBundle

    if isinstance(bundle, AdapterBundle):
        raise ModelError(f"{bundle.ref} is a base model: it draws and edits, and a router can be trained for it")
    _refuse_pickles(bundle.folder)
    if problem := bad_file(bundle.folder, bundle.index.files):
        raise ModelError(f"{problem} in {bundle.folder}")
    for name in _files_of(bundle.folder):
        if name not in bundle.index.files:
            raise ModelError(f"{name} is not listed in {bundle.folder / INDEX}")


def write_index(
    folder: Path,
    *,
    name: str,
    description: str,
    license: str,
    understanding: TowerSpec,
    canvas: Canvas,
    defaults: Defaults,
    edits: EditDefaults | None = None,
) -> Bundle:
    """Hashes all files of `folder` and writes its model_index.json, replacing an earlier one.

    Raises ModelError if one of the files is not allowed in a bundle.
    """
    _refuse_pickles(folder)
    fields = {
        "schema": "mos-bundle/1",
        "name": name,
        "description": description,
        "license": license,
        "understanding": understanding,
        "canvas": canvas,
        "defaults": defaults,
        "edits": edits,
        "files": {file: sha256_of(folder / file) for file in _files_of(folder)},
    }
    try:
        index = BundleIndex.model_validate(fields)
    except ValidationError as error:
        raise ModelError(f"{folder}: {first_problem(error)}") from None
    atomic_write(folder / INDEX, (index.model_dump_json(indent=2) + "\n").encode(), overwrite=True)
    return Bundle(folder, index)


def load_tower_spec(name_or_path: str) -> TowerSpec:
    """Reads a tower's description by name from `models/towers/`, or from a .json file; raises ModelError."""
    if name_or_path.endswith(".json"):
        return read_json(TowerSpec, expand(name_or_path))
    specs = {spec.name: spec for spec in list_tower_specs()}
    if name_or_path not in specs:
        raise unknown_name("understanding tower", name_or_path, specs)
    return specs[name_or_path]


def list_tower_specs() -> list[TowerSpec]:
    """The understanding towers described in `models/towers/`, sorted by name."""
    specs = [read_json(TowerSpec, path) for path in (models_folder() / "towers").glob("*.json")]
    return sorted(specs, key=lambda spec: spec.name)


def find_model(ref: str) -> Bundle | TowerSpec:
    """Finds an understanding tower by name, or else a bundle as `find_bundle` does; raises ModelError."""
    towers = {spec.name: spec for spec in list_tower_specs()}
    if ref in towers:
        return towers[ref]
    if "/" in ref or Path(ref).is_dir() or ref in (bundles := bundle_folders()):
        return find_bundle(ref)
    raise _no_model(ref, [*bundles, *towers])


def unknown_name(what: str, name: str, known: Iterable[str]) -> ModelError:
    """The error for an unknown name: the nearest known one, and all of them."""
    known = sorted(known)
    return ModelError(
        f"there is no {what} named {name!r}{did_you_mean(name, known)} (there is: {', '.join(known) or 'none'})"
    )


def check_new_name(folder: Path) -> None:
    """Raises InputError if the name of a folder is not valid for a model."""
    if not re.fullmatch(PLAIN_NAME, folder.name):
        raise InputError(f"{folder.name!r} cannot be a model's name: use letters, digits, dots and dashes")


def check_new_folder(folder: Path) -> None:
    """Raises InputError if no model can be written there: invalid name, existing folder, or no permission."""
    check_new_name(folder)
    if folder.exists():
        raise InputError(f"{folder} exists: choose another name")
    check_writable(folder.parent)


def check_tower_folder(folder: Path, name: str, shape: UnderstandingShape) -> None:
    """Raises ModelError if a folder does not hold an understanding tower of this shape."""
    config = read_config(folder)
    text = config.get("text_config", config)
    found = (text.get("num_hidden_layers"), text.get("hidden_size"))
    if found != (shape.layers, shape.width):
        raise ModelError(
            f"{folder} is not {name}: {found} layers and values of a state, not {shape.layers, shape.width}"
        )


def _no_model(ref: str, known: Iterable[str]) -> ModelError:
    if ref not in list_blueprints():
        return unknown_name("model", ref, known)
    made = f"mos models init {ref} --tower FOLDER gives it random ones"
    return ModelError(f"{ref} is a blueprint, without weights: mos plan {ref} says what it needs, {made}")


def _bundle_or_problem(name: str) -> Bundle | ModelError:
    try:
        return find_bundle(name)
    except ModelError as error:
        return error


def _files_of(folder: Path) -> list[str]:
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in files if name != INDEX)


def _refuse_pickles(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.suffix.lower() in _PICKLES:
            raise ModelError(f"{path} is a pickle, which can run code when read: mos loads safetensors only")


def _from_hub(repo_id: str) -> Path:
    try:
        return hub_snapshot(repo_id, None, [f"*{suffix}" for suffix in BUNDLE_SUFFIXES])
    except ModelError as error:
        raise ModelError(f"there is no folder {repo_id}, and from the hub: {error}") from None
