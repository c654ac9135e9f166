"""`mos bench`: the time and memory that drawing takes on this machine, presets side by side."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mos_cli.cli.completion import preset_names
from mos_cli.cli.loading import fit_to_memory, load_with_progress
from mos_cli.cli.options import Model, Steps
from mos_cli.cli.output import Report, print_error, print_json, print_view, stdout
from mos_cli.cli.progress import fetch_with_progress
from mos_cli.errors import PARTLY_FAILED, MosError

if TYPE_CHECKING:
    from mos_cli.config.settings import Settings

PROMPT = "a dog"


def bench(
    model: Model = None,
    preset: Annotated[
        list[str] | None,
        typer.Option(
            "--preset",
            "-p",
            autocompletion=preset_names,
            help="Measure with this preset; repeatable, to compare them side by side.",
        ),
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", metavar="SIZE", help="64, 96x64 or 3:2.", show_default="the model's")
    ] = None,
    steps: Steps = None,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, max=1000, help="Pictures that are measured, after the first.")
    ] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per preset.")] = False,
) -> None:
    """Measure loading, the first picture, a step, the router's share, decoding, memory and energy.

    Every preset is measured in a process of its own. Every picture's prompt is read anew. Memory is the peak of
    loading and drawing: on CUDA that of tensors, on a CPU the growth of the process.
    """
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    from mos_cli.config.settings import make_settings, resolve

    flags = make_settings(model=model, size=size, steps=steps)
    names = list(dict.fromkeys(preset or [])) or [None]
    for name in names:
        resolve(flags, name)
    results: list[dict[str, Any]] = []
    # Spawned: a forked process would inherit what another preset left in memory.
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as processes:
        for name in names:
            try:
                results.append(processes.submit(measure_preset, flags, name, rounds).result())
            except MosError as error:
                if len(names) == 1:
                    raise
                print_error(f"{name}: {error}")
                continue
            if as_json:
                print_json(results[-1:])
    if results and not as_json:
        _print_table(results)
    if len(results) < len(names):
        raise typer.Exit(PARTLY_FAILED)


def measure_preset(flags: "Settings", preset: str | None, rounds: int) -> dict[str, Any]:
    """Draws with a preset and returns its settings, seconds, bytes and joules. Loads the model.

    Raises:
        MosError: the model cannot be found or loaded, or does not fit the device.
    """
    from mos_cli.utils.quiet import quieten

    quieten()
    from mos_cli.bundles.adapters import AdapterBundle
    from mos_cli.bundles.bundle import find_bundle
    from mos_cli.config.recipe import make_recipe
    from mos_cli.config.settings import parse_size, resolve
    from mos_cli.inference.profiling import PeakMemory, measure
    from mos_cli.inference.requests import recipe_fields
    from mos_cli.utils.devices import choose_device, device_name
    from mos_cli.utils.threads import device_threads

    settings, report = resolve(flags, preset), Report(quiet=True)
    bundle = find_bundle(settings.model)
    if not isinstance(bundle, AdapterBundle):
        fetch_with_progress(bundle.index.understanding)
    width, height = parse_size(settings.size, bundle.index.canvas)
    settings = fit_to_memory(bundle, settings, (width, height), report)
    fields = recipe_fields(settings, bundle, bundle.index.defaults)
    recipe = make_recipe(prompt=PROMPT, seed=0, width=width, height=height, **fields)
    device = choose_device(settings.device)
    with PeakMemory(device) as memory:
        pipeline = load_with_progress(bundle, settings, report, precision=recipe.precision, quant=recipe.quant)
        timing = measure(pipeline, recipe, rounds)
    measured = {
        "load_seconds": report.seconds["weights"],
        "first_picture_seconds": timing.first_picture,
        "first_step_seconds": timing.first_step,
        "step_seconds": timing.step,
        "router_share": timing.router_share,
        "decode_seconds": timing.decode,
        "picture_seconds": timing.picture,
        "pictures_per_minute": timing.pictures_per_minute,
        "peak_bytes": memory.bytes,
        "joules_per_picture": timing.joules,
    }
    return {
        "preset": preset,
        "model": recipe.model,
        "size": [recipe.width, recipe.height],
        "steps": recipe.steps,
        "cfg": recipe.cfg,
        "precision": recipe.precision,
        "quant": recipe.quant,
        "max_vram": settings.max_vram,
        "feature_cache": recipe.feature_cache,
        "compiled": settings.compile,
        "offload": settings.offload,
        "tiled": settings.tiled,
        "device": device_name(device),
        "threads": device_threads(device),
        "attention": pipeline.attention,
        "cuda_graphs": timing.graphs,
        "rounds": rounds,
        **{name: value for name, value in measured.items() if value is not None},
    }


_ROWS = {
    "load_seconds": ("loading, s", "{:.2f}"),
    "first_picture_seconds": ("the first picture, s", "{:.3f}"),
    "first_step_seconds": ("to the first step, s", "{:.3f}"),
    "step_seconds": ("a step, s", "{:.4f}"),
    "router_share": ("router's share of it", "{:.1%}"),
    "decode_seconds": ("decoding, s", "{:.4f}"),
    "picture_seconds": ("a picture, s", "{:.3f}"),
    "pictures_per_minute": ("pictures a minute", "{:.1f}"),
    "peak_bytes": ("memory at the peak, MB", "{:.0f}"),
    "joules_per_picture": ("energy of a picture, J", "{:.0f}"),
}


def _print_table(results: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("preset", no_wrap=True)
    for result in results:
        table.add_column(result["preset"] or "none", justify="right")
    threads = {None: "", 1: ", 1 thread"}
    settings = {
        "model": lambda r: r["model"],
        "device": lambda r: r["device"] + threads.get(r["threads"], f", {r['threads']} threads"),
        "size": lambda r: "{}x{}".format(*r["size"]),
        "steps": lambda r: str(r["steps"]),
        "precision": lambda r: r["precision"],
        "quantised": lambda r: r["quant"] or "none",
        "offloaded": lambda r: r["offload"],
        "attention": lambda r: r["attention"],
    }
    if any(result["feature_cache"] for result in results):
        settings["feature cache"] = lambda r: str(r["feature_cache"] or 1)
    if any(result["compiled"] for result in results):
        settings["compiled"] = lambda r: "yes" if r["compiled"] else "no"
    if any(result["device"] != "cpu" and result["cuda_graphs"] for result in results):
        settings["CUDA graphs"] = lambda r: r["cuda_graphs"] or "none"
    for name, text in settings.items():
        table.add_row(name, *map(text, results))
    table.add_section()
    for name, (label, shown) in _ROWS.items():
        if any(name in result for result in results):
            table.add_row(label, *(_cell(name, shown, result) for result in results))
    print_view(table, wide=True)
    rounds = results[0]["rounds"]
    counted = "One picture after the first, its" if rounds == 1 else f"Medians of the {rounds} next, each with its"
    stdout.print(f"{counted} prompt read anew.", style="dim")


def _cell(name: str, shown: str, result: dict[str, Any]) -> str:
    if name not in result:
        return "-"
    return shown.format(result[name] / 1e6 if name == "peak_bytes" else result[name])
