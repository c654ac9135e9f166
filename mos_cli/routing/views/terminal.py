"""A section of the routes as tables for a terminal.

Shapes: S steps, J generation blocks, T context tokens, M understanding layers, Z slots.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from mos_cli.routing.analysis import Word, dead_layers, strongest_layers, word_layers
from mos_cli.routing.regions import PatchSource
from mos_cli.routing.section import Section, layer_use, readers, slot_use
from mos_cli.routing.trace import Routes
from mos_cli.routing.transfer import transferred_steps
from mos_cli.routing.views.tables import (
    CELL,
    WORD_WIDTH,
    facts_table,
    heading,
    number_tables,
    plain_table,
    printable,
    shaded,
    share_cells,
)
from mos_cli.utils.counts import counted

MOST_WORDS, MOST_NAMED = 60, 12
BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", "_.,-=+*#"


@dataclass(frozen=True)
class RoutesView:
    """A section of a trace, as wide as the console: overview, rules, words x steps, words x layers, entropy, blocks.

    Args:
        requested: the words to show, with the layers of each; by default all words of the prompt.
    """

    section: Section
    requested: Sequence[Word] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        section, width, last = self.section, options.max_width, len(self.section.layers) - 1
        yield self._overview()
        trace = section.recording.trace
        recipe = trace.recipe
        if recipe.routes or recipe.route_from:
            yield heading("rules, and the decisions that each applies to")
            yield self._rules()
        if weighted := [(word, text) for word in section.words if (text := section.weight(word))]:
            yield heading("weights in the prompt: what is multiplied with the routed context of a word")
            weights = plain_table()
            for word, text in weighted:
                weights.add_row(Text(printable(word.label)), text)
            yield weights
        yield heading(f"words x steps: the layer read on average, 0 to {last}")
        yield from self._words(width)
        groups = readers(section, self.requested) if section.routes is not None else ()
        if groups:
            yield heading("words x layers: percent of a word's weight; '-' = none at all")
            yield from self._layers_by_word(groups, width)
        if section.routes is not None and trace.adapter is not None:
            yield heading("slots x layers: percent of a slot's weight; '-' = none at all")
            yield from self._slots(section.routes, trace.adapter.own_layers, width)
        yield heading("entropy: how evenly the layers share the weight, 0 = one layer, 1 = all alike")
        yield self._entropy(width, ASCII_BARS if options.ascii_only else BARS)
        yield heading("blocks x layers: percent of a block's weight; '-' = none at all")
        yield from self._blocks(width)
        if section.agreement:
            yield heading("branches x blocks: percent of the weight that goes to the same layers in both")
            yield from self._agreement(width)

    def _overview(self) -> Table:
        section, trace, use_JM = self.section, self.section.recording.trace, self.section.summary.layer_use_JM
        acted, times = section.branch.steps, section.times
        steps = f"{len(acted)} of {trace.recipe.steps}"
        if not section.whole:
            steps = f"{section.steps[0]} to {section.steps[-1]} (t {times[0]:.2f} to {times[-1]:.2f}), out of {steps}"
        kept = f"top {trace.top_k}" if trace.adapter is None else trace.adapter.reads(trace.top_k)
        facts = {
            "prompt": " ".join(section.branch.prompt.split()) or "(empty)",
            "branch": section.name + "".join(f", beside {name}" for name in trace.branches if name != section.name),
            "model": trace.recipe.model,
            "seed": str(trace.recipe.seed),
            "steps": steps,
            "routes": f"{len(section.layers)} layers x {trace.blocks} blocks, {kept}",
            "layers": f"0 = {section.layers[0]} ... {len(section.layers) - 1} = {section.layers[-1]}",
            "strongest": ", ".join(f"{layer} ({share:.0%})" for layer, share in strongest_layers(use_JM)),
            "never used": ", ".join(map(str, dead_layers(use_JM))) or "none",
        }
        if trace.adapter is not None:
            facts["base model"] = trace.adapter.line
        if (every := trace.recipe.feature_cache) is not None:
            others = "choices of the others were made, not read"
            facts["feature cache"] = f"{every}: the blocks were computed at some of the steps only; {others}"
        if not section.whole:
            facts["blocks"] = f"{section.blocks[0]} to {section.blocks[-1]}, out of {trace.blocks}"
        if section.changes:
            mean = sum(section.changes) / len(section.changes)
            facts["changes"] = f"{mean:.0%} of the kept layers are new at a step, on average"
        if section.agreement:
            means = [f"{sum(shared) / len(shared):.0%} with {name}" for name, shared in section.agreement.items()]
            facts["agreement"] = f"{', '.join(means)}: the weight that goes to the same layers"
        return facts_table(facts)

    def _rules(self) -> Table:
        branch, trace = self.section.branch, self.section.recording.trace
        table = plain_table()
        table.add_column(overflow="fold")
        table.add_column(overflow="fold")
        done = {steered.rule: steered for steered in self.section.steered}
        for rule in trace.recipe.routes or ():
            if rule in done and done[rule].tokens:
                texts = [branch.tokens[number].text for number in done[rule].tokens]
                spoken = " ".join(texts) if len(texts) <= MOST_NAMED else f"{len(texts)} tokens"
                table.add_row(Text(printable(rule)), Text(f"{counted(done[rule].decisions, 'decision')}: {spoken}"))
            else:
                table.add_row(Text(printable(rule)), "has no tokens in this branch")
        if trace.recipe.route_from is not None:
            source = trace.recipe.route_from
            count = transferred_steps(source.until, len(trace.times))
            steps = "step 0" if count == 1 else f"steps 0 to {count - 1}"
            share = f"{source.until:.0%} of {counted(len(trace.times), 'step')}, rounded up"
            table.add_row("another run", f"its choices at {steps} ({share}; sha256 {source.sha256[:12]})")
        if (changed := self.section.changed) is not None:
            whole = len(branch.steps) * trace.blocks * len(branch.tokens)
            share = f"{changed} of {whole} decisions ({changed / whole:.1%})"
            before = "than without rules" if trace.adapter and not trace.adapter.trained else "than the router chose"
            table.add_row("all rules", f"{share} keep other layers {before}")
        return table

    def _words(self, width: int) -> Iterable[Table | Text]:
        section, last = self.section, len(self.section.layers) - 1
        words = self.requested or section.words
        table, columns = _steps_table(section, width)
        mean_layer_ST = np.array(section.summary.mean_layer_ST)
        for word in words[:MOST_WORDS]:
            layers_S = word_layers(word, mean_layer_ST)
            cells = [shaded(f"{layers_S[column]:.1f}", layers_S[column] / last) for column in columns]
            table.add_row(self._name(word), *cells)
        yield table
        if len(words) > MOST_WORDS:
            more = counted(len(words) - MOST_WORDS, "more word")
            yield Text(f"and {more}: --word shows one, --export all of them", style="dim")

    def _name(self, word: Word) -> Text:
        """A word with its weight in the prompt."""
        weight = self.section.weight(word)
        name = Text(printable(word.label), style="dim" if word.special else "")
        return name if weight is None else name.append(f" x{weight}", style="dim")

    def _layers_by_word(self, words: Sequence[Word], width: int) -> Iterable[Table]:
        section = self.section
        assert section.routes is not None
        use = [layer_use(section.routes, word.tokens, len(section.layers)).tolist() for word in words]
        most = max(map(max, use))
        rows = [(self._name(word), share_cells(use_M, most)) for word, use_M in zip(words, use, strict=True)]
        yield from number_tables("layer", range(len(section.layers)), rows, width, WORD_WIDTH)

    def _slots(self, routes: Routes, own_layers: Sequence[int], width: int) -> Iterable[Table]:
        layers = len(self.section.layers)
        use_ZM = slot_use(routes, len(own_layers), layers).tolist()
        most = max(map(max, use_ZM))
        rows = [
            (Text(f"slot {slot}, own {own}"), share_cells(use_M, most))
            for slot, (own, use_M) in enumerate(zip(own_layers, use_ZM, strict=True))
        ]
        yield from number_tables("layer", range(layers), rows, width, WORD_WIDTH)

    def _entropy(self, width: int, bars: str) -> Table:
        table, columns = _steps_table(self.section, width)
        values = [self.section.summary.entropy_S[column] for column in columns]
        table.add_row("entropy", *(f"{value:.2f}" for value in values))
        heights = (bars[min(int(value * len(bars)), len(bars) - 1)] for value in values)
        table.add_row("", *(height * (CELL - 1) for height in heights))
        return table

    def _blocks(self, width: int) -> Iterable[Table]:
        use_JM = self.section.summary.layer_use_JM
        most = max(map(max, use_JM))
        blocks = (Text(str(block), justify="right") for block in self.section.blocks)
        rows = [(block, share_cells(use_M, most)) for block, use_M in zip(blocks, use_JM, strict=True)]
        yield from number_tables("block", range(len(self.section.layers)), rows, width, len("block"))

    def _agreement(self, width: int) -> Iterable[Table]:
        shared = self.section.agreement
        rows = [(Text(name), share_cells(shared_J, 1)) for name, shared_J in shared.items()]
        yield from number_tables("block", self.section.blocks, rows, width, max(map(len, shared)))


@dataclass(frozen=True)
class PatchView:
    """The contributions to a patch: words by attention, each with its strongest layer; special tokens dim below.

    Args:
        patch: its row and column.
        origins: from `patch_origins`.
        requested: the words to show; by default all of them.
    """

    section: Section
    patch: tuple[int, int]
    origins: Sequence[PatchSource]
    requested: Sequence[Word] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        first = self.origins[0]
        name = self.section.layers[first.layer]
        layer = f"layer {first.layer}" if name == f"layer {first.layer}" else f"layer {first.layer} ({name})"
        place = f"patch ({self.patch[0]}, {self.patch[1]})"
        yield heading(f"{place} came most from {first.word.label} through {layer}")
        table = plain_table(show_header=True)
        table.add_column("word", min_width=WORD_WIDTH, max_width=WORD_WIDTH, overflow="fold")
        for name in ("attention %", "of words %", "layer", "through it %"):
            table.add_column(name, justify="right", no_wrap=True)
        shown = [origin for origin in self.origins if not self.requested or origin.word in self.requested]
        for origin in shown[:MOST_WORDS]:
            of_words = "special" if origin.of_words is None else f"{100 * origin.of_words:.1f}"
            numbers = (f"{100 * origin.attention:.2f}", of_words, str(origin.layer), f"{100 * origin.part:.0f}")
            table.add_row(Text(printable(origin.word.label)), *numbers, style="dim" if origin.word.special else "")
        yield table
        if len(shown) > MOST_WORDS:
            yield Text(f"and {len(shown) - MOST_WORDS} more: --word shows one, --json all of them", style="dim")


def _steps_table(section: Section, width: int) -> tuple[Table, list[int]]:
    """An empty table with as many of the section's steps as fit, evenly spaced; and the indices of these."""
    count = min(len(section.steps), max(2, (width - WORD_WIDTH - 1) // CELL))
    columns = [round(i * (len(section.steps) - 1) / max(1, count - 1)) for i in range(count)]
    table = plain_table(show_header=True)
    table.add_column("step", min_width=WORD_WIDTH, max_width=WORD_WIDTH, overflow="fold")
    for column in columns:
        table.add_column(str(section.steps[column]), justify="right", no_wrap=True, min_width=CELL - 1)
    table.add_row("t", *(f"{section.times[column]:.2f}" for column in columns), style="dim")
    return table, columns
