"""Which setting of a model fits a card and is fastest there. Imports no torch.

Time is estimated from three rates and counts what differs between settings: arithmetic, weights over the bus, and what
quantised layers cost beside their products. Decoding and loading from the disk are left out.
"""

from dataclasses import dataclass
from itertools import product
from typing import get_args

from mos_cli.errors import MemoryLimitError, UsageError
from mos_cli.runtime.blueprints import Network
from mos_cli.runtime.memory import (
    GIB,
    RESERVE,
    TILE,
    TOKENS,
    Offload,
    Quant,
    Setting,
    Stage,
    host_bytes,
    stages,
    weights,
)
from mos_cli.runtime.quantising import Method

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
_BITS: dict[Quant, int] = {"none": 16, "int8": 8, "nf4": 4}


@dataclass(frozen=True)
class Candidate:
    """A setting with what it needs and how long a picture takes by estimate.

    Args:
        host: bytes of main memory.
        seconds: parts of the estimate by name, for a picture with a prompt of its own.
    """

    setting: Setting
    stages: tuple[Stage, ...]
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
        u, g = self.setting.understanding, self.setting.generation
        return f"--quant {u if u == g else f'{u},{g}'} --offload {self.setting.offload}"


def parse_quant(text: str) -> tuple[Quant, Quant]:
    """The quantisation of the understanding and the generation tower, from "nf4" or "nf4,none".

    Raises:
        UsageError: the text is neither.
    """
    parts = text.split(",")
    if len(parts) > 2 or any(part not in get_args(Quant) for part in parts):
        raise UsageError(f"--quant {text} is not understood: write none, int8, nf4, or two of them as nf4,none")
    return parts[0], parts[-1]  # type: ignore[return-value]


def methods(quant: str | None) -> tuple[Method | None, Method | None]:
    """What a recipe's `quant` asks of the understanding and the generation tower; None leaves one as it is.

    Raises:
        UsageError: it is not understood.
    """
    first, second = parse_quant(quant or "none")
    return None if first == "none" else first, None if second == "none" else second


def candidates(network: Network, size: tuple[int, int], *, quant: tuple[Quant, Quant] | None = None) -> list[Candidate]:
    """All settings of a model at a size, from the fastest to the slowest.

    Args:
        quant: only this quantisation.

    Raises:
        UsageError: the model is quantised otherwise already.
    """
    towers: tuple[Quant, ...] = get_args(Quant) if quant is None else quant[:1]
    generations: tuple[Quant, ...] = get_args(Quant) if quant is None else quant[1:]
    if network.method is not None:
        if network.method not in generations:
            raise UsageError(f"{network.ref} is quantised already: {network.method}")
        generations = (network.method,)
    tiles = (False, True) if network.autoencoder and network.autoencoder.tiles and max(size) > TILE else (False,)
    found = []
    for u, g, offload, tiled in product(towers, generations, get_args(Offload), tiles):
        setting = Setting(u, g, offload, tiled)
        found.append(
            Candidate(
                setting=setting,
                stages=stages(network, setting, size),
                host=host_bytes(network, setting),
                seconds=_seconds(network, setting, size),
            )
        )
    return sorted(found, key=lambda c: (c.total_seconds, c.setting.tiled))


def fastest(found: list[Candidate], card: float) -> Candidate:
    """The fastest of candidates that fits a card of so many GiB; of about equally fast ones the most precise.

    Raises:
        MemoryLimitError: none does.
    """
    fitting = [c for c in found if c.needs <= card * GIB]
    if not fitting:
        nearest = min(found, key=lambda c: c.needs)
        raise MemoryLimitError(
            f"nothing fits {card:g} GiB: the nearest, {nearest.options}, needs {nearest.needs / GIB:.1f} GiB, "
            f"{nearest.needs / GIB - card:.1f} more (the stage '{_worst(nearest).name}')"
        )
    alike = [c for c in fitting if c.total_seconds <= _ALIKE * fitting[0].total_seconds]
    return min(alike, key=lambda c: _drawbacks(c.setting))


def _worst(candidate: Candidate) -> Stage:
    return max(candidate.stages, key=lambda stage: stage.peak)


def _drawbacks(setting: Setting) -> tuple[int, int, int, bool]:
    """Of equally fast settings: coarse weights are worst, then what depends on the bus, then the seams of tiles."""
    offload = get_args(Offload).index(setting.offload)
    return -_BITS[setting.generation], -_BITS[setting.understanding], offload, setting.tiled


def _seconds(network: Network, setting: Setting, size: tuple[int, int]) -> dict[str, float]:
    """The estimate of one picture: reading both prompts, moving weights, and all passes of the generation tower."""
    g, defaults, made = network.generation, network.defaults, weights(network, setting)
    low, high = defaults.cfg_interval
    forwards = defaults.steps * (1 + (high - low) * (defaults.cfg != 1))
    side = g.patch * (network.autoencoder.factor if network.autoencoder else 1)
    patches = (size[0] // side) * (size[1] // side)
    rows = patches + (TOKENS if g.in_sequence else 0)
    linear = sum(i * o for i, o in g.linears)
    attention = 4 * rows * (patches + TOKENS) * g.width * g.depth
    operations = 2 * linear * rows + attention + 2 * g.router_parameters * (patches + TOKENS)
    compute = forwards * operations / FLOPS
    moved = made.blocks * forwards / BUS if setting.offload == "blocks" else 0.0
    parts = {
        "reading": 2 * 2 * network.understanding.linear * TOKENS / FLOPS,
        "drawing": compute,
    }
    if setting.generation != "none":
        parts["quantised layers"] = _quantised_seconds(g.linears, setting.generation, rows, forwards)
    if setting.offload != "none":
        rest = made.rest + made.others + (0 if setting.offload == "blocks" else made.blocks)
        parts["towers over the bus"] = (made.understanding + rest) / BUS
    if moved:
        # Blocks are fetched while others compute: only what takes longer is waited for.
        parts["waiting for blocks"] = max(_SHOWS * moved, moved - compute)
    return parts


def _quantised_seconds(linears: tuple[tuple[int, int], ...], quant: Quant, rows: int, forwards: float) -> float:
    """NF4 weights are unpacked to bf16 at every pass; int8 rounds what goes in and rescales what comes out."""
    if quant == "nf4":
        return forwards * 2.5 * sum(i * o for i, o in linears) / MEMORY
    return forwards * rows * sum(3 * i + 10 * o for i, o in linears) / MEMORY
