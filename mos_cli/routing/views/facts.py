"""A section of the routes as plain values, for JSON.

Shapes: S steps, J generation blocks, T context tokens, M understanding layers.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mos_cli.routing.analysis import DIGITS, Word, dead_layers, strongest_layers, word_layers
from mos_cli.routing.regions import PatchSource
from mos_cli.routing.section import Section, layer_use, readers, slot_use


def section_facts(section: Section, requested: Sequence[Word] = ()) -> dict[str, Any]:
    """The content of `RoutesView` as one JSON object; null where a summary lacks the data."""
    trace, summary, routes = section.recording.trace, section.summary, section.routes
    recipe, branch, mean_layer_ST = trace.recipe, section.branch, np.array(summary.mean_layer_ST)
    weights = section.weights
    return {
        "overview": {
            "prompt": branch.prompt,
            "branch": section.name,
            "branches": list(trace.branches),
            "model": recipe.model,
            "seed": recipe.seed,
            "steps": recipe.steps,
            "feature_cache": recipe.feature_cache,
            "layers": list(trace.layers),
            "blocks": trace.blocks,
            "top_k": trace.top_k,
            "adapter": None if trace.adapter is None else trace.adapter.model_dump(),
        },
        "steps": list(section.steps),
        "times": section.times,
        "blocks": list(section.blocks),
        "words": [
            {
                "word": word.text,
                "nth": word.nth,
                "special": word.special,
                "tokens": list(word.tokens),
                "mean_layer": word_layers(word, mean_layer_ST),
                "weights": [weights[number] for number in word.tokens],
            }
            for word in requested or section.words
        ],
        "readers": None
        if routes is None
        else [
            {
                "reader": word.text,
                "nth": word.nth,
                "layer_use": layer_use(routes, word.tokens, len(trace.layers)).round(DIGITS).tolist(),
            }
            for word in readers(section, requested)
        ],
        "slots": None
        if routes is None or trace.adapter is None
        else [
            {"own_layer": own, "layer_use": use_M.round(DIGITS).tolist()}
            for own, use_M in zip(
                trace.adapter.own_layers,
                slot_use(routes, len(trace.adapter.own_layers), len(trace.layers)),
                strict=True,
            )
        ],
        "layer_use": summary.layer_use_JM,
        "entropy": summary.entropy_S,
        "strongest": [{"layer": layer, "share": share} for layer, share in strongest_layers(summary.layer_use_JM)],
        "dead": dead_layers(summary.layer_use_JM),
        "changes": section.changes,
        "agreement": section.agreement,
        "rules": {
            "asked": list(recipe.routes or ()),
            "route_from": None if recipe.route_from is None else recipe.route_from.model_dump(),
            "done": [steered.model_dump() for steered in section.steered],
            "changed": section.changed,
        },
    }


def patch_facts(patch: tuple[int, int], origins: Sequence[PatchSource]) -> dict[str, Any]:
    """The content of `PatchView` as one JSON object."""
    return {
        "patch": list(patch),
        "origins": [
            {
                "word": origin.word.text,
                "nth": origin.word.nth,
                "special": origin.word.special,
                "tokens": list(origin.word.tokens),
                "attention": round(origin.attention, 6),
                "of_words": None if origin.of_words is None else round(origin.of_words, DIGITS),
                "layer": origin.layer,
                "part": round(origin.part, DIGITS),
            }
            for origin in origins
        ],
    }
