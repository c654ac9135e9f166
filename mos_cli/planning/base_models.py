"""The memory that a base model needs on the device, stage by stage, and settings that fit. Imports no torch.

The stages are those of `planning.memory`: reading the prompts, making the bank, drawing, decoding. The constants of the
activations were measured on the networks of diffusers; a test compares them again.
"""

from itertools import product
from typing import get_args

from mos_cli.bundles.adapters import BaseNetwork
from mos_cli.bundles.base_models import PartShape
from mos_cli.planning.memory import TILE, TOKENS, MemoryStage, Quant, Setting, quantised_bytes
from mos_cli.planning.rates import BUS, FLOPS, MEMORY

PATCH = 16
"""Pixels along a patch: eight of the autoencoder, and patches of 2 x 2 latents."""
ACTIVATIONS = {"Flux2KleinPipeline": (21.0, 25), "ZImagePipeline": (15.5, 16), "PRXPipeline": (15.7, 12)}
"""At the peak of a pass: values of the blocks' width, and bytes for each value of a head, for every token."""
_DECODED = {2: 8, 4: 7}
"""Values of the decoder's last width for every pixel, by the bytes of a value."""


def all_settings(network: BaseNetwork, size: tuple[int, int], quant: tuple[Quant, Quant] | None) -> list[Setting]:
    """All settings of a base model at a size; `quant` only those with this quantisation."""
    texts: tuple[Quant, ...] = get_args(Quant) if quant is None else quant[:1]
    transformers: tuple[Quant, ...] = get_args(Quant) if quant is None else quant[1:]
    tiles = (False, True) if max(size) > TILE else (False,)
    return [
        Setting(text, transformer, offload, tiled)
        for text, transformer, offload, tiled in product(texts, transformers, ("none", "understanding"), tiles)
    ]


def stages(network: BaseNetwork, setting: Setting, size: tuple[int, int]) -> tuple[MemoryStage, ...]:
    """The peaks of the four stages at a size in pixels, width and height."""
    shape, each, index = network.shape, network.value_bytes, network.index
    text = {"language model": part_bytes(shape.text_encoder, setting.understanding, each)}
    drawer = part_bytes(shape.transformer, setting.generation, each)
    near = {"transformer": drawer, "autoencoder": each * shape.vae.parameters}
    stays = setting.offload == "none"
    branches = 2 if network.guided else 1
    slots = len(index.own_layers)
    states = index.layers * shape.text_tokens * shape.states_width * each
    embeddings = branches * index.layers * TOKENS * shape.states_width * slots * each
    bank = branches * TOKENS * slots * index.layers * shape.width * each
    latents = 6 * 4 * shape.latent_channels * (size[0] // 8) * (size[1] // 8)
    reading = shape.text_tokens * each * (3 * shape.text_encoder.longest + 2 * shape.states_width)
    if setting.understanding == "nf4":
        reading += 2 * shape.text_encoder.widest
    beside = near if stays else {}
    kept = text if stays else {}
    return (
        MemoryStage("encode", {**text, **beside, "hidden states": states + embeddings, "activations": reading}),
        MemoryStage(
            "bank", {**kept, **near, "hidden states": embeddings, "bank": bank, "activations": _refining(network)}
        ),
        MemoryStage(
            "sample",
            {
                **kept,
                **near,
                "bank": bank,
                "latents": latents,
                "activations": drawing_activations(network, setting.generation, size),
            },
        ),
        MemoryStage(
            "decode",
            {**kept, **near, "bank": bank, "latents": latents, "activations": _decoding(network, setting, size)},
        ),
    )


def part_bytes(part: PartShape, quant: Quant, each: int) -> int:
    """The bytes of a network's weights."""
    # What is beside quantised layers is bf16.
    other = each * (part.parameters - part.linear)
    return quantised_bytes(part.linear, part.rows, quant, each) + other


def patches(size: tuple[int, int]) -> int:
    """Patches of a picture of `size` pixels."""
    return (size[0] // PATCH) * (size[1] // PATCH)


def rows_at_once(network: BaseNetwork) -> int:
    """Branches of guidance that are computed as one batch: FLUX.2-klein computes them one after the other."""
    return 2 if network.guided and network.index.pipeline != "Flux2KleinPipeline" else 1


def drawing_activations(network: BaseNetwork, quant: Quant, size: tuple[int, int], text: int | None = None) -> int:
    """The peak of the activations of a pass of the transformer; `text` are its tokens of text, by default the most."""
    shape, each = network.shape, network.value_bytes
    text = shape.text_tokens if text is None else text
    length = patches(size) * (1 + network.references) + (text if shape.joint else 0)
    values, head_bytes = ACTIVATIONS[network.index.pipeline]
    rows = rows_at_once(network)
    peak = rows * length * (values * shape.width * each + head_bytes * shape.head_width)
    unpacked = {"none": 0, "nf4": 2 * shape.transformer.widest, "int8": rows * 4 * length * shape.transformer.longest}
    return round(peak) + unpacked[quant]


def host_bytes(network: BaseNetwork, setting: Setting) -> int:
    """Bytes of main memory for offloading."""
    if setting.offload == "none":
        return 0
    shape, each = network.shape, network.value_bytes
    parts = (part_bytes(shape.text_encoder, setting.understanding, each), each * shape.vae.parameters)
    return sum(parts) + part_bytes(shape.transformer, setting.generation, each)


def seconds(network: BaseNetwork, setting: Setting, size: tuple[int, int]) -> dict[str, float]:
    """The estimate for one picture: reading, copying weights, and all passes of the transformer."""
    shape, each = network.shape, network.value_bytes
    length = patches(size) * (1 + network.references) + (shape.text_tokens if shape.joint else 0)
    passes = network.defaults.steps * (2 if network.guided else 1)
    attention = 4 * length * length * shape.width * network.index.blocks
    compute = passes * (2 * shape.transformer.linear * length + attention) * each / (2 * FLOPS)
    moved = part_bytes(shape.transformer, setting.generation, each)
    parts = {
        "reading": 2 * shape.text_encoder.linear * shape.text_tokens / FLOPS,
        "drawing": max(compute, passes * moved / MEMORY),
    }
    if setting.generation == "nf4":
        # Unpacked to bf16 in every pass.
        parts["quantised layers"] = passes * 2.5 * shape.transformer.linear / MEMORY
    if setting.generation == "int8":
        # Inputs are rounded, outputs rescaled.
        parts["quantised layers"] = passes * length * 13 * shape.transformer.rows / MEMORY
    if setting.offload != "none":
        text = part_bytes(shape.text_encoder, setting.understanding, each)
        parts["networks over the bus"] = (text + moved + each * shape.vae.parameters) / BUS
    return parts


def _refining(network: BaseNetwork) -> int:
    """Bytes of the text path in front of the first block, one layer at a time."""
    shape = network.shape
    return 16 * shape.text_tokens * shape.width * network.value_bytes


def _decoding(network: BaseNetwork, setting: Setting, size: tuple[int, int]) -> int:
    width, height = (min(side, TILE) for side in size) if setting.tiled else size
    picture = 3 * size[0] * size[1] * (4 * 4 + 4 * setting.tiled)
    each = network.value_bytes
    return width * height * each * _DECODED[each] * network.shape.decoder_width + picture
