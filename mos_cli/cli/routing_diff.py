"""`mos routing diff`: the choices of two runs compared, word by word."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mos_cli.cli.completion import trace_paths
from mos_cli.cli.loading import refuse_folders, say_if_unchecked
from mos_cli.cli.output import print_view, stdout

if TYPE_CHECKING:
    from mos_cli.routing.diff import Difference, Tally
    from mos_cli.routing.trace import Trace

Run = Annotated[Path, typer.Argument(autocompletion=trace_paths, help="A trace (.json), or the picture beside it.")]


def diff(
    a: Run,
    b: Run,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare the choices of two runs, word by word: what agrees, what was a near-tie, what really changed.

    Works between any two runs of models with the same layers and blocks: other seeds, other prompts (words are aligned
    by their text), other numbers of steps (those nearest in time are compared). Between a quantised model and its full
    precision, with the same prompt and seed, it measures fidelity: near-ties are what rounding may flip, real changes
    are what the quantisation costs. Record both with --trace full to tell the two apart for certain.
    """
    from mos_cli.routing.diff import compare
    from mos_cli.routing.trace import load_recording, load_routes

    refuse_folders(a, b)
    heads, routes = {}, {}
    for path in (a, b):
        recording = load_recording(path)
        say_if_unchecked(recording)
        heads[path], routes[path] = recording.trace, recording.routes or load_routes(recording.trace, path)
    difference = compare(heads[a], routes[a], heads[b], routes[b])
    if as_json:
        import json

        typer.echo(json.dumps(_as_dict(difference, heads[a], heads[b])))
        return
    from mos_cli.routing.views.difference import DifferenceView, headline

    stdout.print(headline(difference), soft_wrap=True, markup=False)
    if not difference.identical:
        stdout.print()
        print_view(DifferenceView(difference, heads[a], heads[b]))


def _as_dict(difference: "Difference", a: "Trace", b: "Trace") -> dict[str, Any]:
    from mos_cli.routing.diff import NEAR

    return {
        "a": a.recipe.model_dump(mode="json", exclude_none=True),
        "b": b.recipe.model_dump(mode="json", exclude_none=True),
        "identical": difference.identical,
        "near_tie": NEAR,
        "exact": difference.exact,
        **_counts(difference.tally),
        "branches": {
            name: {
                "steps": branch.steps,
                "apart": branch.time_distance,
                "only_a": branch.only_a,
                "only_b": branch.only_b,
                **_counts(branch.tally),
                "words": [
                    {"word": word.text, "nth": word.nth, "special": word.special, **_counts(word.tally)}
                    for word in branch.words
                ],
            }
            for name, branch in difference.branches.items()
        },
    }


def _counts(tally: "Tally") -> dict[str, Any]:
    return {
        "choices": tally.choices,
        "overlap": round(tally.agree / tally.choices, 6),
        "near_ties": tally.near_ties,
        "changes": tally.changes,
        "distance": round(tally.distance, 6),
        "first": tally.first,
    }
