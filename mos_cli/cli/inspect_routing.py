"""`mos inspect-routing`: which layer each word read, step by step."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mos_cli.cli import console

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mos_cli.routing.analysis import Word
    from mos_cli.routing.trace import Trace


def inspect_routing(
    trace: Annotated[Path, typer.Argument(help="A trace (.json), or the picture beside it.", dir_okay=False)],
    branch: Annotated[str, typer.Option(help="The guidance branch to show: positive or negative.")] = "positive",
    word: Annotated[list[str] | None, typer.Option("--word", "-w", help="Show only this word; repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the routes that drew a picture: which layers of the language model its words read, and when."""
    from mos_cli.errors import UsageError
    from mos_cli.routing.analysis import find_words, split_words, step_changes
    from mos_cli.routing.trace import load_routes, load_trace

    head = load_trace(trace)
    if branch not in head.branches:
        raise UsageError(f"the trace has no {branch!r} branch: it has {', '.join(head.branches)}")
    words = split_words(head.branches[branch].prompt, head.branches[branch].tokens)
    if word:
        words = find_words(words, word)
    changes = step_changes(load_routes(head, trace)[branch].ids_SJTK) if head.arrays else None
    if as_json:
        import json

        typer.echo(json.dumps(_as_dict(head, branch, words, changes), ensure_ascii=False))
        return
    from mos_cli.routing.views.terminal import RoutesView

    console.out.print(RoutesView(head, branch, words, changes))


def _as_dict(trace: "Trace", name: str, words: "Sequence[Word]", changes: "Sequence[float] | None") -> dict[str, Any]:
    from mos_cli.routing.analysis import agreement, dead_layers, strongest_layers, word_layers

    branch, recipe = trace.branches[name], trace.recipe
    summary = branch.summary
    return {
        "overview": {
            "prompt": branch.prompt,
            "branch": name,
            "branches": list(trace.branches),
            "model": recipe.model,
            "seed": recipe.seed,
            "steps": recipe.steps,
            "layers": list(trace.layers),
            "blocks": trace.blocks,
            "top_k": trace.top_k,
        },
        "steps": list(branch.steps),
        "times": [trace.times[step] for step in branch.steps],
        "words": [
            {
                "word": word.text,
                "special": word.special,
                "tokens": list(word.tokens),
                "mean_layer": word_layers(word, summary.mean_layer_ST),
            }
            for word in words
        ],
        "layer_use": summary.layer_use_JM,
        "entropy": summary.entropy_S,
        "strongest": [{"layer": layer, "share": share} for layer, share in strongest_layers(summary.layer_use_JM)],
        "dead": dead_layers(summary.layer_use_JM),
        "changes": changes,
        "agreement": {
            other: agreement(summary.layer_use_JM, trace.branches[other].summary.layer_use_JM)
            for other in trace.branches
            if other != name
        },
    }
