"""The choices of another run, to draw with: which layers each token reads is taken over, the weights are not.

Shapes: S steps, J generation blocks, T context tokens, K kept layers.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from mos_cli.errors import InputError
from mos_cli.routing.alignment import EncodedPrompt, partners
from mos_cli.routing.analysis import is_special
from mos_cli.routing.trace import Recording, Routes


@dataclass(frozen=True)
class SourceRoutes:
    """The layers another run kept in one branch, [S, J, T, K], and how its steps and tokens match those of this run.

    `steps` maps a step of this run, as far as the choices are given, to an index of S; `tokens_T` holds for each token
    of this run the number it has in the other, or -1.
    """

    ids_SJTK: np.ndarray
    steps: Mapping[int, int]
    tokens_T: tuple[int, ...]


def choices_hash(recording: Recording) -> str:
    """The sha256 of all that `transfer_routes` takes from a recording: its prompts, tokens, times and choices.

    Raises:
        InputError: it is a summary.
    """
    trace, routes, digest = recording.trace, _decisions(recording), hashlib.sha256()
    for name, branch in trace.branches.items():
        read = [branch.prompt, [token.model_dump() for token in branch.tokens], branch.steps, trace.times]
        digest.update(json.dumps([name, read]).encode())
        digest.update(np.ascontiguousarray(routes[name].ids_SJTK).tobytes())
    return digest.hexdigest()


def check_model(recording: Recording, model: str, bundle_hash: str) -> None:
    """Raises InputError if the recording was made by another model: its layers would mean something else."""
    trace = recording.trace
    if trace.made.bundle_hash != bundle_hash:
        theirs = f"{trace.recipe.model} ({trace.made.bundle_hash[:10]})"
        raise InputError(
            f"the routes of {recording.path} are those of {theirs}, which mean nothing to {model} ({bundle_hash[:10]})"
        )


def transfer_routes(
    recording: Recording, encodings: Mapping[str, EncodedPrompt], times: Sequence[float], until: float
) -> dict[str, SourceRoutes]:
    """The choices for each branch that both runs have, at the first part `until` (0 to 1) of this run's steps.

    Words are aligned by their text and occurrence, and a step takes the choices of the other's nearest in time.

    Raises:
        InputError: the recording is a summary, kept every layer, or has no word in common with what is to be drawn.
    """
    routes = _decisions(recording)
    if recording.trace.top_k == len(recording.trace.layers):
        raise InputError(f"{recording.path} kept every layer: there is no choice to take over")
    # Rounded, for 0.07 * 100 is a little more than 7.
    followed, given, words = times[: ceil(round(until * len(times), 9))], {}, 0
    for name, encoding in encodings.items():
        if (branch := recording.trace.branches.get(name)) is None:
            continue
        theirs = np.array([recording.trace.times[step] for step in branch.steps])
        steps = {step: int(np.abs(theirs - t).argmin()) for step, t in enumerate(followed)}
        matched = partners(encoding, branch)
        words += sum(not is_special(encoding.tokens[n]) for n, number in enumerate(matched) if number >= 0)
        given[name] = SourceRoutes(routes[name].ids_SJTK, steps, matched)
    if not words:
        raise InputError(f"the prompts of {recording.path} have no word in common with this one")
    return given


def _decisions(recording: Recording) -> dict[str, Routes]:
    if recording.routes is None:
        raise InputError(f"{recording.path} holds a summary only: its routes cannot be taken over")
    return recording.routes
