"""Adapters for base models: their files, the lock of what was pulled, and reading them. Imports no torch.

An adapter is `adapter.json` and, once trained, the weights of its router. Its base model is a diffusers folder: fetched
from the hub at a revision that the user's lock file pins, or any folder on the disk.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator

from mos_cli.bundles.base_models import (
    PARTS,
    BaseShape,
    PipelineClass,
    base_files,
    diffusers_class,
    diffusers_config,
    is_base_file,
    own_layers,
    shape_of_folder,
    text_blocks,
    text_layers,
)
from mos_cli.bundles.bundle import ADAPTER, Bundle
from mos_cli.bundles.shapes import read_config
from mos_cli.bundles.specs import Canvas, Defaults, EditDefaults
from mos_cli.errors import ModelError, UsageError
from mos_cli.utils.files import sha256_of
from mos_cli.utils.folders import models_folder, user_data_folder
from mos_cli.utils.validation import HUB_ID, Frozen, PlainName, Sha256, read_json

ROUTER = "router.safetensors"
Commit = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}$")]


class Terms(Frozen):
    """Terms of use that a user has to accept: their name, where they are, and which part they are for."""

    name: str
    url: str
    part: str


class BaseSource(Frozen):
    """The hub repository of a base model. `size` is in bytes; without a revision the first pull pins the newest one."""

    repo_id: Annotated[str, StringConstraints(pattern=HUB_ID)]
    revision: Commit | None = None
    size: int = Field(gt=0)


class RouterShape(Frozen):
    """The sizes of an adapter's router; see `towers.router.Router`."""

    width: int = Field(gt=0)
    depth: int = Field(gt=0)
    heads: int = Field(gt=0)
    top_k: int = Field(default=2, gt=0)


class AdapterIndex(Frozen):
    """The content of `adapter.json`.

    Args:
        terms: what has to be accepted explicitly, beside the licence.
        source: where the base model comes from; None where it is a folder of the user's.
        base_hash: the base model that a router was trained on, as `Bundle.hash` without the router.
        own_layers: the layers that the base model reads itself, one for each slot of a block.
        layers, blocks: the states of a token (the embedding's output included), and the blocks that read text.
        router: None for an adapter that was not trained: the base model reads its own layers.
        files: the files beside `adapter.json` with their sha256.
    """

    schema_: Literal["mos-adapter/1"] = Field(alias="schema")
    name: PlainName
    description: str
    license: str
    terms: Terms | None = None
    pipeline: PipelineClass
    source: BaseSource | None = None
    base: str | None = None
    base_hash: Sha256 | None = None
    distilled: bool = False
    canvas: Canvas
    defaults: Defaults
    edits: EditDefaults | None = None
    own_layers: tuple[int, ...] = Field(min_length=1)
    layers: int = Field(gt=1)
    blocks: int = Field(gt=0)
    shape: BaseShape | None = None
    router: RouterShape | None = None
    files: dict[PlainName, Sha256] = Field(default_factory=dict)


class Lock(Frozen):
    """What the first pull of a base model pinned: its revision, the sha256 of every file, and the terms accepted."""

    schema_: Literal["mos-lock/1"] = Field(alias="schema")
    name: PlainName
    repo_id: Annotated[str, StringConstraints(pattern=HUB_ID)]
    revision: Commit
    accepted: str | None = None
    files: dict[str, Sha256] = Field(min_length=1)

    @field_validator("files")
    @classmethod
    def _inside_the_folder(cls, files: dict[str, str]) -> dict[str, str]:
        for name in files:
            if not is_base_file(name):
                raise ValueError(f"{name!r} is no file of a base model")
        return files


@dataclass(frozen=True)
class AdapterBundle(Bundle):
    """An adapter and its base model, which may not have been fetched.

    Args:
        folder: where `adapter.json` lies, or the diffusers folder.
        local: the folder of the base model where it is the user's own; None where it comes from the hub.
    """

    index: AdapterIndex  # type: ignore[assignment]
    local: Path | None = None

    @cached_property
    def lock(self) -> Lock | None:
        """The lock of a base model from the hub; None before the first pull. Raises ModelError if it is damaged."""
        path = lock_path(self.index)
        return read_json(Lock, path) if self.local is None and path.is_file() else None

    @property
    def pulled(self) -> bool:
        """Whether the base model is there."""
        try:
            return self.base.is_dir()
        except ModelError:
            return False

    @cached_property
    def base(self) -> Path:
        """The folder of the base model.

        Raises:
            ModelError: it was not fetched, its terms were not accepted, or the lock is for another revision.
        """
        if self.local is not None:
            return self.local
        index, lock = self.index, self.lock
        assert index.source is not None
        if lock is None:
            raise ModelError(f"the base model {index.name} is not here: run mos models pull {base_name(index)}")
        check_lock(index, lock)
        from mos_cli.bundles.sources import cached_snapshot

        folder = cached_snapshot(lock.repo_id, lock.revision)
        if folder is None:
            raise ModelError(f"the base model {index.name} is not in the cache: run mos models pull {base_name(index)}")
        return folder

    @cached_property
    def base_files(self) -> dict[str, str]:
        """The files of the base model with their sha256: as the lock has them, or those of the user's folder."""
        if self.local is None:
            _ = self.base
            assert self.lock is not None
            return self.lock.files
        return {name: sha256_of(self.local / name) for name in base_files(self.local)}

    @cached_property
    def hash(self) -> str:
        """The sha256 over the hashes of all files of the base model and of the router."""
        return _hash(self.base_files, self.index.files)


def base_hash(bundle: AdapterBundle) -> str:
    """The sha256 over the hashes of the base model's files, without a router."""
    return _hash(bundle.base_files, {})


def base_name(index: AdapterIndex) -> str:
    """The name under which `mos models pull` knows the base model."""
    return index.base or index.name


def lock_path(index: AdapterIndex) -> Path:
    """The user's lock file of a base model."""
    return user_data_folder() / "base-models" / f"{base_name(index)}.json"


def check_lock(index: AdapterIndex, lock: Lock) -> None:
    """Raises ModelError if a lock is for another source than an adapter names, or lacks the terms' acceptance."""
    source, name = index.source, base_name(index)
    assert source is not None
    again = f"delete {lock_path(index)}, then run mos models pull {name}"
    if lock.repo_id != source.repo_id:
        raise ModelError(f"{name} is locked to {lock.repo_id}, not to {source.repo_id}: {again}")
    if source.revision is not None and lock.revision != source.revision:
        pinned = f"revision {lock.revision[:12]}, and {index.name} needs {source.revision[:12]}"
        raise ModelError(f"{name} is locked to {pinned}: {again}")
    if index.terms is not None and lock.accepted != index.terms.name:
        raise ModelError(
            f"{name} needs your acceptance of the {index.terms.name} ({index.terms.url}): "
            f"run mos models pull {name} --accept-terms"
        )


def verify_adapter(bundle: AdapterBundle) -> None:
    """Compares every file of the base model and of the router with its hash.

    Raises:
        ModelError: a file is missing or changed, or the router was trained on another base model.
    """
    from mos_cli.bundles.sources import bad_file

    if bundle.local is None and (problem := bad_file(bundle.base, bundle.base_files)):
        raise ModelError(f"{problem} in {bundle.base}: run mos models pull {base_name(bundle.index)}")
    if problem := bad_file(bundle.folder, bundle.index.files):
        raise ModelError(f"{problem} in {bundle.folder}")
    trained_on = bundle.index.base_hash
    if trained_on is not None and trained_on != base_hash(bundle):
        raise ModelError(f"the router in {bundle.folder} was trained on another base model than {bundle.base}")


def shipped_adapters() -> dict[str, Path]:
    """The adapters that come with mos, by name: their folders."""
    return {path.parent.name: path.parent for path in sorted(models_folder().glob(f"*/{ADAPTER}"))}


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, or is a diffusers folder."""
    return (folder / ADAPTER).is_file() or diffusers_class(folder) is not None


def read_adapter(folder: Path) -> AdapterBundle:
    """Reads an adapter, or a diffusers folder as a base model without a router.

    Raises:
        ModelError: it is damaged, its base model is not there, or diffusers' pipeline is none that can be one.
    """
    if not (folder / ADAPTER).is_file():
        return AdapterBundle(folder, local_index(folder), local=folder)
    index = read_json(AdapterIndex, folder / ADAPTER)
    if index.source is not None:
        return AdapterBundle(folder, index)
    local = Path(index.base or "")
    if not local.is_absolute() or diffusers_class(local) is None:
        raise ModelError(f"the base model of {folder} is not in {local}: set base in {folder / ADAPTER}")
    return AdapterBundle(folder, index, local=local)


def local_index(folder: Path) -> AdapterIndex:
    """The index of a diffusers folder on the disk, from its configs and the shipped adapter of its pipeline."""
    name = diffusers_class(folder)
    known = {index.pipeline: index for index in map(_shipped_index, shipped_adapters().values())}
    if name not in known:
        classes = ", ".join(known)
        raise ModelError(f"{folder} is a diffusers pipeline of class {name}, and base models are of {classes}")
    for part in PARTS:
        if not (folder / part).is_dir():
            raise ModelError(f"{folder} lacks the folder {part} of its pipeline")
    shipped, config = known[name], diffusers_config(folder)
    layers = text_layers(read_config(folder / "text_encoder"))
    distilled = shipped.distilled if shipped.pipeline != "Flux2KleinPipeline" else bool(config.get("is_distilled"))
    defaults, edits = shipped.defaults, shipped.edits
    if not distilled and shipped.distilled:
        undistilled = {"steps": 50, "cfg": 4.0}
        defaults = defaults.model_copy(update=undistilled)
        edits = None if edits is None else edits.model_copy(update=undistilled)
    plain = folder.resolve().name
    return AdapterIndex(
        schema="mos-adapter/1",
        name=plain if _is_plain(plain) else shipped.name,
        description=f"{folder} as it is, a base model without a router",
        license="see the folder",
        pipeline=shipped.pipeline,
        distilled=distilled,
        canvas=shipped.canvas,
        defaults=defaults,
        edits=edits,
        own_layers=own_layers(shipped.pipeline, layers),
        layers=layers,
        blocks=text_blocks(shipped.pipeline, read_config(folder / "transformer")),
    )


@dataclass(frozen=True)
class BaseNetwork:
    """The networks of a base model as numbers, and what is drawn with them, for plans; see `blueprints.Network`.

    Args:
        references: pictures of an edit, each counted as large as the one that is drawn.
        value_bytes: bytes of a value that is not quantised.
    """

    ref: str
    index: AdapterIndex
    shape: BaseShape
    references: int
    canvas: Canvas
    defaults: Defaults
    value_bytes: Literal[2, 4]
    weightless: bool = False

    @property
    def guided(self) -> bool:
        """Whether guidance draws in two branches."""
        return self.defaults.cfg != 1


def base_network(bundle: AdapterBundle, *, precision: str, references: int) -> BaseNetwork:
    """The numbers of a base model, whether or not it was pulled.

    Raises:
        ModelError: its folder is damaged.
        UsageError: it draws from no pictures.
    """
    index = bundle.index
    if references and index.edits is None:
        raise UsageError(f"{bundle.ref} does not edit pictures: it draws from none")
    shape = index.shape
    if shape is None:
        shape = shape_of_folder(index.pipeline, bundle.base)
    value_bytes = 4 if precision == "fp32" else 2
    return BaseNetwork(bundle.ref, index, shape, references, index.canvas, index.defaults, value_bytes)


def _shipped_index(folder: Path) -> AdapterIndex:
    return read_json(AdapterIndex, folder / ADAPTER)


def _is_plain(name: str) -> bool:
    import re

    from mos_cli.utils.validation import PLAIN_NAME

    return re.fullmatch(PLAIN_NAME, name) is not None


def _hash(base: dict[str, str], router: dict[Any, str]) -> str:
    text = json.dumps({"base": base, "router": router}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
