"""Two runs compared, as tables for a terminal of 80 columns: numbers that need no colour."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from mos_cli.config.recipe import with_weights
from mos_cli.routing.diff import NEAR, BranchDifference, Difference, Tally
from mos_cli.routing.trace import Trace
from mos_cli.routing.views.tables import plain_table, printable
from mos_cli.utils.counts import counted

WORD_WIDTH = 18


@dataclass(frozen=True)
class DifferenceView:
    """Which runs were compared, and a table of words per branch; the verdict is `headline`'s."""

    difference: Difference
    a: Trace
    b: Trace

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield _runs(self.a, self.b)
        for name, branch in self.difference.branches.items():
            counts = len(self.a.branches[name].steps), len(self.b.branches[name].steps)
            yield Text(f"\n{name}: {_steps(branch, counts)}", style="bold")
            yield _words(branch)
            for side, words in (("A", branch.only_a), ("B", branch.only_b)):
                if words:
                    yield Text(f"only in {side}: {printable(', '.join(words))}")
        yield Text("")
        yield Text(_legend(self.difference), style="dim")


def headline(difference: Difference) -> str:
    """What came of it, in one line."""
    tally = difference.tally
    if difference.identical:
        return f"the routes are identical: {counted(tally.choices, 'choice')} and their weights"
    agree, near, real = (_percent(part, tally) for part in (tally.agree, tally.near_ties, tally.changes))
    if tally.first is None:
        return f"{agree} of the choices agree; their weights differ by {tally.distance:.4f} on average"
    least, most = ("", "") if difference.exact else ("at least ", "at most ")
    flips = f"{least}{near} are near-ties, {most}{real} real changes"
    return f"{agree} of the choices agree; {flips}; first difference at step {tally.first}"


def _runs(a: Trace, b: Trace) -> Table:
    table = plain_table()
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, trace, other in (("A", a, b), ("B", b, a)):
        recipe = trace.recipe
        facts = [recipe.model, f"seed {recipe.seed}", counted(recipe.steps, "step"), recipe.precision]
        if recipe.quant is not None:
            facts.append(recipe.quant)
        if recipe.feature_cache is not None:
            facts.append(f"feature cache {recipe.feature_cache}")
        facts += [f"LoRA {lora.name}:{lora.scale:g} ({lora.sha256[:10]})" for lora in recipe.loras or ()]
        facts += [own for own, others in zip(_details(trace), _details(other), strict=True) if own not in ("", others)]
        facts += recipe.routes or ()
        if (source := recipe.route_from) is not None:
            facts.append(f"{source.until:.0%} of the steps with the routes of another run")
        prompt = " ".join(recipe.weighted_prompt.split())
        table.add_row(name, Text(printable(f'"{prompt}" ({", ".join(facts)})')))
    return table


def _details(trace: Trace) -> tuple[str, ...]:
    """What is told of a run only where the other differs in it; empty for what it does not have."""
    recipe, batch, edit = trace.recipe, trace.recipe.batch, trace.recipe.edit
    negative = " ".join(with_weights(recipe.negative, recipe.negative_weights).split())
    return (
        f"bundle {trace.made.bundle_hash[:10]}",
        f'negative "{negative}"',
        recipe.solver,
        f"cfg {recipe.cfg:g}",
        "cfg interval {:g},{:g}".format(*recipe.cfg_interval),
        f"{recipe.width}x{recipe.height}",
        "drawn alone" if batch is None else f"{batch.place + 1} of a batch of {batch.size}",
        "" if edit is None else "edited from " + ", ".join(source.sha256[:10] for source in edit.sources),
        "" if edit is None or edit.mask is None else f"mask {edit.mask.sha256[:10]}",
        "" if edit is None else f"image cfg {edit.image_cfg:g}",
        "" if edit is None else f"strength {edit.strength:g}",
    )


def _steps(branch: BranchDifference, counts: tuple[int, int]) -> str:
    compared = len(branch.steps)
    if counts == (compared, compared) and branch.time_distance == 0:
        return f"{counted(compared, 'step')} compared"
    return (
        f"{compared} of {counts[0]} and {counts[1]} steps compared, nearest in time "
        f"({branch.time_distance:.3f} apart at most)"
    )


def _words(branch: BranchDifference) -> Table:
    table = plain_table(show_header=True)
    table.add_column("word", min_width=WORD_WIDTH, max_width=WORD_WIDTH, overflow="fold")
    for heading in ("agree", "near-ties", "changes", "distance", "first"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows: Sequence[tuple[Text, Tally]] = [
        *((Text(printable(word.label), style="dim" if word.special else ""), word.tally) for word in branch.words),
        (Text("all words", style="bold"), branch.tally),
    ]
    for word, tally in rows:
        shares = (_percent(part, tally) for part in (tally.agree, tally.near_ties, tally.changes))
        table.add_row(word, *shares, f"{tally.distance:.4f}", "-" if tally.first is None else str(tally.first))
    return table


def _legend(difference: Difference) -> str:
    lines = [
        "choice: a layer that a token reads in a block at a step",
        f"near-tie: the exchanged layers lie within {NEAR} of a decision's weight in both",
        "distance: between the weights over the layers, 0 = equal, 1 = no layer shared",
        "first: the first step of A at which a choice differs",
    ]
    if not difference.exact:
        lines.insert(2, "  (there may be more: record both with --trace full to tell for certain)")
    return "\n".join(lines)


def _percent(part: int, tally: Tally) -> str:
    """A share to a tenth of a percent that says 0 and 100 only where it is so."""
    share = 100 * part / tally.choices
    if part > 0 and share < 0.1:
        return "<0.1%"
    if part < tally.choices and share > 99.9:
        return ">99.9%"
    return f"{share:.1f}%"
