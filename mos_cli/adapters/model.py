"""Loading a base model with its adapter, for the command line and for the Python interface."""

from pathlib import Path
from typing import Any

from mos_cli.adapters.pipeline import AdapterPipeline
from mos_cli.bundles.adapters import AdapterBundle
from mos_cli.bundles.bundle import find_bundle, record_location
from mos_cli.bundles.loras import parse_lora, record_lora
from mos_cli.config.settings import RunSettings, make_settings
from mos_cli.inference import model as native
from mos_cli.inference.offload import limit_memory
from mos_cli.inference.requests import recipe_fields
from mos_cli.planning.candidates import parse_quant
from mos_cli.planning.memory import Setting
from mos_cli.utils.devices import choose_device
from mos_cli.utils.files import sha256_of


def load_pipeline(
    bundle: AdapterBundle, settings: RunSettings, *, precision: str, quant: str | None
) -> AdapterPipeline:
    """Loads a base model with its adapter as settings say, and remembers where it lies, for replays.

    Args:
        precision, quant: as a recipe has them.

    Raises:
        MosError: as `AdapterPipeline` and `choose_device` do.
    """
    device = choose_device(settings.device)
    if isinstance(settings.max_vram, float) and device.type == "cuda":
        limit_memory(device, settings.max_vram)
    setting = Setting(*parse_quant(quant or "none"), settings.offload, settings.tiled)
    loras = [parse_lora(text) for text in settings.loras or ()]
    pipeline = AdapterPipeline(bundle, device=device, precision=precision, setting=setting, loras=loras)
    for lora in loras:
        record_lora(lora.path, sha256_of(lora.path))
    record_location(bundle)
    return pipeline


def load(model: str | Path = "emoji", **options: Any) -> native.Model:
    """Loads a bundle as `mos_cli.inference.model.load` does, or a base model with its adapter.

    Args:
        model: a bundle, an adapter or a diffusers folder: name, folder or hub id.
        options: the further arguments of `mos_cli.inference.model.load`.

    Raises:
        MosError: as that.
    """
    bundle = find_bundle(str(model))
    if not isinstance(bundle, AdapterBundle):
        return native.load(model, **options)
    flags = make_settings(model=str(model), **options)
    settings = RunSettings(**flags.model_dump(exclude_none=True))
    fields = recipe_fields(settings, bundle, bundle.index.defaults)
    pipeline = load_pipeline(bundle, settings, precision=fields["precision"], quant=fields["quant"])
    return native.Model(pipeline, settings)  # type: ignore[arg-type]
