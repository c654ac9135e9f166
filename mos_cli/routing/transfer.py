"""Routes of another run: the layers that each token reads are taken over, their weights are not.

Shapes: S steps, J generation blocks, T context tokens, K kept layers.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from mos_cli.config.recipe import Recipe
from mos_cli.errors import InputError, UsageError
from mos_cli.routing.alignment import EncodedPrompt, partners
from mos_cli.routing.analysis import is_special
from mos_cli.routing.trace import Recording, Routes


@dataclass(frozen=True)
class SourceRoutes:
    """The layers that another run kept in one branch, [S, J, T, K], and the match of its steps and tokens.

    `steps` maps the steps of this run that take routes over to an index of S. `tokens_T` has the number of each token
    of this run in the other, or -1. `slots_SJTK` are the slots of the layers, in models that have them.
    """

    ids_SJTK: np.ndarray
    steps: Mapping[int, int]
    tokens_T: tuple[int, ...]
    slots_SJTK: np.ndarray | None = None


def choices_hash(recording: Recording) -> str:
    """The sha256 of everything that `transfer_routes` uses of a recording: prompts, tokens, times and layers.

    Raises:
        InputError: it holds a summary only.
    """
    trace, routes, digest = recording.trace, _decisions(recording), hashlib.sha256()
    for name, branch in trace.branches.items():
        used = [branch.prompt, [token.model_dump() for token in branch.tokens], branch.steps, trace.times]
        digest.update(json.dumps([name, used]).encode())
        digest.update(np.ascontiguousarray(routes[name].ids_SJTK).tobytes())
    return digest.hexdigest()


def check_model(recording: Recording, model: str, bundle_hash: str) -> None:
    """Raises InputError if the recording was made by another model, whose layers are others."""
    trace = recording.trace
    if trace.made.bundle_hash != bundle_hash:
        other = f"{trace.recipe.model} ({trace.made.bundle_hash[:10]})"
        raise InputError(
            f"the routes of {recording.path} are those of {other}, which mean nothing to {model} ({bundle_hash[:10]})"
        )


def routes_of_run(
    recipe: Recipe,
    recording: Recording | None,
    bundle_hash: str,
    encodings: Mapping[str, EncodedPrompt],
    times: Sequence[float],
) -> dict[str, SourceRoutes] | None:
    """The routes that a picture takes from another run, as `transfer_routes` returns them; None if it takes none.

    Args:
        recording: the run that its recipe names by its hash.

    Raises:
        UsageError: the recording is not given, or is that of another run.
        InputError: it was made by another model, or as `transfer_routes` does.
    """
    if recipe.route_from is None:
        return None
    if recording is None:
        raise UsageError(f"{recipe.prompt!r} takes its routes from another run: name it with --route-from FILE")
    if choices_hash(recording) != recipe.route_from.sha256:
        raise UsageError(f"{recording.path} is not the run that {recipe.prompt!r} takes its routes from")
    check_model(recording, recipe.model, bundle_hash)
    return transfer_routes(recording, encodings, times, recipe.route_from.until)


def transferred_steps(until: float, steps: int) -> int:
    """The number of the first steps that the share `until` of a run's steps stands for, rounded up."""
    # 0.07 * 100 is a little more than 7.
    return ceil(round(until * steps, 9))


def transfer_routes(
    recording: Recording, encodings: Mapping[str, EncodedPrompt], times: Sequence[float], until: float
) -> dict[str, SourceRoutes]:
    """The routes for each branch that both runs have, for the first `transferred_steps` of this run.

    Words are aligned by their text and occurrence, and a step takes the routes of the other run's nearest in time.

    Raises:
        InputError: the recording holds a summary only, kept every layer, or has no word in common with this run.
    """
    routes = _decisions(recording)
    if recording.trace.top_k == len(recording.trace.layers):
        raise InputError(f"{recording.path} kept every layer: there is no choice to take over")
    followed, transferred, words = times[: transferred_steps(until, len(times))], {}, 0
    for name, encoding in encodings.items():
        if (branch := recording.trace.branches.get(name)) is None:
            continue
        source_times = np.array([recording.trace.times[step] for step in branch.steps])
        steps = {step: int(np.abs(source_times - t).argmin()) for step, t in enumerate(followed)}
        matched = partners(encoding, branch)
        words += sum(not is_special(encoding.tokens[n]) for n, number in enumerate(matched) if number >= 0)
        transferred[name] = SourceRoutes(routes[name].ids_SJTK, steps, matched, routes[name].slots_SJTK)
    if not words:
        raise InputError(f"the prompts of {recording.path} have no word in common with this one")
    return transferred


def _decisions(recording: Recording) -> dict[str, Routes]:
    if recording.routes is None:
        raise InputError(f"{recording.path} holds a summary only: its routes cannot be taken over")
    return recording.routes
