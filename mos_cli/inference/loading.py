"""Loading the networks of a bundle to a device, one after the other."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from mos_cli.bundles.bundle import Bundle
from mos_cli.bundles.shapes import understanding_parameters
from mos_cli.errors import ModelError
from mos_cli.inference.offload import Offloader
from mos_cli.planning.memory import Setting, computes_in_fp32
from mos_cli.towers.attention import AttentionBackend, choose_attention
from mos_cli.towers.autoencoder import Autoencoder, Latents, Pixels, load_autoencoder
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.image_encoder import ImageEncoder
from mos_cli.towers.lora import LoraSet
from mos_cli.towers.quantized import load_generation
from mos_cli.towers.understanding import UnderstandingTower
from mos_cli.towers.vision_language import load_understanding
from mos_cli.utils.migration import part_folder

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Parts:
    """The networks of a model and its scheduler; `attention` is the generation tower's attention backend."""

    understanding: UnderstandingTower
    tower: GenerationTower
    attention: str
    scheduler: FlowMatchEulerDiscreteScheduler
    autoencoder: Autoencoder
    image_encoder: ImageEncoder | None


def load_parts(
    bundle: Bundle,
    understanding: Path,
    offloader: Offloader,
    *,
    precision: str,
    attention: AttentionBackend,
    setting: Setting,
    loras: LoraSet = LoraSet(),
) -> Parts:
    """Loads all parts of a verified bundle; with offloading each leaves the device before the next is loaded.

    Raises:
        ModelError: the bundle's parts cannot be loaded.
        DeviceError: the device does not support the attention backend.
        torch.OutOfMemoryError, MemoryError: there is too little memory for them.
    """
    device, dtype, folder = offloader.device, DTYPES[precision], bundle.folder
    fp32 = computes_in_fp32(understanding_parameters(understanding), setting.understanding)
    understanding_tower = load_understanding(
        understanding,
        dtype=torch.float32 if fp32 else torch.bfloat16,
        device=str(device),
        quant=None if setting.understanding == "none" else setting.understanding,
    )
    offloader.add_understanding(understanding_tower)
    autoencoder: Autoencoder = Pixels()
    image_encoder: ImageEncoder | None = None
    try:
        tower = load_generation(
            folder / "generation",
            None if setting.generation == "none" else setting.generation,
            device=offloader.loading,
            quantised_on=device,
            dtype=dtype,
            loras=loras,
        )
        with offloader.briefly_onloaded(tower):
            backend = choose_attention(tower, attention)
        offloader.add_tower(tower)
        scheduler: FlowMatchEulerDiscreteScheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(  # type: ignore[assignment]
            folder / "scheduler"
        )
        if (folder / "autoencoder").is_dir():
            autoencoder = load_autoencoder(folder / "autoencoder", dtype=dtype, device=str(device))
            if setting.tiled and isinstance(autoencoder, Latents):
                autoencoder.model.enable_tiling()
            offloader.add_other(autoencoder)
        if bundle.index.edits is not None and not tower.has_vision:
            image_encoder = ImageEncoder.from_pretrained(
                part_folder(folder, "image_encoder"), torch_dtype=torch.float32
            ).to(device)  # type: ignore[arg-type]
            offloader.add_other(image_encoder)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise ModelError(f"the bundle in {folder} cannot be loaded: {error}") from None
    return Parts(understanding_tower, tower, backend, scheduler, autoencoder, image_encoder)
