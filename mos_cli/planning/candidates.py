"""Which setting of a model fits a card and is fastest there. Imports no torch.

Time is estimated from three rates and counts what differs between settings: arithmetic, weights over the bus, and what
quantised layers cost beside their products. Decoding and loading from the disk are left out.
"""

from dataclasses import dataclass
from itertools import product
from typing import get_args

from mos_cli.bundles.blueprints import Network
from mos_cli.errors import MemoryLimitError, UsageError
from mos_cli.planning.memory import (
    GIB,
    RESERVE,
    TILE,
    MemoryStage,
    Offload,
    Quant,
    Setting,
    context_tokens,
    host_bytes,
    patches_of,
    stages,
    weights,
)

BUS = 25e9
"""Bytes per second from main memory, PCIe 4.0 x16."""
MEMORY = 500e9
"""Bytes per second of the card's own memory."""
FLOPS = 50e12
"""Operations per second of bf16 products."""
CARDS = (8, 12, 16, 24)
_ALIKE = 1.08
"""Estimates nearer than this are not told apart: the higher precision is taken."""
_SHOWS = 0.1
"""What at least shows of the time to fetch blocks: some of it falls between steps, where nothing computes."""
_CPU_ORDER: tuple[Quant, ...] = ("none", "nf4", "int8")
"""From the fastest on a CPU to the slowest; the last is larger than the one before, and so never taken there."""
_BITS: dict[Quant, int] = {"none": 16, "int8": 8, "nf4": 4}


@dataclass(frozen=True)
class Candidate:
    """A setting with what it needs and how long a picture takes by estimate.

    Args:
        quant: what asks `mos generate` for it: the setting's, without what the bundle's weights are already.
        host: bytes of main memory.
        seconds: parts of the estimate by name, for a picture with a prompt of its own.
    """

    setting: Setting
    quant: str
    stages: tuple[MemoryStage, ...]
    host: int
    seconds: dict[str, float]

    @property
    def peak(self) -> int:
        return max(stage.peak for stage in self.stages)

    @property
    def needs(self) -> int:
        """The peak and what is reserved, in bytes."""
        return self.peak + RESERVE

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def options(self) -> str:
        """What asks `mos generate` for this setting."""
        return f"--quant {self.quant} --offload {self.setting.offload}"


def parse_quant(text: str) -> tuple[Quant, Quant]:
    """The quantisation of the understanding and the generation tower, from "nf4" or "nf4,none".

    Raises:
        UsageError: the text is neither.
    """
    parts = text.split(",")
    if len(parts) > 2 or any(part not in get_args(Quant) for part in parts):
        raise UsageError(f"--quant {text} is not understood: write none, int8, nf4, or two of them as nf4,none")
    return parts[0], parts[-1]  # type: ignore[return-value]


def candidates(network: Network, size: tuple[int, int], *, quant: tuple[Quant, Quant] | None = None) -> list[Candidate]:
    """All settings of a model at a size, from the fastest to the slowest.

    Args:
        quant: only what this asks for; "none" leaves a tower as it is.

    Raises:
        UsageError: the model is quantised already, and is to be once more.
    """
    towers: tuple[Quant, ...] = get_args(Quant) if quant is None else quant[:1]
    generations: tuple[Quant, ...] = get_args(Quant) if quant is None else quant[1:]
    if network.method is not None:
        if quant is not None and quant[1] != "none":
            raise UsageError(f"{network.ref} is quantised already ({network.method}): --quant {quant[0]},none")
        generations = ("none",)
    tiles = (False, True) if network.autoencoder and network.autoencoder.tiles and max(size) > TILE else (False,)
    batched_guidance = (True, False) if network.guided else (True,)
    found = []
    for u, g, offload, tiled, joined in product(towers, generations, get_args(Offload), tiles, batched_guidance):
        setting = Setting(u, network.method or g, offload, tiled, joined)
        found.append(
            Candidate(
                setting=setting,
                quant=u if u == g else f"{u},{g}",
                stages=stages(network, setting, size),
                host=host_bytes(network, setting),
                seconds=_seconds(network, setting, size),
            )
        )
    return sorted(found, key=lambda c: (c.total_seconds, c.setting.tiled, not c.setting.batched_guidance))


def fastest(found: list[Candidate], card: float) -> Candidate:
    """The fastest of candidates that fits a card of so many GiB; of about equally fast ones the most precise.

    Raises:
        MemoryLimitError: none does.
    """
    fitting = _fitting(found, card)
    alike = [c for c in fitting if c.total_seconds <= _ALIKE * fitting[0].total_seconds]
    return min(alike, key=lambda c: _drawbacks(c.setting))


def fastest_on_cpu(found: list[Candidate], memory: float) -> Candidate:
    """The fastest of candidates that fits so many GiB of main memory, where the rates of a card say nothing.

    Quantised layers draw more slowly there, int8 even more so than NF4; reading, which is done once, is not felt.

    Raises:
        MemoryLimitError: none does.
    """
    here = [c for c in found if c.setting.offload == "none" and c.setting.batched_guidance]
    return min(_fitting(here, memory), key=lambda c: (_CPU_ORDER.index(c.setting.generation), _drawbacks(c.setting)))


def _fitting(found: list[Candidate], room: float) -> list[Candidate]:
    fitting = [c for c in found if c.needs <= room * GIB]
    if not fitting:
        nearest = min(found, key=lambda c: c.needs)
        raise MemoryLimitError(
            f"nothing fits {room:.4g} GiB: the nearest, {nearest.options}, needs {nearest.needs / GIB:.1f} GiB, "
            f"{nearest.needs / GIB - room:.1f} more (the stage '{_worst(nearest).name}')"
        )
    return fitting


def _worst(candidate: Candidate) -> MemoryStage:
    return max(candidate.stages, key=lambda stage: stage.peak)


def _drawbacks(setting: Setting) -> tuple[int, int, int, bool, bool]:
    """Of equally fast settings: coarse weights are worst, then what depends on the bus, then the seams of tiles."""
    offload = get_args(Offload).index(setting.offload)
    bits = -_BITS[setting.generation], -_BITS[setting.understanding]
    return *bits, offload, setting.tiled, not setting.batched_guidance


def _seconds(network: Network, setting: Setting, size: tuple[int, int]) -> dict[str, float]:
    """The estimate of one picture: reading both prompts, moving weights, and all passes of the generation tower."""
    g, defaults, made = network.generation, network.defaults, weights(network, setting)
    low, high = defaults.cfg_interval
    forwards = defaults.steps * (1 + (high - low) * (defaults.cfg != 1))
    # Branches that pass together share the weights, unpacked and fetched once.
    passes = defaults.steps if setting.batched_guidance else forwards
    tokens, patches = context_tokens(network, size), patches_of(network, size)
    rows = patches + (tokens if g.in_sequence else 0)
    linear = sum(i * o for i, o in g.linears)
    attention = 4 * rows * (patches * (1 + network.references) + tokens) * g.width * g.depth
    operations = 2 * linear * rows + attention + 2 * g.router_parameters * (patches + tokens)
    compute = max(forwards * operations * network.value_bytes / (2 * FLOPS), passes * made.blocks / MEMORY)
    moved = made.blocks * passes / BUS if setting.offload == "blocks" else 0.0
    parts = {
        "reading": 2 * 2 * network.understanding.linear * tokens / FLOPS,
        "drawing": compute,
    }
    if setting.generation == "nf4":
        # Unpacked to bf16 at every pass.
        parts["quantised layers"] = passes * 2.5 * linear / MEMORY
    if setting.generation == "int8":
        # Rounds what goes in and rescales what comes out.
        parts["quantised layers"] = forwards * rows * sum(3 * i + 10 * o for i, o in g.linears) / MEMORY
    if setting.offload != "none":
        rest = made.rest + made.others + (0 if setting.offload == "blocks" else made.blocks)
        parts["towers over the bus"] = (made.understanding + rest) / BUS
    if moved:
        # Blocks are fetched while others compute: only what takes longer is waited for.
        parts["waiting for blocks"] = max(_SHOWS * moved, moved - compute)
    return parts
