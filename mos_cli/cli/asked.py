"""What `generate` and `edit` make of their options alike: prompts, the fields of a recipe, jobs."""

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mos_cli.cli.drawing import Job, Report
from mos_cli.errors import InputError, UsageError

if TYPE_CHECKING:
    from mos_cli.bundles.bundle import Bundle
    from mos_cli.bundles.specs import Defaults
    from mos_cli.config.recipe import Recipe, RouteSource
    from mos_cli.config.settings import RunSettings
    from mos_cli.images.inputs import Inputs
    from mos_cli.images.outputs import Naming
    from mos_cli.routing.trace import Recording, RecordOptions


def make_jobs(
    prompts: list[str],
    names: "Naming",
    fields: dict[str, Any],
    *,
    seed: int | None,
    count: int,
    inputs: "Inputs | None" = None,
) -> list[Job]:
    """A job for every prompt and seed; without a seed the first is random."""
    from mos_cli.config.recipe import make_recipe

    first = int.from_bytes(os.urandom(4)) if seed is None else seed
    jobs = []
    for prompt in prompts:
        for index in range(count):
            recipe = make_recipe(prompt=prompt, seed=first + index, **fields)
            jobs.append(Job(recipe, names.path(recipe), inputs))
    return jobs


def check_recipe(recipe: "Recipe", bundle: "Bundle", *, compiled: bool, regions: bool) -> None:
    """Raises UsageError for what the model's numbers tell cannot be drawn: better now than when it is loaded."""
    from mos_cli.bundles.shapes import read_generation
    from mos_cli.config.recipe import check_blocks
    from mos_cli.routing.rules import check_numbers, parse_rules

    check_blocks(recipe, compiled=compiled, regions=regions)
    if recipe.routes is not None:
        tower = read_generation(bundle.folder / "generation")
        numbers = {"layers": tower.states_layers, "blocks": tower.depth, "steps": recipe.steps}
        check_numbers(parse_rules(recipe.routes), **numbers)


def say_what_would_be_drawn(jobs: list[Job], report: Report) -> None:
    """The answer to --dry-run."""
    for job in jobs:
        report.event("would draw", f"{job.path}  {job.recipe!r}", path=str(job.path), recipe=job.recipe.model_dump())
    report.times()


def check_sheet(option: str, sheet: Path, names: "Naming") -> None:
    """Raises UsageError or InputError if a sheet cannot be written under its name; better now than at the end."""
    from mos_cli.utils.files import refuse_existing

    if sheet.suffix.lower() != ".png" or sheet in names.returned:
        raise UsageError(f"{option} {sheet}: name a .png of its own")
    refuse_existing(sheet, names.overwrite)
    names.returned.add(sheet)


def read_prompts(argument: str, advice: str) -> list[str]:
    """The prompts asked for: one, or the non-empty lines of stdin or a file; `advice` is given where there are none."""
    if argument == "-":
        lines = _lines(sys.stdin.buffer.read(), "stdin")
    elif argument.startswith("@"):
        lines = _lines(Path(argument[1:]).read_bytes(), argument[1:])
    else:
        lines = [argument]
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"the prompt is empty: say {advice}")
    return prompts


def _lines(data: bytes, source: str) -> list[str]:
    try:
        return data.decode("utf-8").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"the prompts from {source} are not UTF-8 text") from None


def shared_fields(settings: "RunSettings", bundle: "Bundle", defaults: "Defaults") -> dict[str, Any]:
    """The settings all pictures of a run share, but for their size; what nobody set comes from the bundle."""
    from mos_cli.planning.candidates import parse_quant
    from mos_cli.routing.rules import parse_rules
    from mos_cli.utils.devices import choose_device, choose_precision

    precision = settings.precision
    if precision == "auto":
        precision = choose_precision(choose_device(settings.device))
    return {
        "model": bundle.ref,
        "negative": settings.negative,
        "steps": settings.steps or defaults.steps,
        "solver": settings.solver,
        "cfg": defaults.cfg if settings.cfg is None else settings.cfg,
        "cfg_interval": settings.cfg_interval or defaults.cfg_interval,
        "precision": precision,
        "quant": None if settings.quant == "none" else ",".join(parse_quant(settings.quant)),
        "feature_cache": settings.feature_cache,
        "routes": tuple(map(str, parse_rules(settings.routes))) if settings.routes else None,
    }


def make_record_options(trace: str, *, regions: bool, previews: bool) -> "RecordOptions":
    """What is recorded beside the routes.

    Raises:
        UsageError: regions are asked for without the arrays they would be written into.
    """
    from mos_cli.routing.trace import RecordOptions

    if regions and trace not in ("topk", "full"):
        raise UsageError(f"--regions are written into the trace's arrays, which --trace {trace} leaves out")
    return RecordOptions(probabilities=trace == "full", regions=regions, previews=previews)


def route_source(
    route_from: Path | None, until: str | None, bundle: "Bundle"
) -> "tuple[Recording | None, RouteSource | None]":
    """The run whose choices are taken over, and what a recipe says of it.

    Raises:
        UsageError, InputError: it is no run of this model, or the part of the steps is no percentage.
    """
    if route_from is None:
        if until is not None:
            raise UsageError("--route-until says how far to follow another run: name it with --route-from")
        return None, None
    from mos_cli.config.recipe import RouteSource
    from mos_cli.routing.trace import load_recording
    from mos_cli.routing.transfer import check_model, choices_hash

    percent = re.fullmatch(r"(\d{1,3}(?:\.\d{1,3})?)%", "100%" if until is None else until)
    if percent is None or not 0 < float(percent[1]) <= 100:
        raise UsageError(f"--route-until {until}: write a share of the steps, such as 40%")
    recording = load_recording(route_from)
    check_model(recording, bundle.index.name, bundle.hash)
    return recording, RouteSource(sha256=choices_hash(recording), until=float(percent[1]) / 100)


def followed_run(picture: Path, recipe: "Recipe", route_from: Path | None) -> "Recording | None":
    """The run that a picture took its routes from, which is not in the picture; None where there is none.

    Raises:
        UsageError: it is not named, or one is named that there is not.
        InputError: its trace cannot be read.
    """
    from mos_cli.routing.trace import load_recording

    if route_from is None and recipe.route_from is not None:
        raise UsageError(f"{picture} takes its routes from another run: name its trace with --route-from FILE")
    if route_from is not None and recipe.route_from is None:
        raise UsageError(f"{picture} takes its routes from no other run: drop --route-from")
    return None if route_from is None else load_recording(route_from)
