"""The routes of one branch as tables for a terminal: numbers that need no colour, on colours that help.

Shapes: S steps, J generation blocks, T context tokens, M understanding layers.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderResult
from rich.style import Style
from rich.table import Table
from rich.text import Text

from mos_cli.routing.analysis import (
    Word,
    agreement,
    dead_layers,
    strongest_layers,
    word_layers,
)
from mos_cli.routing.trace import Trace, TraceBranch

CELL = 5
WORD_WIDTH = 18
BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", "_.,-=+*#"
# Viridis, coarsely: its brightness grows evenly, so that the order survives a poor display.
SCALE = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


@dataclass(frozen=True)
class RoutesView:
    """A branch of a trace, as wide as the console: overview, words x steps, entropy, blocks x layers.

    Args:
        name: the branch, a key of `trace.branches`.
        words: the words of its prompt to show.
        changes: what `step_changes` says of the branch; None where the trace is a summary.
    """

    trace: Trace
    name: str
    words: Sequence[Word]
    changes: Sequence[float] | None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        branch, last = self.trace.branches[self.name], len(self.trace.layers) - 1
        yield self._overview(branch)
        yield _heading(f"words x steps: the layer read on average, 0 to {last}")
        yield self._words(branch, options.max_width)
        yield _heading("entropy: how evenly the layers share the weight, 0 = one layer, 1 = all alike")
        yield self._entropy(branch, options.max_width, ASCII_BARS if options.ascii_only else BARS)
        yield _heading("blocks x layers: percent of a block's weight; '-' = none at all")
        yield from _layer_use(branch.summary.layer_use_JM, options.max_width)

    def _overview(self, branch: TraceBranch) -> Table:
        trace, recipe, use_JM = self.trace, self.trace.recipe, branch.summary.layer_use_JM
        others = {name: other for name, other in trace.branches.items() if name != self.name}
        lines = {
            "prompt": " ".join(branch.prompt.split()) or "(empty)",
            "branch": self.name + "".join(f", beside {name}" for name in others),
            "model": recipe.model,
            "seed": str(recipe.seed),
            "steps": f"{len(branch.steps)} of {recipe.steps}",
            "routes": f"{len(trace.layers)} layers x {trace.blocks} blocks, top {trace.top_k}",
            "layers": f"0 = {trace.layers[0]} ... {len(trace.layers) - 1} = {trace.layers[-1]}",
            "strongest": ", ".join(f"{layer} ({share:.0%})" for layer, share in strongest_layers(use_JM)),
            "dead": ", ".join(map(str, dead_layers(use_JM))) or "none",
        }
        if self.changes:
            mean = sum(self.changes) / len(self.changes)
            lines["changes"] = f"{mean:.0%} of the kept layers are new at a step, on average"
        for name, other in others.items():
            shared = agreement(use_JM, other.summary.layer_use_JM)
            mean = sum(shared) / len(shared)
            lines["agreement"] = f"{mean:.0%} of the weight goes to the same layers as in {name}"
        table = _table()
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        for heading, text in lines.items():
            table.add_row(heading, Text(text))
        return table

    def _words(self, branch: TraceBranch, width: int) -> Table:
        last = len(self.trace.layers) - 1
        table, columns = _steps_table(self.trace, branch, width)
        for word in self.words:
            layers_S = word_layers(word, branch.summary.mean_layer_ST)
            cells = [_shaded(f"{layers_S[column]:.1f}", layers_S[column] / last) for column in columns]
            table.add_row(Text(word.text, style="dim" if word.special else ""), *cells)
        return table

    def _entropy(self, branch: TraceBranch, width: int, bars: str) -> Table:
        table, columns = _steps_table(self.trace, branch, width)
        values = [branch.summary.entropy_S[column] for column in columns]
        table.add_row("entropy", *(f"{value:.2f}" for value in values))
        heights = (bars[min(int(value * len(bars)), len(bars) - 1)] for value in values)
        table.add_row("", *(height * (CELL - 1) for height in heights))
        return table


def _steps_table(trace: Trace, branch: TraceBranch, width: int) -> tuple[Table, list[int]]:
    """An empty table of steps, as many as fit, evenly chosen; and which of the branch's steps they are."""
    count = min(len(branch.steps), max(2, (width - WORD_WIDTH - 1) // CELL))
    columns = [round(i * (len(branch.steps) - 1) / max(1, count - 1)) for i in range(count)]
    table = _table(show_header=True)
    table.add_column("step", min_width=WORD_WIDTH, max_width=WORD_WIDTH, overflow="fold")
    for column in columns:
        table.add_column(str(branch.steps[column]), justify="right", no_wrap=True, min_width=CELL - 1)
    table.add_row("t", *(f"{trace.times[branch.steps[column]]:.2f}" for column in columns), style="dim")
    return table, columns


def _layer_use(layer_use_JM: Sequence[Sequence[float]], width: int) -> Iterable[Table]:
    """Blocks x layers, in as many tables as the layers need to fit."""
    layers = len(layer_use_JM[0])
    most = max(map(max, layer_use_JM))
    fit = max(1, (width - len("block") - 1) // CELL)
    for first in range(0, layers, fit):
        shown = range(first, min(first + fit, layers))
        table = _table(show_header=True)
        table.add_column("block", justify="right", no_wrap=True)
        for layer in shown:
            table.add_column(str(layer), justify="right", no_wrap=True, min_width=CELL - 1)
        for block, use_M in enumerate(layer_use_JM):
            cells = [_shaded(f"{100 * use_M[m]:.0f}", use_M[m] / most) if use_M[m] else Text("-") for m in shown]
            table.add_row(str(block), *cells)
        yield table


def _table(show_header: bool = False) -> Table:
    return Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), show_header=show_header, header_style="dim")


def _heading(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def _shaded(text: str, fraction: float) -> Text:
    """A number on a background from dark (0) to bright (1), in the ink that is read best on it."""
    place = fraction * (len(SCALE) - 1)
    below = min(int(place), len(SCALE) - 2)
    colours = zip(SCALE[below], SCALE[below + 1], strict=True)
    red, green, blue = (low + (place - below) * (high - low) for low, high in colours)
    ink = "#000000" if fraction > 0.4 else "#ffffff"
    return Text(text.rjust(CELL - 1), style=Style(color=ink, bgcolor=Color.from_rgb(red, green, blue)))
