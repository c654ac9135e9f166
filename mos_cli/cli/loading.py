"""How commands load what they draw with: settings that fit the memory, the pipeline, and traces."""

from pathlib import Path
from typing import TYPE_CHECKING

from mos_cli.cli.output import Report, print_warning
from mos_cli.cli.progress import fetch_with_progress
from mos_cli.errors import InputError, UsageError

if TYPE_CHECKING:
    from mos_cli.bundles.bundle import Bundle
    from mos_cli.config.recipe import Recipe
    from mos_cli.config.settings import RunSettings
    from mos_cli.inference.pipeline import MoSPipeline
    from mos_cli.routing.trace import Recording
    from mos_cli.server.client import RemotePipeline


def fit_to_memory(
    bundle: "Bundle",
    settings: "RunSettings",
    size: tuple[int, int],
    report: Report,
    *,
    fetch: bool = True,
    quant: str | None = None,
    precision: str | None = None,
    references: int = 0,
) -> "RunSettings":
    """The settings with what --max-vram leaves open chosen as `fit_settings` does, and reported in one line.

    Args:
        fetch: an understanding tower that is not in the cache may be downloaded: its size is read from its config.

    Raises:
        UsageError: a number for `max_vram`, or something to offload, where nothing is drawn on a GPU.
        MemoryLimitError: nothing fits.
    """
    if settings.max_vram is None and settings.offload == "none":
        return settings
    from mos_cli.inference.requests import fit_settings, needs_fitting
    from mos_cli.utils.devices import device_name
    from mos_cli.utils.threads import device_threads

    with report.stage("libraries"):
        if not needs_fitting(settings):
            return settings
    from mos_cli.bundles.adapters import AdapterBundle

    if fetch and not isinstance(bundle, AdapterBundle):
        with report.stage("fetching"):
            fetch_with_progress(bundle.index.understanding, quiet=report.quiet)
    auto = settings.max_vram == "auto"
    fitted = fit_settings(bundle, settings, size, quant=quant, precision=precision, references=references)
    chosen, gib, precision = fitted.settings, fitted.gib, fitted.precision
    on_cpu = fitted.device.type == "cpu"
    name, threads = device_name(fitted.device), device_threads(fitted.device)
    cores = f"{threads} CPU thread{'' if threads == 1 else 's'}"
    where = f"no GPU: {cores}, {gib:.1f} GiB free" if on_cpu else f"{name}, {gib:.4g} GiB"
    how = f"--quant {chosen.quant}" + ("" if on_cpu else f" --offload {chosen.offload}")
    tiles = ", decoded in tiles" if chosen.tiled else ""
    apart = "" if chosen.batched_guidance else ", branches of guidance one by one"
    report.note(
        "setting",
        f"{f'auto: {where}, {precision}' if auto else f'for {gib:g} GiB'}: {how}{tiles}{apart}",
        **{"device": name, "threads": threads, "gib": gib, "precision": precision},
        **chosen.model_dump(include={"quant", "offload", "tiled", "batched_guidance"}),
    )
    return chosen


def load_with_progress(
    bundle: "Bundle", settings: "RunSettings", report: Report, *, precision: str, quant: str | None
) -> "MoSPipeline":
    """Loads a bundle as `load_pipeline` does; an understanding tower that is not in the cache is downloaded.

    A base model is not: `mos models pull` asks first. Its `AdapterPipeline` has the same interface.

    Raises:
        MosError: as `fetch_tower` and `load_pipeline` do.
    """
    from mos_cli.bundles.adapters import AdapterBundle

    if isinstance(bundle, AdapterBundle):
        with report.stage("libraries"):
            from mos_cli.utils.quiet import quieten

            quieten()
            from mos_cli.adapters.model import load_pipeline as load_base_model
        with report.stage("weights"):
            return load_base_model(bundle, settings, precision=precision, quant=quant)  # type: ignore[return-value]
    with report.stage("fetching"):
        understanding = fetch_with_progress(bundle.index.understanding, quiet=report.quiet)
    with report.stage("libraries"):
        from mos_cli.utils.quiet import quieten

        quieten()
        from mos_cli.inference.model import load_pipeline
    with report.stage("weights"):
        return load_pipeline(bundle, understanding, settings, precision=precision, quant=quant)


def find_server(
    settings: "RunSettings", bundle: "Bundle", report: Report, recipe: "Recipe | None" = None
) -> "RemotePipeline | None":
    """The server that --server names, if it draws with the model and the settings of the run; None to draw here.

    Args:
        recipe: that of a picture which is drawn again.

    Raises:
        MosError: the one that is named by its address cannot be reached, or draws with others.
    """
    if settings.server == "off":
        return None
    from mos_cli.inference.requests import lora_recipes
    from mos_cli.server.client import find_server as find

    with report.stage("server"):
        loras = lora_recipes(settings) if recipe is None else recipe.loras
        pipeline, note = find(settings.server, settings, bundle, loras, recipe)
    if note is not None:
        report.note("note", note, note=note)
    return pipeline


def load_route_source(picture: Path, recipe: "Recipe", route_from: Path | None) -> "Recording | None":
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


def say_if_unchecked(recording: "Recording") -> None:
    """Warns of a trace that does not say whether it belongs to the picture beside it."""
    if not recording.checked:
        path, picture = recording.path, recording.picture
        print_warning(f"{path} is a trace of mos 0.1.0: that it is the trace of {picture} cannot be checked")


def refuse_folders(*traces: Path | None) -> None:
    """Raises InputError for a folder: files beside it must not be taken for its trace."""
    for path in traces:
        if path is not None and path.is_dir():
            raise InputError(f"cannot read {path}: it is a folder; name a trace (.json) or the picture beside it")
