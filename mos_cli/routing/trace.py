"""The routing trace: the layers that every token read, at every step, in every block; saved beside the picture.

Shapes: S steps, J generation blocks, T context tokens, K kept layers, M understanding layers, N patches.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, NonNegativeFloat, NonNegativeInt, ValidationError, model_validator

from mos_cli.config.recipe import Provenance, Recipe, pixels_hash
from mos_cli.errors import InputError
from mos_cli.images.companions import FORMER_TRACE_SCHEMA, TRACE_SCHEMA, belongs, companions, pictures_beside
from mos_cli.images.outputs import read_stored
from mos_cli.routing.analysis import summarise
from mos_cli.utils.counts import counted
from mos_cli.utils.validation import Frozen, Sha256, first_problem

Share = Annotated[float, Field(ge=0, le=1 + 1e-3)]
"""A share from 0 to 1, or a little above because of rounding."""


@dataclass(frozen=True)
class RecordOptions:
    """What is recorded in addition to the routes.

    probabilities: the router's, of every layer. regions: the attention of the patches to the words. previews: the
    predicted clean picture of every step.
    """

    probabilities: bool = False
    regions: bool = False
    previews: bool = False


@dataclass(frozen=True)
class Routes:
    """The decisions of one guidance branch: layers kept (best first) and their mixing weights, both [S, J, T, K].

    S are the steps at which the branch was computed, fewer with a guidance interval. On request also the router's
    probabilities of all layers, before any rule, and the regions: the share of a patch's attention to each context
    token, mean over heads and steps.
    """

    ids_SJTK: np.ndarray
    weights_SJTK: np.ndarray
    probabilities_SJTM: np.ndarray | None = None
    regions_JTN: np.ndarray | None = None
    slots_SJTK: np.ndarray | None = None
    """In models whose blocks read several layers side by side: the slot of each kept layer."""


class TraceToken(Frozen):
    """A context token and its span of characters in the branch's prompt, empty for special tokens.

    An image token has a cell of a picture instead: `patch` is (picture, row, column), all counted from 0.
    """

    text: str
    start: int = Field(ge=0)
    end: int = Field(ge=0)
    patch: tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt] | None = None


class BranchSummary(Frozen):
    """The summary of a branch.

    mean_layer_ST: the layer each token reads on average over blocks, weighted, per step.
    layer_use_JM: per block, the share of the mixing weight that each layer got, over steps and tokens.
    entropy_S: per step, the normalised entropy of the layers' shares, over blocks and tokens; 0 = one layer, 1 = equal.
    """

    mean_layer_ST: tuple[tuple[NonNegativeFloat, ...], ...]
    layer_use_JM: tuple[tuple[Share, ...], ...]
    entropy_S: tuple[Share, ...]


class Steered(Frozen):
    """The effect of a rule in a branch: its tokens and the number of its decisions."""

    rule: str
    tokens: tuple[NonNegativeInt, ...]
    decisions: NonNegativeInt


class TraceBranch(Frozen):
    """One guidance branch: its prompt, its tokens, and the numbers of the steps at which it was computed.

    With rules, also the effect of each, and the number of decisions whose kept layers differ from the router's own
    choice at that step.
    """

    prompt: str
    tokens: tuple[TraceToken, ...]
    steps: tuple[NonNegativeInt, ...]
    summary: BranchSummary
    steered: tuple[Steered, ...] | None = None
    changed: NonNegativeInt | None = None


class RegionGrid(Frozen):
    """The grid of patches that regions are recorded on, row by row."""

    rows: int = Field(ge=1)
    columns: int = Field(ge=1)


class TraceArrays(Frozen):
    """The file with every decision, beside the trace."""

    file: str = Field(pattern=r"^[^/\\]+\.routing\.safetensors$")
    sha256: str


class AdapterTrace(Frozen):
    """What a base model with an adapter reads: its own layers, one for each slot of a block, and what a router adds.

    The weights of a trace are what was read: the own layers with one minus the gate, the routed ones with the rest.
    `trained` is false without a router: only rules open gates then.
    """

    own_layers: tuple[NonNegativeInt, ...] = Field(min_length=1)
    trained: bool

    def reads(self, top_k: int) -> str:
        """The layers that a decision keeps, in words, given the `top_k` of the trace."""
        others = top_k // len(self.own_layers) - 1
        reads = (
            "a block reads its own layer" if len(self.own_layers) == 1 else "each slot of a block reads its own layer"
        )
        return f"{reads} and up to {counted(others, 'other')}"

    @property
    def line(self) -> str:
        """What the base model reads, in one line."""
        own = ", ".join(map(str, self.own_layers))
        reads = f"reads its own layer {own}" if len(self.own_layers) == 1 else f"reads its own layers {own} at once"
        if not self.trained:
            return f"{reads}; its adapter is untrained, and changes nothing but where a rule says so"
        return f"{reads}, and what its router adds to them"


class Trace(Frozen):
    """The readable head of a trace. `arrays` is missing in a summary.

    `picture` is the sha256 of the pixels in the file that it belongs to (see `pixels_hash`); it is missing in traces
    of mos 0.1.0, which have the schema mos-trace/1. `probabilities` and `regions` are set where the arrays contain
    them. `adapter` is set for base models: the arrays then have the slot of every layer, and only the tokens of the
    prompt are listed.
    """

    schema_id: Literal["mos-trace/1", "mos-trace/2"] = Field(alias="schema")
    picture: Sha256 | None = None
    recipe: Recipe
    made: Provenance
    layers: tuple[str, ...] = Field(min_length=2)
    blocks: int = Field(ge=1)
    top_k: int = Field(ge=1)
    times: tuple[float, ...]
    branches: dict[str, TraceBranch]
    probabilities: Literal[True] | None = None
    regions: RegionGrid | None = None
    adapter: AdapterTrace | None = None
    arrays: TraceArrays | None = None

    @model_validator(mode="after")
    def _names_its_picture(self) -> "Trace":
        if (self.picture is None) != (self.schema_id == FORMER_TRACE_SCHEMA):
            raise ValueError(f"picture: {TRACE_SCHEMA} needs it, and {FORMER_TRACE_SCHEMA} has none")
        return self

    @model_validator(mode="after")
    def _summaries_fit(self) -> "Trace":
        for name, branch in self.branches.items():
            summary, steps = branch.summary, len(branch.steps)
            fits = (
                0 < steps == len(summary.entropy_S)
                and max(branch.steps) < len(self.times)
                and len(summary.mean_layer_ST) == steps
                and all(len(row) == len(branch.tokens) for row in summary.mean_layer_ST)
                and len(summary.layer_use_JM) == self.blocks
                and all(len(row) == len(self.layers) for row in summary.layer_use_JM)
                and all(step < other for step, other in pairwise(branch.steps))
                and all(token.start <= token.end <= len(branch.prompt) for token in branch.tokens)
                and all(max(rule.tokens, default=0) < len(branch.tokens) for rule in branch.steered or ())
            )
            if not fits:
                raise ValueError(f"the summary of branch {name} does not fit its steps, tokens, layers and blocks")
        return self


def make_branch(
    prompt: str, tokens: Sequence[TraceToken], steps: Sequence[int], routes: Routes, layers: int
) -> TraceBranch:
    """The description of one branch with its summary."""
    summary = BranchSummary(**summarise(routes.ids_SJTK, routes.weights_SJTK, layers))
    return TraceBranch(prompt=prompt, tokens=tuple(tokens), steps=tuple(steps), summary=summary)


def trace_files(trace: Trace, routes: Mapping[str, Routes] | None, picture: Path) -> dict[Path, bytes]:
    """The contents of the files of a trace beside `picture`: its head and, if `routes` are given, the arrays."""
    from safetensors.numpy import save

    beside, arrays = companions(picture), {}
    if routes is not None:
        data = save(
            {
                f"{name}.{array.name}": np.ascontiguousarray(getattr(branch, array.field), dtype=array.dtype)
                for name, branch in routes.items()
                for array in _arrays(trace, name)
            },
            metadata={"schema": TRACE_SCHEMA},
        )
        pointer = TraceArrays(file=beside.arrays.name, sha256=hashlib.sha256(data).hexdigest())
        trace = trace.model_copy(update={"arrays": pointer})
        arrays[beside.arrays] = data
    return {beside.head: (trace.model_dump_json(indent=1, exclude_none=True) + "\n").encode(), **arrays}


def load_trace(path: Path) -> Trace:
    """Reads the head of a trace, given its .json or the picture beside it.

    Raises:
        InputError: there is no such trace, or it is damaged or of another version.
    """
    named, path = path, companions(path).head
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        if named != path and named.is_file() and isinstance(error, FileNotFoundError):
            raise InputError(f"{named} has no trace beside it: {path} is not there") from None
        raise InputError(f"cannot read the trace {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path} is not JSON: the trace is damaged or something else") from None
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema not in (TRACE_SCHEMA, FORMER_TRACE_SCHEMA):
        raise InputError(f"{path} is not a trace this version reads (schema {schema!r}, expected {TRACE_SCHEMA!r})")
    try:
        return Trace.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{path} is damaged: {first_problem(error)}") from None


def load_routes(trace: Trace, path: Path) -> dict[str, Routes]:
    """Reads every decision of a trace loaded from `path`, checked against hash and shape.

    Raises:
        InputError: the trace holds a summary only, or the arrays are missing or damaged.
    """
    if trace.arrays is None:
        raise InputError(f"{path} holds a summary only: draw with --trace topk to record every decision")
    arrays_path = path.with_name(trace.arrays.file)
    try:
        data = arrays_path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {arrays_path}: {error.strerror}") from None
    return read_routes(trace, data, str(arrays_path), path.name)


def read_routes(trace: Trace, data: bytes, name: str, head: str) -> dict[str, Routes]:
    """The decisions of a trace in the bytes of its arrays, checked against hash and shape.

    Args:
        name, head: what messages call the arrays and the trace.

    Raises:
        InputError: they are damaged, or those of another trace.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(data)
        found = {key: {a: tensors[f"{key}.{a.name}"] for a in _arrays(trace, key)} for key in trace.branches}
    except (SafetensorError, KeyError):
        raise InputError(f"{name} is damaged") from None
    fits = all((v.shape, v.dtype) == (a.shape, a.dtype) for arrays in found.values() for a, v in arrays.items())
    if trace.arrays is None or hashlib.sha256(data).hexdigest() != trace.arrays.sha256 or not fits:
        raise InputError(f"{name} does not belong to {head}")
    routes = {key: Routes(**{a.field: value for a, value in arrays.items()}) for key, arrays in found.items()}
    if not all(_valid(branch, len(trace.layers)) and _slots_exist(trace, branch) for branch in routes.values()):
        raise InputError(f"{name} is damaged: it holds layers or weights that cannot be")
    return routes


def _valid(routes: Routes, layers: int) -> bool:
    """Whether all layers exist, all weights and shares are finite and not negative, and the first weights above 0."""
    shares = (routes.weights_SJTK, routes.probabilities_SJTM, routes.regions_JTN)
    sound = all(np.isfinite(array).all() and (array >= 0).all() for array in shares if array is not None)
    return bool(sound and routes.ids_SJTK.max(initial=0) < layers and (routes.weights_SJTK[..., 0] > 0).all())


def _slots_exist(trace: Trace, routes: Routes) -> bool:
    """Whether all slots of the routes are those of the base model."""
    if trace.adapter is None or routes.slots_SJTK is None:
        return True
    return bool(routes.slots_SJTK.max(initial=0) < len(trace.adapter.own_layers))


@dataclass(frozen=True)
class Recording:
    """A trace with the files beside it. `routes` is None for a summary; `picture` and `previews` may be missing.

    `previews` is an animated WebP with the predicted clean picture of each step as a frame. `checked` is False if there
    is a picture, and the trace is of mos 0.1.0 and does not say whether it is its own.
    """

    path: Path
    trace: Trace
    routes: dict[str, Routes] | None
    picture: Path | None
    previews: Path | None
    checked: bool = True


def load_recording(path: Path) -> Recording:
    """Reads a trace with its arrays, and finds the files beside it, given its .json or the picture.

    Raises:
        InputError: there is no such trace, a part of it is damaged, or it is the trace of another picture than the one
            beside it.
    """
    trace, beside = load_trace(path), companions(path)
    picture, checked = _find_picture(trace, beside.head, path)
    previews = beside.previews if beside.previews.is_file() else None
    routes = None if trace.arrays is None else load_routes(trace, path)
    return Recording(path, trace, routes, picture, previews, checked)


def _find_picture(trace: Trace, head: Path, path: Path) -> tuple[Path | None, bool]:
    """The picture beside a trace, and whether the trace says that it is its own.

    Raises:
        InputError: it belongs to another.
    """
    pictures = pictures_beside(path)
    named = trace.model_dump(mode="json", include={"schema_id", "picture", "recipe", "made"})
    for picture in pictures:
        image, record = read_stored(picture)
        if (match := belongs(named, pixels_hash(image), record)) is not False:
            return picture, match is True
    if pictures:
        raise InputError(f"{head} is the trace of another picture than {pictures[0]}: move one of the two away")
    return None, True


@dataclass(frozen=True)
class _Array:
    """An array of a branch: its name in the file, the field of `Routes` that holds it, its shape and type."""

    name: str
    field: str
    shape: tuple[int, ...]
    dtype: np.dtype


def _arrays(trace: Trace, name: str) -> list[_Array]:
    """The arrays of a branch in the file."""
    branch, f16 = trace.branches[name], np.dtype(np.float16)
    decisions = (len(branch.steps), trace.blocks, len(branch.tokens))
    arrays = [
        _Array("ids", "ids_SJTK", (*decisions, trace.top_k), np.dtype(np.uint8)),
        _Array("weights", "weights_SJTK", (*decisions, trace.top_k), f16),
    ]
    if trace.adapter is not None:
        arrays.append(_Array("slots", "slots_SJTK", (*decisions, trace.top_k), np.dtype(np.uint8)))
    if trace.probabilities:
        arrays.append(_Array("probabilities", "probabilities_SJTM", (*decisions, len(trace.layers)), f16))
    if trace.regions is not None:
        patches = trace.regions.rows * trace.regions.columns
        arrays.append(_Array("regions", "regions_JTN", (trace.blocks, len(branch.tokens), patches), f16))
    return arrays
