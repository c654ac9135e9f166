"""Figures of routes for papers: the routes of a section, and the regions of its words.

Readable in grey print: brightness grows evenly with the values, and lines differ in their dashes.
Shapes: S steps, J generation blocks, T context tokens, M understanding layers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mos_cli.errors import UsageError
from mos_cli.images.outputs import read_stored
from mos_cli.routing.analysis import Word, word_layers
from mos_cli.routing.regions import WordMap, special_share, word_maps
from mos_cli.routing.section import Section, summary_only
from mos_cli.utils.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOT_SUFFIXES = (".png", ".pdf", ".svg")
REGION_SUFFIXES = (".png", ".pdf")
MOST_MAPS = 24
MOST_LABELS = 40
ACROSS = 4
PAGE = 7.0
"""Width of a figure in inches: two columns of a journal."""
GAP, TITLE, BAR, NOTE = 0.14, 0.36, 0.3, 0.36
"""Inches between the maps, above and below each, and below all of them."""
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "Arial Unicode MS")
"""The first is part of matplotlib; the others, where installed, have further characters."""
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "image.cmap": "viridis",
    "image.interpolation": "nearest",
    "savefig.dpi": 300,
    # A word may hold a $; journals ask for fonts as outlines.
    "text.parse_math": False,
    "pdf.fonttype": 42,
    "svg.hashsalt": "mos",
}
DASHES = ("-", "--", ":")


def save_routes_figure(sections: Sequence[Section], words: Sequence[Word], path: Path, overwrite: bool = False) -> None:
    """Writes one figure: words x steps, blocks x layers, entropy and changes over the steps.

    Args:
        sections: the section to show, then those of the other branches, which have lines in the lower panels.
        words: the rows of the first panel.

    Raises:
        UsageError: `path` is not .png, .pdf or .svg, or matplotlib is not installed.
        InputError: the trace holds a summary only, or the file exists and `overwrite` is false, or cannot be written.
    """
    first = sections[0]
    if first.changes is None:
        raise summary_only(first.recording)
    with _figure(path, PLOT_SUFFIXES, overwrite, layout="constrained") as figure:
        tall = min(max(1.6, 0.16 * len(words)), 6.0)
        figure.set_size_inches(PAGE, max(tall, min(0.16 * len(first.blocks), 6.0)) + 2.3)
        panels = figure.subplots(2, 2, gridspec_kw={"height_ratios": [figure.get_figheight() - 2.3, 1.3]})
        _words_panel(panels[0, 0], first, words)
        _blocks_panel(panels[0, 1], first)
        lines = {
            "Entropy of the layers' shares": [(section.steps, section.summary.entropy_S) for section in sections],
            "Kept layers that a step changed": [(section.steps[1:], section.changes) for section in sections],
        }
        for axes, letter, (title, curves) in zip(panels[1], "cd", lines.items(), strict=True):
            for section, (steps, values), dash in zip(sections, curves, DASHES[: len(sections)], strict=True):
                marker = {"marker": "o", "markersize": 2.5}
                axes.plot(steps, values, dash, color="black", linewidth=1, label=section.name, **marker)
            axes.set_title(f"{letter}  {title}")
            axes.spines[["top", "right"]].set_visible(False)
            longest = max(sections, key=lambda section: len(section.steps))
            _step_ticks(axes, longest, list(longest.steps))
            axes.set_xlim(longest.steps[0] - 0.5, longest.steps[-1] + 0.5)
            if len(sections) > 1 and letter == "c":
                axes.legend(frameon=False, fontsize=7, ncols=len(sections))
        panels[1, 0].set_ylim(0, 1.05)
        panels[1, 1].set_ylim(0, max(0.1, panels[1, 1].get_ylim()[1]))
        panels[1, 0].set_ylabel("1 = all layers alike")
        panels[1, 1].set_ylabel("fraction")


def save_regions_figure(section: Section, words: Sequence[Word], path: Path, overwrite: bool = False) -> None:
    """Writes the picture, if it exists, and one heat map per word; those of special tokens are grey.

    Raises:
        UsageError: `path` is not .png or .pdf, matplotlib is not installed, or there are too many words.
        InputError: no regions were recorded, or the file exists and `overwrite` is false, or cannot be written.
    """
    if len(words) > MOST_MAPS:
        raise UsageError(f"{len(words)} words do not fit one figure: choose at most {MOST_MAPS} with --word")
    maps, picture = word_maps(section, words), section.recording.picture
    rows, columns = maps[0].attention.shape
    wide = (PAGE - GAP) / ACROSS - GAP
    tall = wide * rows / columns
    cell = (wide + GAP, tall + TITLE + BAR)
    panels = len(maps) + (picture is not None)
    across, down = min(panels, ACROSS), ceil(panels / ACROSS)
    with _figure(path, REGION_SUFFIXES, overwrite) as figure:
        width, height = max(across, 3) * cell[0] + GAP, down * cell[1] + NOTE
        figure.set_size_inches(width, height)
        places = [
            (GAP + place % across * cell[0], height - TITLE - tall - place // across * cell[1])
            for place in range(panels)
        ]
        boxes = [(x / width, y / height, wide / width, tall / height) for x, y in places]
        if picture is not None:
            axes = figure.add_axes(boxes.pop(0))
            axes.imshow(np.asarray(read_stored(picture)[0].convert("RGB")), aspect="auto")
            axes.set_title("picture")
            axes.set_axis_off()
        for (x, y, w, h), word_map in zip(boxes, maps, strict=True):
            bar = figure.add_axes((x, y - 0.1 / height, w, 0.05 / height))
            _map_panel(figure.add_axes((x, y, w, h)), bar, word_map)
        figure.text(GAP / width, 0.08 / height, _regions_note(section), fontsize=7, va="bottom")


def _words_panel(axes: "Axes", section: Section, words: Sequence[Word]) -> None:
    mean_layer_ST = np.array(section.summary.mean_layer_ST)
    layers_WS = np.array([word_layers(word, mean_layer_ST) for word in words])
    image = axes.imshow(layers_WS, aspect="auto", vmin=0, vmax=len(section.layers) - 1)
    stride = 1 if len(words) <= MOST_LABELS else ceil(len(words) / MOST_LABELS)
    axes.set_yticks(range(0, len(words), stride), [_short(word.text) for word in words[::stride]])
    axes.set_title("a  Layer read on average")
    _step_ticks(axes, section, list(range(len(section.steps))))
    axes.tick_params(axis="y", length=0)
    for label, word in zip(axes.get_yticklabels(), words[::stride], strict=True):
        label.set_color("gray" if word.special else "black")
    axes.figure.colorbar(image, ax=axes, label="layer", fraction=0.05, pad=0.02)


def _blocks_panel(axes: "Axes", section: Section) -> None:
    use_JM = 100 * np.array(section.summary.layer_use_JM)
    first = section.blocks.start
    extent = (-0.5, len(section.layers) - 0.5, section.blocks.stop - 0.5, first - 0.5)
    image = axes.imshow(use_JM, aspect="auto", vmin=0, extent=extent)
    axes.locator_params(integer=True)
    axes.set_xlabel("layer of the language model")
    axes.set_ylabel("block")
    axes.set_title("b  Share of a block's weight")
    axes.figure.colorbar(image, ax=axes, label="%", fraction=0.05, pad=0.02)


def _step_ticks(axes: "Axes", section: Section, places: list[int]) -> None:
    """At most six ticks, each with its step and below it the time."""
    count = min(6, len(places))
    chosen = [round(i * (len(places) - 1) / max(1, count - 1)) for i in range(count)]
    labels = [f"{section.steps[index]}\n{section.times[index]:.2f}" for index in chosen]
    axes.set_xticks([places[index] for index in chosen], labels)
    axes.set_xlabel("step, and its time t (1 = noise)")


def _map_panel(axes: "Axes", bar: "Axes", word_map: WordMap) -> None:
    percent, special = 100 * word_map.attention, word_map.word.special
    most = max(float(percent.max()), 1e-6)
    image = axes.imshow(percent, aspect="auto", vmin=0, vmax=most, cmap="gray" if special else "viridis")
    ink = "dimgray" if special else "black"
    axes.set_title(_short(word_map.word.text), color=ink, pad=13)
    layers = ", ".join(f"{layer} ({share:.0%})" for layer, share in word_map.layers)
    axes.text(0, 1.03, f"layers {layers}", transform=axes.transAxes, fontsize=6.5, color="dimgray")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.figure.colorbar(image, cax=bar, orientation="horizontal")
    bar.set_xticks([0, most], ["0", f"{most:.2g} %"])
    bar.tick_params(labelsize=6.5, length=2, pad=1.5)
    for label, side in zip(bar.get_xticklabels(), ("left", "right"), strict=True):
        label.set_horizontalalignment(side)


def _regions_note(section: Section) -> str:
    first, last = section.blocks[0], section.blocks[-1]
    blocks = f"block {first}" if first == last else f"blocks {first} to {last}"
    note = f"Attention of the patches, mean over heads, steps and {blocks}; each map has its own scale."
    share, names = special_share(section)
    if names:
        note += f"\n{', '.join(names)}: {share:.0%} of the attention that goes to the prompt."
    return note


@contextmanager
def _figure(
    path: Path, suffixes: Sequence[str], overwrite: bool, layout: Literal["constrained"] | None = None
) -> Iterator["Figure"]:
    """Yields a figure that is saved at the end of the context, without a date in the file."""
    if path.suffix.lower() not in suffixes:
        raise UsageError(f"cannot draw a figure as {path}: name it {', '.join(suffixes[:-1])} or {suffixes[-1]}")
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.font_manager import get_font_names
    except ImportError:
        raise UsageError("figures need matplotlib: pip install 'mos-cli[inspect]'") from None
    undated = {".png": {}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}[path.suffix.lower()]
    fonts: dict[Any, Any] = {"font.family": [name for name in FONTS if name in set(get_font_names())]}
    with rc_context(STYLE | fonts), atomic_file(path, overwrite) as temporary:
        figure = Figure(layout=layout)
        yield figure
        figure.savefig(temporary, metadata=undated)


def _short(text: str) -> str:
    return text if len(text) <= 18 else f"{text[:17]}…"
