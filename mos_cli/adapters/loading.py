"""Loading the networks of a base model, one after the other, from a diffusers folder.

No class is taken from the folder: the pipeline and its parts are those of the table below. Weights are safetensors.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mos_cli.adapters.adapter import Adapter, load_adapter
from mos_cli.bundles.adapters import AdapterBundle
from mos_cli.bundles.base_models import KEPT, PipelineClass, diffusers_config
from mos_cli.bundles.shapes import read_config
from mos_cli.errors import ModelError
from mos_cli.inference.offload import Offloader
from mos_cli.planning.memory import Quant
from mos_cli.quantization.method import Method, Quantisation
from mos_cli.towers.quantized import UNDERSTANDING_KEPT, load, quantise
from mos_cli.utils.quiet import quieten


@dataclass(frozen=True)
class Classes:
    """The classes of a pipeline and of its parts, and the settings that the pipeline takes from its index."""

    pipeline: type[Any]
    transformer: type[Any]
    text_encoder: type[Any]
    vae: dict[str, type[Any]]
    settings: tuple[str, ...] = ()


def classes_of(name: PipelineClass) -> Classes:
    """The classes of a base model, imported when they are needed."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from transformers import Qwen3ForCausalLM

    if name == "Flux2KleinPipeline":
        from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
        from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
        from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline

        vae: dict[str, type[Any]] = {"AutoencoderKLFlux2": AutoencoderKLFlux2}
        return Classes(Flux2KleinPipeline, Flux2Transformer2DModel, Qwen3ForCausalLM, vae, ("is_distilled",))
    if name == "ZImagePipeline":
        from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
        from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline

        return Classes(ZImagePipeline, ZImageTransformer2DModel, Qwen3ForCausalLM, {"AutoencoderKL": AutoencoderKL})
    from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
    from diffusers.models.transformers.transformer_prx import PRXTransformer2DModel
    from diffusers.pipelines.prx.pipeline_prx import PRXPipeline
    from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

    vae = {"AutoencoderKL": AutoencoderKL, "AutoencoderDC": AutoencoderDC}
    return Classes(PRXPipeline, PRXTransformer2DModel, T5GemmaEncoder, vae, ("default_sample_size",))


def load_base_model(
    bundle: AdapterBundle,
    offloader: Offloader,
    *,
    dtype: torch.dtype,
    text_encoder: Quant = "none",
    transformer: Quant = "none",
) -> Any:
    """The pipeline of a verified base model; with offloading each part leaves the device before the next is loaded.

    Args:
        dtype: of what is not quantised.
        text_encoder, transformer: how the two are quantised.

    Raises:
        ModelError: the folder is damaged, or its parts are of other classes.
        torch.OutOfMemoryError, MemoryError: there is too little memory for them.
    """
    quieten()
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
    from transformers import AutoTokenizer

    folder, classes = bundle.base, classes_of(bundle.index.pipeline)
    config, device = diffusers_config(folder), offloader.device
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True, trust_remote_code=False)
        if not tokenizer.is_fast:
            raise ModelError(f"the tokenizer in {folder} cannot say which characters a token stands for")
        reader = _text_encoder(classes, folder / "text_encoder", dtype, text_encoder, device)
        offloader.add_understanding(reader)  # type: ignore[arg-type]
        drawer = load_transformer(bundle, device, dtype=dtype, quant=transformer, stays_on=offloader.loading)
        offloader.add_tower(drawer)  # type: ignore[arg-type]
        vae = _vae(classes, folder / "vae", dtype).to(device)
        offloader.add_other(vae)
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler", local_files_only=True)
        parts = {"tokenizer": tokenizer, "text_encoder": reader, "transformer": drawer, "vae": vae}
        settings = {name: config[name] for name in classes.settings if name in config}
        pipe = classes.pipeline(scheduler=scheduler, **parts, **settings)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"the base model in {folder} cannot be loaded: {reason}") from None
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_transformer(
    bundle: AdapterBundle,
    device: torch.device,
    *,
    dtype: torch.dtype,
    quant: Quant,
    stays_on: torch.device | None = None,
) -> Any:
    """The transformer of a verified base model, quantised on a device.

    Args:
        stays_on: where it is afterwards, instead of on that device.
    """
    classes, folder = classes_of(bundle.index.pipeline), bundle.base / "transformer"
    with torch.device("meta"):
        empty = classes.transformer.from_config(classes.transformer.load_config(folder))
    return load(
        empty,
        folder,
        None if quant == "none" else quant,
        kept=KEPT[bundle.index.pipeline],
        device=stays_on or device,
        quantised_on=device,
        dtype=dtype,
    )


def load_router(bundle: AdapterBundle, pipe: Any, device: torch.device) -> Adapter | None:
    """The trained router of an adapter, in fp32; None for an adapter without one. Raises ModelError."""
    if bundle.index.router is None:
        return None
    config = pipe.text_encoder.config
    return load_adapter(
        bundle.folder,
        bundle.index,
        states_width=config.hidden_size,
        patch_values=patch_values(pipe.transformer),
        device=device,
    )


def patch_values(transformer: nn.Module) -> int:
    """The values of a noised patch: FLUX.2's latents are packed already, the others are patches of 2 x 2."""
    channels: int = transformer.config["in_channels"]  # type: ignore[index, assignment]
    return channels if type(transformer).__name__ == "Flux2Transformer2DModel" else 4 * channels


def _text_encoder(classes: Classes, folder: Path, dtype: torch.dtype, quant: Quant, device: torch.device) -> Any:
    method: Method | None = None if quant == "none" else quant
    model = classes.text_encoder.from_pretrained(
        folder,
        config=_text_config(classes, folder),
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
    )
    model = model.eval().requires_grad_(False)
    if method is None:
        return model.to(device)
    quantise(model, Quantisation(method=method, kept=UNDERSTANDING_KEPT), device)
    return model.to(device)


def _text_config(classes: Classes, folder: Path) -> Any:
    """The config of a text encoder. Transformers would read that of T5Gemma's encoder as that of the whole model."""
    from transformers.models.t5gemma.configuration_t5gemma import T5GemmaConfig, T5GemmaModuleConfig

    if classes.text_encoder.__name__ != "T5GemmaEncoder":
        return classes.text_encoder.config_class.from_pretrained(folder, local_files_only=True)
    if "encoder" in read_config(folder):
        return T5GemmaConfig.from_pretrained(folder, local_files_only=True).encoder
    return T5GemmaModuleConfig.from_pretrained(folder, local_files_only=True)


def _vae(classes: Classes, folder: Path, dtype: torch.dtype) -> nn.Module:
    name = str(read_config(folder).get("_class_name"))
    if name not in classes.vae:
        raise ModelError(f"the autoencoder in {folder} is of class {name}, not {' or '.join(classes.vae)}")
    vae = classes.vae[name].from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True)
    return vae.eval().requires_grad_(False)
