"""Loading a model: a base model with its adapter, and for the Python interface a bundle of either kind."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mos_cli.adapters.pipeline import AdapterPipeline
from mos_cli.bundles.adapters import AdapterBundle
from mos_cli.bundles.bundle import find_bundle
from mos_cli.bundles.sources import fetch_tower
from mos_cli.config.settings import RunSettings, make_settings
from mos_cli.inference.model import Model, make_pipeline, several
from mos_cli.inference.model import load_pipeline as load_native
from mos_cli.inference.requests import fit_settings, needs_fitting, recipe_fields


def load_pipeline(
    bundle: AdapterBundle, settings: RunSettings, *, precision: str, quant: str | None
) -> AdapterPipeline:
    """Loads a base model with its adapter as settings say, and remembers where it lies, for replays.

    Args:
        precision, quant: as a recipe has them.

    Raises:
        MosError: as `AdapterPipeline` and `choose_device` do.
    """
    return make_pipeline(AdapterPipeline, bundle, settings, precision=precision, quant=quant)


def load(
    model: str | Path = "emoji",
    *,
    device: str = "auto",
    precision: str = "auto",
    quant: str | None = None,
    max_vram: float | str | None = None,
    offload: str | None = None,
    attention: str = "auto",
    compile: bool = False,
    loras: str | Sequence[str] = (),
) -> Model:
    """Loads a model. The understanding tower is downloaded first if it is not in the cache.

    Args:
        model: a bundle, an adapter or a diffusers folder: name, folder or hub id. A base model is not downloaded.
        device: "auto", "cpu", "cuda" or "cuda:1".
        precision: "auto", "bf16" or "fp32".
        quant: "none" (the default), "int8" or "nf4"; "nf4,none" for the understanding and the generation tower each.
        max_vram: GiB of the GPU to use at most, or "auto" for all there is; without a GPU, "auto" is of main memory.
            What `quant` and `offload` leave open is chosen: the fastest that fits a picture of the native size.
        offload: what waits in main memory until the GPU needs it: "none" (the default), "understanding" or "blocks".
        attention: "auto", "xformers" or "sdpa".
        compile: compile the generation tower when it is first used.
        loras: one or several LoRA files that change the model: "FILE" or "FILE:SCALE", as `--lora` takes them.

    Raises:
        UsageError: a setting is not understood, or does not go with the device.
        ModelError: the model is not found, cannot be fetched, or does not match its hashes.
        DeviceError: the device is not there, or cannot do what is requested.
        MemoryLimitError: it does not fit.
    """
    flags = make_settings(
        model=str(model),
        device=device,
        precision=precision,
        quant=quant,
        max_vram=max_vram,
        offload=offload,
        attention=attention,
        compile=compile,
        loras=several(loras) or None,
    )
    settings = RunSettings(**flags.model_dump(exclude_none=True))
    bundle = find_bundle(settings.model)
    # Checked before anything is downloaded.
    fitting = needs_fitting(settings)
    recipe_fields(settings, bundle, bundle.index.defaults)
    if isinstance(bundle, AdapterBundle):
        load_fitted: Callable[..., Any] = partial(load_pipeline, bundle)
    else:
        load_fitted = partial(load_native, bundle, fetch_tower(bundle.index.understanding))
    if fitting:
        references = 0 if bundle.index.edits is None else 1
        settings = fit_settings(bundle, settings, bundle.index.canvas.native, references=references).settings
    fields = recipe_fields(settings, bundle, bundle.index.defaults)
    pipeline = load_fitted(settings, precision=fields["precision"], quant=fields["quant"])
    return Model(pipeline, settings)  # type: ignore[arg-type]
