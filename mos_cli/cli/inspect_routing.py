"""`mos inspect-routing`: which layer each word read, step by step."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mos_cli.cli.completion import trace_paths
from mos_cli.cli.loading import refuse_folders, say_if_unchecked
from mos_cli.cli.options import Overwrite, as_text
from mos_cli.cli.output import print_view

if TYPE_CHECKING:
    from mos_cli.routing.trace import Recording


def inspect_routing(
    trace: Annotated[
        Path, typer.Argument(autocompletion=trace_paths, help="A trace (.json), or the picture beside it.")
    ],
    branch: Annotated[
        str | None,
        typer.Option(
            "--branch",
            help="The guidance branch to show.",
            show_default="positive; --export writes all",
            metavar="NAME",
        ),
    ] = None,
    word: Annotated[
        list[str] | None,
        typer.Option(
            "--word", "-w", callback=as_text, help="Show only this word, or one occurrence of it, as cat#2; repeatable."
        ),
    ] = None,
    step: Annotated[
        str | None, typer.Option("--step", metavar="A:B", help="Only these steps, both included; also A, A: or :B.")
    ] = None,
    block: Annotated[
        str | None, typer.Option("--block", metavar="A:B", help="Only these blocks, both included; also A, A: or :B.")
    ] = None,
    patch: Annotated[
        list[str] | None,
        typer.Option(
            "--patch", metavar="ROW,COLUMN", help="Show which words this patch of the picture attended to; repeatable."
        ),
    ] = None,
    export: Annotated[
        Path | None, typer.Option("--export", metavar="FILE", help="Write every decision as a table: .parquet or .csv.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Write a figure of the routes: .png, .pdf or .svg.")
    ] = None,
    regions: Annotated[
        Path | None,
        typer.Option(
            "--regions", metavar="FILE", help="Write a figure of which patches attended to which word: .png or .pdf."
        ),
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a report for the browser.")] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            "--compare",
            metavar="TRACE",
            autocompletion=trace_paths,
            help="A second trace, beside the first in the report.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show which layers of the language model each word of a picture was read from, by step and block.

    What --export, --plot, --regions and --html write is printed as a path, instead of the tables.
    """
    from mos_cli.errors import UsageError
    from mos_cli.routing.analysis import find_words, matching_words
    from mos_cli.routing.regions import patch_origins
    from mos_cli.routing.section import cut, cut_all
    from mos_cli.routing.trace import load_recording
    from mos_cli.utils.extras import require
    from mos_cli.utils.files import check_writable, refuse_existing

    if compare is not None and html is None:
        raise UsageError("--compare is for the report: add --html FILE, or see `mos routing diff`")
    refuse_folders(trace, compare)
    outputs = {"--export": export, "--plot": plot, "--regions": regions, "--html": html}
    _check_outputs({option: path for option, path in outputs.items() if path is not None}, trace, compare)
    narrowing = {"branch": branch, "word": word, "step": step, "block": block}
    narrowed = [name for name, value in narrowing.items() if value is not None]
    if html is not None and narrowed and not (export or plot or regions or patch or as_json):
        raise UsageError(f"--{narrowed[0]} has no effect on --html: the report holds the whole trace")
    if step is not None and (regions or patch):
        raise UsageError("regions are recorded as a mean over all steps: leave --step out")

    if plot or regions:
        require("a figure", "inspect", "matplotlib")
    if export:
        require("an export", "inspect", "pyarrow")
    for path in outputs.values():
        if path is not None:
            check_writable(path.parent)
            refuse_existing(path, overwrite)

    recording = load_recording(trace)
    say_if_unchecked(recording)
    section = cut(recording, "positive" if branch is None else branch, step, block)
    requested = find_words(section.words, word) if word else ()
    origins = {place: patch_origins(section, place) for place in map(_parse_patch, patch or ())}
    if export is not None:
        from mos_cli.routing.export import export_decisions

        sections = [section] if branch else cut_all(recording, section.name, step, block)
        export_decisions([(s, matching_words(s.words, word) if word else s.words) for s in sections], export, overwrite)
    if plot is not None:
        from mos_cli.routing.views.figures import save_routes_figure

        save_routes_figure(cut_all(recording, section.name, step, block), requested or section.words, plot, overwrite)
    if regions is not None:
        from mos_cli.routing.views.figures import save_regions_figure

        save_regions_figure(section, requested or section.words, regions, overwrite)
    if html is not None:
        _write_report(recording, compare, html, overwrite)

    written = [str(path) for path in (export, plot, regions, html) if path is not None]
    if as_json:
        import json

        from mos_cli.routing.views.facts import patch_facts, section_facts

        facts = section_facts(section, requested)
        facts["picture"] = {"file": str(recording.picture) if recording.picture else None, "checked": recording.checked}
        facts |= {"patches": [patch_facts(place, found) for place, found in origins.items()], "written": written}
        typer.echo(json.dumps(facts))
        return
    from mos_cli.routing.views.terminal import PatchView, RoutesView

    for path in written:
        typer.echo(path)
    for place, found in origins.items():
        print_view(PatchView(section, place, found, requested))
    if not written and not origins:
        print_view(RoutesView(section, requested))


def _check_outputs(outputs: dict[str, Path], *traces: Path | None) -> None:
    """Raises UsageError if a file to write is one that is read, or named twice, or a report is not named as a page."""
    from mos_cli.errors import UsageError
    from mos_cli.images.companions import companions, pictures_beside

    taken = [other for path in traces if path is not None for other in (*companions(path), *pictures_beside(path))]
    for option, path in outputs.items():
        if path.resolve() in {other.resolve() for other in taken}:
            raise UsageError(f"{option} {path}: name a file of its own")
        if option == "--html" and path.suffix.lower() not in (".html", ".htm"):
            raise UsageError(f"--html {path}: name it .html")
        taken.append(path)


def _write_report(recording: "Recording", compare: Path | None, path: Path, overwrite: bool) -> None:
    from mos_cli.routing.trace import load_recording
    from mos_cli.routing.views.html import html_report
    from mos_cli.utils.files import atomic_write, refuse_existing

    refuse_existing(path, overwrite)
    second = None if compare is None else load_recording(compare)
    if second is not None:
        say_if_unchecked(second)
    atomic_write(path, html_report(recording, second).encode(), overwrite)


def _parse_patch(text: str) -> tuple[int, int]:
    from mos_cli.errors import UsageError

    match = re.fullmatch(r"\s*(\d+)\s*,\s*(\d+)\s*", text)
    if match is None:
        raise UsageError(f"--patch {text!r} is no patch: write ROW,COLUMN, both counted from 0")
    return int(match[1]), int(match[2])
