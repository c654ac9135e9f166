"""Adapters for open pretrained pipelines of diffusers, and the base models that they are for. Imports no torch.

An adapter is `adapter.json` and, once trained, the weights of its router. Its base model is a diffusers folder: fetched
from the hub at a revision that the user's lock file pins, or any folder on the disk.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator

from mos_cli.bundles.bundle import ADAPTER, Bundle
from mos_cli.bundles.shapes import Header
from mos_cli.bundles.specs import Canvas, Defaults, EditDefaults
from mos_cli.errors import ModelError, UsageError
from mos_cli.utils.files import sha256_of
from mos_cli.utils.folders import models_folder, user_data_folder
from mos_cli.utils.validation import HUB_ID, Frozen, PlainName, Sha256, read_json

ROUTER = "router.safetensors"
DIFFUSERS_INDEX = "model_index.json"
"""The file of a diffusers folder that names its pipeline and its parts; a bundle has a file of the same name."""
PARTS = ("transformer", "text_encoder", "tokenizer", "vae", "scheduler")
KEPT: dict[str, tuple[str, ...]] = {
    "Flux2KleinPipeline": (
        "context_embedder",
        "x_embedder",
        "proj_out",
        "norm_out",
        "time_guidance_embed",
        "double_stream_modulation_img",
        "double_stream_modulation_txt",
        "single_stream_modulation",
    ),
    "ZImagePipeline": ("cap_embedder", "all_x_embedder", "all_final_layer", "t_embedder"),
    "PRXPipeline": ("txt_in", "img_in", "time_in", "final_layer"),
}
"""The modules of each transformer that are not quantised: its inputs and outputs, and what sets all of its blocks."""
SUFFIXES = (".json", ".jinja", ".model", ".safetensors", ".txt")
"""The files of a base model that are read; none of them is code."""

TEXT_TOKENS = {"Flux2KleinPipeline": 512, "ZImagePipeline": 512, "PRXPipeline": 256}
"""The tokens of the text that each transformer reads at most; PRX and FLUX.2-klein pad to as many."""
PipelineClass = Literal["Flux2KleinPipeline", "ZImagePipeline", "PRXPipeline"]
"""The pipelines of diffusers that can be base models. A folder of any other class is refused."""
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


class PartShape(Frozen):
    """A network of a base model as numbers, for plans.

    Args:
        parameters: all of them.
        linear: weights of the layers that are quantised, and `rows` their outputs.
        widest: weights of the largest of these layers, and `longest` its outputs.
    """

    parameters: int = Field(gt=0)
    linear: int = Field(default=0, ge=0)
    rows: int = Field(default=0, ge=0)
    widest: int = Field(default=0, ge=0)
    longest: int = Field(default=0, ge=0)


class BaseShape(Frozen):
    """The networks of a base model as numbers.

    Args:
        width, head_width: of the transformer's blocks, and of their attention's heads.
        states_width: width of a state of the language model.
        text_tokens: tokens of the text that the transformer reads, padding included.
        joint: whether the text is in one sequence with the picture.
    """

    transformer: PartShape
    text_encoder: PartShape
    vae: PartShape
    width: int = Field(gt=0)
    head_width: int = Field(gt=0)
    states_width: int = Field(gt=0)
    text_tokens: int = Field(gt=0)
    latent_channels: int = Field(gt=0)
    decoder_width: int = Field(gt=0)
    joint: bool


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


def is_base_file(name: str) -> bool:
    """Whether a path, relative to a diffusers folder, is a file that is read from it."""
    folder, _, file = name.rpartition("/")
    inside = folder in PARTS and "/" not in file and not file.startswith(".")
    return name == DIFFUSERS_INDEX or (inside and "\\" not in file and file.endswith(SUFFIXES))


def base_files(folder: Path) -> list[str]:
    """The files of a diffusers folder that are read, sorted."""
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(filter(is_base_file, files))


def shipped_adapters() -> dict[str, Path]:
    """The adapters that come with mos, by name: their folders."""
    return {path.parent.name: path.parent for path in sorted(models_folder().glob(f"*/{ADAPTER}"))}


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, or is a diffusers folder."""
    return (folder / ADAPTER).is_file() or _diffusers_class(folder) is not None


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
    if not local.is_absolute() or _diffusers_class(local) is None:
        raise ModelError(f"the base model of {folder} is not in {local}: set base in {folder / ADAPTER}")
    return AdapterBundle(folder, index, local=local)


def local_index(folder: Path) -> AdapterIndex:
    """The index of a diffusers folder on the disk, from its configs and the shipped adapter of its pipeline."""
    name = _diffusers_class(folder)
    known = {index.pipeline: index for index in map(_shipped_index, shipped_adapters().values())}
    if name not in known:
        classes = ", ".join(known)
        raise ModelError(f"{folder} is a diffusers pipeline of class {name}, and base models are of {classes}")
    for part in PARTS:
        if not (folder / part).is_dir():
            raise ModelError(f"{folder} lacks the folder {part} of its pipeline")
    shipped, config = known[name], _json(folder / DIFFUSERS_INDEX)
    layers = text_layers(_json(folder / "text_encoder" / "config.json"))
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
        blocks=text_blocks(shipped.pipeline, _json(folder / "transformer" / "config.json")),
    )


def text_layers(config: dict[str, Any]) -> int:
    """The states of a token of a text encoder, the embedding's output included, from its config."""
    text = config.get("text_config") or config.get("encoder") or config
    try:
        return int(text["num_hidden_layers"]) + 1
    except (KeyError, TypeError, ValueError):
        raise ModelError("the text encoder's config has no num_hidden_layers") from None


def text_blocks(pipeline: PipelineClass, config: dict[str, Any]) -> int:
    """The blocks of a transformer that read text, from its config."""
    names = {
        "Flux2KleinPipeline": ("num_layers", "num_single_layers"),
        "ZImagePipeline": ("n_layers",),
        "PRXPipeline": ("depth",),
    }[pipeline]
    try:
        return sum(int(config[name]) for name in names)
    except (KeyError, TypeError, ValueError):
        raise ModelError(f"the transformer's config has no {' and '.join(names)}") from None


def own_layers(pipeline: PipelineClass, layers: int) -> tuple[int, ...]:
    """The layers that a pipeline of diffusers reads itself, one per slot."""
    own: dict[PipelineClass, Sequence[int]] = {
        "Flux2KleinPipeline": (9, 18, 27),
        "ZImagePipeline": (layers - 2,),
        "PRXPipeline": (layers - 1,),
    }
    if max(own[pipeline]) >= layers:
        raise ModelError(f"{pipeline} reads the layers {own[pipeline]}, and the text encoder has {layers} states")
    return tuple(own[pipeline])


def shape_of_folder(pipeline: PipelineClass, folder: Path) -> BaseShape:
    """The networks of a diffusers folder as numbers, from its configs and the headers of its weights.

    Raises:
        ModelError: a config or a header is damaged.
    """
    transformer, vae = (_json(folder / part / "config.json") for part in ("transformer", "vae"))
    text = _json(folder / "text_encoder" / "config.json")
    text = text.get("text_config") or text.get("encoder") or text
    try:
        width, head_width = {
            "Flux2KleinPipeline": lambda c: (
                c["attention_head_dim"] * c["num_attention_heads"],
                c["attention_head_dim"],
            ),
            "ZImagePipeline": lambda c: (c["dim"], c["dim"] // c["n_heads"]),
            "PRXPipeline": lambda c: (c["hidden_size"], c["hidden_size"] // c["num_heads"]),
        }[pipeline](transformer)
        return BaseShape(
            transformer=_part_shape(folder / "transformer", KEPT[pipeline]),
            text_encoder=_part_shape(folder / "text_encoder", ("lm_head",)),
            vae=_part_shape(folder / "vae", ()),
            width=width,
            head_width=head_width,
            states_width=text["hidden_size"],
            text_tokens=TEXT_TOKENS[pipeline],
            latent_channels=vae["latent_channels"],
            decoder_width=(vae.get("decoder_block_out_channels") or vae["block_out_channels"])[0],
            joint=pipeline != "PRXPipeline",
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"the configs in {folder} are damaged: {error}") from None


def _part_shape(folder: Path, kept: tuple[str, ...]) -> PartShape:
    shapes = Header.of(folder).shapes
    linear = [
        shape
        for name, shape in shapes.items()
        if len(shape) == 2
        and shape[1] % 64 == shape[0] % 32 == 0
        and "embed_tokens" not in name
        and not any(name.startswith(f"{module}.") for module in kept)
    ]
    widest = max(linear, key=prod, default=(0, 0))
    return PartShape(
        parameters=sum(map(prod, shapes.values())),
        linear=sum(map(prod, linear)),
        rows=sum(rows for rows, _ in linear),
        widest=prod(widest),
        longest=widest[0],
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


def diffusers_config(folder: Path) -> dict[str, Any]:
    """The content of a diffusers folder's index; raises ModelError."""
    return _json(folder / DIFFUSERS_INDEX)


def _shipped_index(folder: Path) -> AdapterIndex:
    return read_json(AdapterIndex, folder / ADAPTER)


def _diffusers_class(folder: Path) -> str | None:
    try:
        name = json.loads((folder / DIFFUSERS_INDEX).read_bytes()).get("_class_name")
    except (OSError, ValueError, AttributeError):
        return None
    return name if isinstance(name, str) else None


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        raise ModelError(f"{path} cannot be read") from None


def _is_plain(name: str) -> bool:
    import re

    from mos_cli.utils.validation import PLAIN_NAME

    return re.fullmatch(PLAIN_NAME, name) is not None


def _hash(base: dict[str, str], router: dict[Any, str]) -> str:
    text = json.dumps({"base": base, "router": router}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
