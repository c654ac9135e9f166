"""How a command lays a model out on the device, and loads it."""

from typing import TYPE_CHECKING

from mos_cli.cli.drawing import Report
from mos_cli.errors import UsageError

if TYPE_CHECKING:
    from mos_cli.bundles.bundle import Bundle
    from mos_cli.config.settings import RunSettings
    from mos_cli.inference.pipeline import MoSPipeline


def fit_to_card(
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
    """The settings with what --max-vram leaves open chosen by the plan, which is said in one line.

    Args:
        size: of the picture as the model draws it, in pixels.
        fetch: an understanding tower that is not here yet may be fetched: the plan reads how large it is.
        quant: how the towers are quantised in any case; by default as the settings say, where they do.
        precision: bf16 or fp32; by default as the settings say.
        references: how many pictures are shown.

    Returns:
        Settings whose `max_vram` is a number on a GPU, and None on a CPU.

    Raises:
        UsageError: a number for `max_vram`, or something to offload, where nothing is drawn on a GPU.
        MemoryLimitError: nothing fits.
    """
    if settings.max_vram is None and settings.offload == "none":
        return settings
    from mos_cli.bundles.blueprints import network_of
    from mos_cli.config.settings import available_memory, fitted
    from mos_cli.utils.devices import choose_device, choose_precision, device_name, device_threads

    with report.stage("libraries"):
        device = choose_device(settings.device)
    on_cpu, auto = device.type == "cpu", settings.max_vram == "auto"
    if on_cpu and (settings.offload != "none" or not auto):
        limited = settings.max_vram is not None and not auto
        name, way_out = ("max_vram", "auto takes what fits this machine") if limited else ("offload", "none")
        option = f"--{name.replace('_', '-')}"
        origins = f"{option}, MOS_{name.upper()}, a preset or the config file"
        raise UsageError(f"{name} ({origins}) needs a GPU, and this run is on a CPU: {option} {way_out}")
    if settings.max_vram is None:
        return settings
    if fetch:
        from mos_cli.cli.fetching import fetch_with_progress

        with report.stage("fetching"):
            fetch_with_progress(bundle.index.understanding)
    if quant is None and "quant" in settings.model_fields_set:
        quant = settings.quant
    if precision is None:
        precision = choose_precision(device) if settings.precision == "auto" else settings.precision
    gib = available_memory(device) if auto else settings.max_vram
    numbered = settings.model_copy(update={"max_vram": gib})
    network = network_of(bundle, precision=precision, references=references)
    chosen = fitted(numbered, network, size, quant, on_cpu=on_cpu)
    name, threads = device_name(device), device_threads(device)
    cores = f"{threads} CPU thread{'' if threads == 1 else 's'}"
    where = f"no GPU: {cores}, {gib:.1f} GiB free" if on_cpu else f"{name}, {gib:.4g} GiB"
    how = f"--quant {chosen.quant}" + ("" if on_cpu else f" --offload {chosen.offload}")
    tiles = ", decoded in tiles" if chosen.tiled else ""
    apart = "" if chosen.batched_guidance else ", branches of guidance one by one"
    report.event(
        "setting",
        f"{f'auto: {where}, {precision}' if auto else f'for {gib:g} GiB'}: {how}{tiles}{apart}",
        **{"device": name, "threads": threads, "gib": gib, "precision": precision},
        **chosen.model_dump(include={"quant", "offload", "tiled", "batched_guidance"}),
    )
    return chosen.model_copy(update={"max_vram": None}) if on_cpu else chosen


def load_pipeline(
    bundle: "Bundle", settings: "RunSettings", report: Report, *, precision: str, quant: str | None
) -> "MoSPipeline":
    """Imports the libraries and loads a bundle; an understanding tower that is not here yet is fetched.

    Raises:
        MosError: as `MoSPipeline` and `choose_device` do.
    """
    from mos_cli.bundles.bundle import record_location
    from mos_cli.cli.fetching import fetch_with_progress

    with report.stage("fetching"):
        understanding = fetch_with_progress(bundle.index.understanding)
    with report.stage("libraries"):
        from mos_cli.utils.quiet import quieten

        quieten()
        from mos_cli.inference.offload import limit_memory
        from mos_cli.inference.pipeline import MoSPipeline
        from mos_cli.planning.candidates import parse_quant
        from mos_cli.planning.memory import Setting
        from mos_cli.utils.devices import choose_device
    device = choose_device(settings.device)
    if isinstance(settings.max_vram, float) and device.type == "cuda":
        limit_memory(device, settings.max_vram)
    with report.stage("weights"):
        pipeline = MoSPipeline(
            bundle,
            understanding,
            device=device,
            precision=precision,
            attention=settings.attention,
            setting=Setting(*parse_quant(quant or "none"), settings.offload, settings.tiled, settings.batched_guidance),
            compiled=settings.compile,
        )
    record_location(bundle)
    return pipeline
