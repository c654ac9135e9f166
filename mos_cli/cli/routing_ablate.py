"""`mos routing ablate`: what each layer does for a word."""

import os
import re
from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mos_cli.cli.jobs import shortened
from mos_cli.cli.loading import load_route_source, load_with_progress
from mos_cli.cli.options import (
    Attention,
    Device,
    EditedPictures,
    Json,
    Loras,
    Models,
    Overwrite,
    Quiet,
    RouteSource,
    Verbose,
    as_text,
)
from mos_cli.cli.output import Report
from mos_cli.cli.progress import sampling_bars, stop_between_steps
from mos_cli.errors import InputError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

    from mos_cli.config.recipe import EarlierPicture, Recipe
    from mos_cli.images.inputs import Inputs
    from mos_cli.inference.ablation import Ablated
    from mos_cli.inference.drawing import Drawing
    from mos_cli.routing.rules import Rule
    from mos_cli.routing.trace import Trace
    from mos_cli.sampling.sampler import Observer, Step


def ablate(
    picture: Annotated[Path, typer.Argument(help="A picture made by mos: PNG, JPEG or WebP.")],
    word: Annotated[
        str, typer.Option("--word", "-w", callback=as_text, help='The word, as in rules: cat, "red apple", cat#2, *.')
    ],
    block: Annotated[
        str | None, typer.Option("--block", metavar="A:B", help="Only in these blocks.", show_default="all")
    ] = None,
    step: Annotated[
        str | None, typer.Option("--step", metavar="A:B", help="Only at these steps.", show_default="all")
    ] = None,
    only: Annotated[
        bool, typer.Option("--only", help="Let the word read one layer at a time, instead of all but one.")
    ] = False,
    source_files: EditedPictures = None,
    mask: Annotated[
        Path | None, typer.Option("--mask", metavar="FILE", help="The mask that an edit was made with.")
    ] = None,
    models: Models = None,
    lora: Loras = None,
    route_from: RouteSource = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="PNG", help="The strip of pictures.", show_default="beside the picture"),
    ] = None,
    overwrite: Overwrite = False,
    device: Device = None,
    attention: Attention = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show what each layer does for a word: ban one layer at a time, and draw again with the same seed.

    The layers are ranked by how much the picture changes. A strip shows the picture as it is, then without each layer,
    or with --only from each layer alone.
    """
    from mos_cli.bundles.bundle import edit_defaults, find_recorded
    from mos_cli.config.recipe import pixels_hash
    from mos_cli.config.settings import check_size, make_settings, resolve
    from mos_cli.images.inputs import Finder
    from mos_cli.images.outputs import drawn_hash, read_drawing
    from mos_cli.inference.requests import with_loras
    from mos_cli.routing.rules import BaselineRule, parse_rules
    from mos_cli.utils.threads import cpu_threads

    report = Report(json=json, quiet=quiet, verbose=verbose)
    rule = _rule(word, block, step, only=only)
    image, record = read_drawing(picture)
    recipe, otherwise = record.recipe, "name it with --model FOLDER"
    bundle = find_recorded(recipe.model, record.made.bundle_hash, str(picture), otherwise, models or ())
    check_size(*recipe.working_size, bundle.index.canvas)
    for used in parse_rules(recipe.routes or ()):
        if isinstance(used, BaselineRule):
            raise UsageError(f"{picture} was drawn by the route rule {used}: draw it without, to ablate layers")
    if recipe.edit is not None:
        edit_defaults(bundle)
    elif source_files or mask:
        raise UsageError(f"{picture} is no edit: drop --input and --mask")
    routes = load_route_source(picture, recipe, route_from)
    settings = with_loras(resolve(make_settings(device=device, attention=attention), None), recipe, lora or [])
    # A name that was not given is a free one in any case.
    overwrite = overwrite and output is not None
    strips = _strip_paths(picture, word, output, overwrite)
    strip = next(strips)
    finder = Finder(source_files or [], [] if mask is None else [mask], _must_be_given)
    inputs = finder.inputs_of(recipe, record.earlier)
    finder.check_all_used()
    pipeline = load_with_progress(bundle, settings, report, precision=recipe.precision, quant=recipe.quant)

    from mos_cli.images.sheets import contact_sheet, sheet_png
    from mos_cli.inference.ablation import ablate as ablate_layers
    from mos_cli.inference.ablation import check_rule
    from mos_cli.utils.files import NameTakenError, atomic_write

    with sampling_bars(report) as bars, stop_between_steps() as check_interrupt:

        def draw(recipe: "Recipe", *observers: "Observer") -> "Drawing":
            threads = cpu_threads(record.made.threads, record.made.thread_changes)
            with report.stage("sampling"), threads as follow:
                return pipeline.draw(recipe, [*observers, follow], inputs, route_from=routes)

        def draw_with_bar(recipe: "Recipe") -> "Drawing":
            task = bars.add_task(recipe.routes[-1] if recipe.routes else "as it is", total=recipe.steps, unit="steps")

            def observe(step: "Step") -> None:
                bars.update(task, completed=step.index + 1)
                check_interrupt()

            try:
                return draw(recipe, observe)
            finally:
                bars.remove_task(task)

        check_rule(recipe, rule, draw)
        before = draw_with_bar(recipe)
        ablated = list(ablate_layers(before, rule, lambda recipe: draw_with_bar(recipe).image))
    exact = pixels_hash(before.image) == drawn_hash(image, record)
    note = None if exact else "the picture was drawn again here for comparison, and is not exactly the one in the file"
    report.event("original", note, exact=exact)
    _report(ablated, before.trace, report, only)
    pictures = [(before.image, "as it is"), *((one.image, _caption(one, only)) for one in ablated)]
    while True:
        try:
            atomic_write(strip, sheet_png(contact_sheet(pictures)), overwrite)
            break
        except NameTakenError:
            # Another run may have written it in the meantime.
            strip = next(strips)
    report.event("strip", str(strip), file=str(strip))
    report.times()


def _rule(word: str, block: str | None, step: str | None, *, only: bool) -> "Rule":
    """The rule that keeps layer 0 from the word, or all others; the layer is to be replaced."""
    from mos_cli.routing.rules import Rule, parse_target

    target, nth = parse_target(word)
    blocks, steps = _numbers("--block", block), _numbers("--step", step)
    return Rule(target, "=" if only else "!=", (0,), nth, blocks=blocks, steps=steps)


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    """The numbers of A:B, both included, or of A alone."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d{1,4})\s*(?::\s*(\d{1,4})\s*)?", text)
    first, last = (0, -1) if match is None else (int(match[1]), int(match[2] or match[1]))
    if last < first:
        raise UsageError(f"{option} {text!r} is no range: write A:B (both included) or A")
    return tuple(range(first, last + 1))


def _strip_paths(picture: Path, word: str, output: Path | None, overwrite: bool) -> Iterator[Path]:
    """Where the strip goes: where --output says, else beside the picture; then names that are free, with numbers."""
    from mos_cli.images.naming import slug
    from mos_cli.utils.files import check_writable, refuse_existing

    if output is None:
        output = picture.with_name(f"{picture.stem}_ablate-{slug(word)}.png")
    elif output.suffix.lower() != ".png" or output.resolve() == picture.resolve():
        raise UsageError(f"--output {output}: name a .png of its own")
    else:
        refuse_existing(output, overwrite)
    check_writable(output.parent)
    numbered = (output.with_stem(f"{output.stem}-{number}") for number in count(2))
    return (path for path in chain([output], numbered) if overwrite or not os.path.lexists(path))


def _must_be_given(earlier: "EarlierPicture", inputs: "Inputs | None") -> "Image":
    raise InputError(
        f"{shortened(earlier.recipe.prompt)!r}, which this was made from, is needed here: give it with --input FILE"
    )


def _caption(one: "Ablated", only: bool) -> str:
    changed = "not allowed" if one.refused else f"{one.change:.1f} levels" if one.read or only else "never read"
    return f"{'only' if only else 'without'} layer {one.layer}: {changed}"


def _report(ablated: "list[Ablated]", trace: "Trace", report: Report, only: bool) -> None:
    """The layers, the one that changes most first; those that it makes no sense to ban, or that rules forbid, last."""
    from math import isfinite

    ranked = sorted(ablated, key=lambda one: (one.refused is not None, one.read == 0 and not only, -one.change))
    names = trace.layers
    width = max(map(len, names))
    if not report.json:
        kept = f"decisions that keep the layer, up to {trace.top_k} each"
        report.event("head", f"read: {kept}; change: mean of 0-255 levels")
        report.event("head", f"layer  {'':{width}}    read  change  PSNR dB")
    for one in ranked:
        psnr = f"{one.psnr:7.1f}" if isfinite(one.psnr) else "   same"
        change = f"{one.change:6.2f}  {psnr}" if one.read or only else "never read"
        if one.refused is not None:
            change = "not allowed: the picture's own rules leave no layer"
        report.event(
            "layer",
            f"{one.layer:5}  {names[one.layer]:{width}}  {one.read:6.1%}  {change}",
            layer=one.layer,
            name=names[one.layer],
            read=round(one.read, 6),
            change=round(one.change, 4),
            psnr=round(one.psnr, 2) if isfinite(one.psnr) else None,
            refused=one.refused,
        )
