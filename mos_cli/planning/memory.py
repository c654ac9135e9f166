"""The memory that a model needs on the device, stage by stage, from its config alone. Imports no torch.

The stages of a picture: encoding the prompts, projecting their states into the bank, drawing, decoding. The activations
are those of the code: at every peak, the tensors that exist are counted.

Shapes: B guidance branches computed at once, T context tokens, those of references included, N patches, L = T + N, D
width, M understanding layers, S width of a state, J generation blocks, K kept layers, R width of the router, E width of
a head. All sizes in bytes.
"""

from dataclasses import dataclass
from typing import Literal

from mos_cli.bundles.blueprints import Network
from mos_cli.bundles.shapes import IMAGE_GRID
from mos_cli.errors import ModelError

Quant = Literal["none", "int8", "nf4"]
Offload = Literal["none", "understanding", "blocks"]
GIB = 2**30
TOKENS = 256
"""Tokens of a prompt's words in a plan: the longest that models are trained on."""
RESERVE = GIB
"""Bytes for the driver, the libraries' workspaces, fragmentation and tables of positions."""
TILE = 512
"""Pixels along a tile of the picture; the distance of tiles in diffusers is 448."""
LARGE_TOWER = 10**9
"""Parameters from which on an understanding tower computes in bf16."""
IMAGE_TOKENS = IMAGE_GRID**2
"""Image tokens of a picture from an image encoder."""
_BRANCHES = 2


@dataclass(frozen=True)
class Setting:
    """Quantisation, offloading, tiling and batching of a model.

    Args:
        understanding, generation: quantisation of the two towers.
        offload: the parts in main memory while they are not needed: "none"; "understanding": the understanding tower
            while drawing, and the rest while encoding; "blocks": also the generation tower's blocks, all but two.
        tiled: decode the picture tile by tile.
        batched_guidance: compute the guidance branches as one batch, not one after the other.
    """

    understanding: Quant = "none"
    generation: Quant = "none"
    offload: Offload = "none"
    tiled: bool = False
    batched_guidance: bool = True


@dataclass(frozen=True)
class MemoryStage:
    """The bytes on the device at the peak of a stage, by name."""

    name: str
    parts: dict[str, int]

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Weights:
    """The bytes of a model's weights in a setting."""

    understanding: int
    blocks: int
    rest: int
    """The generation tower without its blocks."""
    others: int
    """Autoencoder and image encoder."""


def weights(network: Network, setting: Setting) -> Weights:
    """The bytes of all weights. The vision part of an understanding tower counts only with references."""
    generation, tower = network.generation, network.understanding
    vision = tower.vision if network.references else 0
    linear = sum(i * o for i, o in generation.linears)
    rows = sum(o for _, o in generation.linears)
    each, autoencoder = network.value_bytes, network.autoencoder
    full = 2 if setting.understanding != "none" else understanding_bytes(network)
    return Weights(
        understanding=quantised_bytes(tower.linear, tower.linear // tower.width, setting.understanding, full)
        + full * (tower.other + vision),
        blocks=quantised_bytes(linear, rows, setting.generation, each) + each * (generation.block_parameters - linear),
        rest=each * (generation.parameters - generation.block_parameters),
        others=each * (autoencoder.parameters if autoencoder else 0) + 4 * network.image_encoder_parameters,
    )


def understanding_bytes(network: Network) -> int:
    """Bytes of a parameter, and of a value of a state, of an understanding tower that is not quantised."""
    return 4 if computes_in_fp32(network.understanding.parameters, "none") else 2


def computes_in_fp32(parameters: int, quant: Quant) -> bool:
    """Whether an understanding tower with this number of parameters computes in fp32.

    Small ones do, which costs little. Large and quantised ones compute in bf16.
    """
    return quant == "none" and parameters < LARGE_TOWER


def context_tokens(network: Network, size: tuple[int, int]) -> int:
    """Context tokens of a prompt, including the image tokens of references."""
    tower = network.understanding
    return TOKENS + network.references * (tower.image_tokens(size) if network.generation.has_vision else IMAGE_TOKENS)


def stages(network: Network, setting: Setting, size: tuple[int, int]) -> tuple[MemoryStage, ...]:
    """The peaks of the four stages at a size in pixels, width and height.

    Raises:
        ModelError: the memory of this kind of autoencoder is not known.
    """
    made = weights(network, setting)
    stays = setting.offload == "none"
    drawing = made.rest + (2 * made.blocks // network.generation.depth if setting.offload == "blocks" else made.blocks)
    others = {"autoencoder": made.others} if network.autoencoder or network.image_encoder_parameters else {}
    beside = {"generation tower": made.rest + made.blocks, **others} if stays else {}
    tower = {"understanding tower": made.understanding}
    kept = tower if stays else {}
    tokens, patches = context_tokens(network, size), patches_of(network, size)
    states, bank, latents = _states(network, tokens), _bank(network, tokens), _latents(network, size)
    near = {} if setting.offload == "blocks" else others
    rows = _BRANCHES if network.guided and setting.batched_guidance else 1
    # The branches are copied into one bank.
    joined = _bank_of(network, rows * tokens) if rows > 1 else 0
    return (
        MemoryStage(
            "encode",
            {**tower, **beside, "hidden states": states, "activations": _encoding(network, setting, tokens)},
        ),
        MemoryStage(
            "bank",
            {
                **kept,
                "generation tower": made.rest + (0 if setting.offload == "blocks" else made.blocks),
                **near,
                "hidden states": states,
                "bank": bank,
                "activations": _projecting(network, tokens),
            },
        ),
        MemoryStage(
            "sample",
            {
                **kept,
                "generation tower": drawing,
                **near,
                "bank": bank + joined,
                **_references(network, patches),
                "latents": latents,
                "activations": drawing_activations(network, setting.generation, tokens, patches, rows),
            },
        ),
        MemoryStage(
            "decode",
            {
                **kept,
                "generation tower": made.rest + (0 if setting.offload == "blocks" else made.blocks),
                **others,
                "bank": bank,
                **_references(network, patches),
                "latents": latents,
                "activations": _decoding(network, setting, size),
            },
        ),
    )


def largest_batch(network: Network, setting: Setting, size: tuple[int, int], gib: float) -> int:
    """The most pictures of a size that fit when drawn at once, of 16, 8, 4, 2 and 1.

    Raises:
        ModelError: the memory of this kind of autoencoder is not known.
    """
    stage = next(stage for stage in stages(network, setting, size) if stage.name == "sample")
    towers = stage.parts.keys() & {"understanding tower", "generation tower"}
    weight_bytes = sum(stage.parts[name] for name in towers)
    each = stage.peak - weight_bytes
    return next((n for n in (16, 8, 4, 2) if weight_bytes + n * each + RESERVE <= gib * GIB), 1)


def host_bytes(network: Network, setting: Setting) -> int:
    """Bytes of main memory for offloading; copies of all weights stay there."""
    made = weights(network, setting)
    return 0 if setting.offload == "none" else made.understanding + made.blocks + made.rest + made.others


def quantised_bytes(linear: int, rows: int, quant: Quant, full: int) -> int:
    """Bytes of linear layers with `linear` weights and `rows` output rows."""
    if quant == "int8":
        return linear + 4 * rows
    if quant == "nf4":
        # One byte of scale for 64 weights, and four for 256 scales.
        return linear // 2 + linear // 64 + 4 * (linear // (64 * 256))
    return full * linear


def _states(network: Network, tokens: int) -> int:
    """Bytes of the states of all layers, of both prompts."""
    layers, width = network.understanding.states
    return _BRANCHES * tokens * layers * width * understanding_bytes(network)


def _bank(network: Network, tokens: int) -> int:
    """Bytes of the banks of both prompts; with references, those without pictures are kept as well."""
    return _bank_of(network, _BRANCHES * (tokens + TOKENS * (network.references > 0)))


def _bank_of(network: Network, tokens: int) -> int:
    g = network.generation
    router = g.router_width if g.fusion == "routed" else 0
    return tokens * (g.states_layers * g.width + router) * network.value_bytes


def _encoding(network: Network, setting: Setting, tokens: int) -> int:
    """Bytes for one prompt: the tensors of a layer, or the copy of all states while they are stacked."""
    tower, each = network.understanding, understanding_bytes(network)
    layers, width = tower.states
    layer = tokens * each * (3 * tower.hidden + 2 * width)
    unpacked = 2 * tower.width * tower.hidden if setting.understanding == "nf4" else 0
    return max(layer + unpacked, tokens * layers * width * each)


def _projecting(network: Network, tokens: int) -> int:
    """Bytes for one prompt: its states normalised in fp32, and a copy of them in fp32 or as they are projected."""
    layers, width = network.understanding.states
    beside = 4 if understanding_bytes(network) == 2 else 4 - network.value_bytes
    return tokens * layers * width * (4 + beside)


def patches_of(network: Network, size: tuple[int, int]) -> int:
    """Patches of a picture of `size` pixels, width and height."""
    side = network.generation.patch * (network.autoencoder.factor if network.autoencoder else 1)
    return (size[0] // side) * (size[1] // side)


def _latents(network: Network, size: tuple[int, int]) -> int:
    """Bytes of the noised latent, both predictions, the guided one and the velocities, in fp32."""
    factor = network.autoencoder.factor if network.autoencoder else 1
    return 6 * 4 * network.generation.channels * (size[0] // factor) * (size[1] // factor)


def _references(network: Network, patches: int) -> dict[str, int]:
    g = network.generation
    each = network.value_bytes * (g.depth * 2 * g.width + g.width)
    return {"references": network.references * patches * each} if network.references else {}


def drawing_activations(network: Network, quant: Quant, tokens: int, patches: int, rows: int) -> int:
    """The peak of the activations of the generation tower with its router, for a batch of `rows` branches."""
    g, each = network.generation, network.value_bytes
    D, R, T, refs = g.width, g.router_width, tokens, network.references * patches
    N = patches + (T if g.in_sequence else 0)
    L, T = patches + T + refs, (0 if g.in_sequence else T)
    # The rotary embedding computes a product in fp32, and copies the input and the result where they are not fp32.
    rotated = 4 if each == 4 else 10
    # The contexts of all blocks are mixed at once.
    context = each * tokens * g.depth * D + each * T * D * 3 + each * (refs + T) * 2 * D * (refs > 0)
    attention = each * N * D * 6 + each * 3 * L * D + rotated * L * D
    feed_forward = each * N * (4 * D + 4 * g.hidden)
    routed = 0
    if g.fusion == "routed":
        length = 1 + tokens + patches
        block = max(7 * each + rotated, 15 * each) * length * R
        routed = block + each * patches * R
    route = tokens * g.depth * g.kept_layers * 12 + 8 * tokens * g.states_layers * g.depth
    ends = 3 * each * patches * g.channels * g.patch**2 + each * 6 * D
    widest, longest = max((i * o, o) for i, o in g.linears)
    unpacked = {"none": 0, "nf4": 2 * widest, "int8": rows * 4 * N * longest}[quant]
    return rows * (max(max(attention, feed_forward) + context, routed) + route + ends) + unpacked


def _decoding(network: Network, setting: Setting, size: tuple[int, int]) -> int:
    width, height = (min(side, TILE) for side in size) if setting.tiled else size
    # The tiles and the picture that they are joined to, as floats, and finally bytes.
    picture = 3 * size[0] * size[1] * (4 * 4 + 4 * setting.tiled)
    return decoding_activations(network, (width, height)) + picture


def decoding_activations(network: Network, size: tuple[int, int]) -> int:
    """The peak of the activations of the decoder at a size in pixels; raises ModelError for an unknown autoencoder.

    It is in the last stage: input and output of a residual block, its norm in fp32, and the output of the stage before.
    """
    autoencoder, pixels, each = network.autoencoder, size[0] * size[1], network.value_bytes
    if autoencoder is None:
        return 0
    if autoencoder.kind == "Enlarger":
        return pixels * each * (4 * autoencoder.config["width"] + 5)
    if autoencoder.kind == "AutoencoderDC":
        last, before = autoencoder.stages[:2]
        return pixels * (last * (16 if each == 4 else 12) + before * each // 4)
    if autoencoder.kind == "AutoencoderKL":
        return pixels * each * (7 if each == 4 else 8) * autoencoder.stages[0]
    raise ModelError(f"the memory of an autoencoder of class {autoencoder.kind} is not known: {network.ref}")
