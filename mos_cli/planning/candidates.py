"""Settings of a model that fit a GPU, and the fastest of them. Imports no torch.

Time is estimated from three rates and covers what differs between settings: arithmetic, copies of weights over the bus,
and the overhead of quantised layers. Decoding and loading from the disk are left out.
"""

from dataclasses import dataclass
from itertools import product
from typing import get_args

from mos_cli.bundles.adapters import BaseNetwork
from mos_cli.bundles.blueprints import Network
from mos_cli.errors import MemoryLimitError, UsageError
from mos_cli.planning import base_models
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
from mos_cli.planning.rates import BUS, FLOPS, MEMORY

GPU_SIZES = (8, 12, 16, 24)
"""GiB of the GPUs that plans and presets are made for."""
_ALIKE = 1.08
"""The ratio up to which estimates count as equal, so that the higher precision is chosen."""
_NOT_HIDDEN = 0.1
"""The least part of the time to copy blocks that is not hidden by computing: some copies are between steps."""
_CPU_ORDER: tuple[Quant, ...] = ("none", "nf4", "int8")
"""From the fastest on a CPU to the slowest. int8 is larger and slower than NF4, so it is never chosen there."""
_BITS: dict[Quant, int] = {"none": 16, "int8": 8, "nf4": 4}


@dataclass(frozen=True)
class Candidate:
    """A setting with the memory it needs and the estimated time of a picture.

    Args:
        quant: the value of `--quant`: the setting's quantisation without that of the bundle's own weights.
        host: bytes of main memory.
        seconds: parts of the estimate by name, for a picture with a new prompt.
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
        """The peak and the reserve, in bytes."""
        return self.peak + RESERVE

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def options(self) -> str:
        """The options of `mos generate` for this setting."""
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


def candidates(
    network: Network | BaseNetwork, size: tuple[int, int], *, quant: tuple[Quant, Quant] | None = None
) -> list[Candidate]:
    """All settings of a model at a size, from the fastest to the slowest.

    Args:
        quant: only settings with this quantisation; "none" leaves a tower as it is.

    Raises:
        UsageError: the model is quantised already.
    """
    if isinstance(network, BaseNetwork):
        return _base_candidates(network, size, quant)
    towers: tuple[Quant, ...] = get_args(Quant) if quant is None else quant[:1]
    generations: tuple[Quant, ...] = get_args(Quant) if quant is None else quant[1:]
    if network.method is not None:
        if quant is not None and quant[1] != "none":
            raise UsageError(f"{network.ref} is quantised already ({network.method}): --quant {quant[0]},none")
        generations = ("none",)
    tiles = (False, True) if network.autoencoder and network.autoencoder.tiles and max(size) > TILE else (False,)
    batched = (True, False) if network.guided else (True,)
    found = []
    for u, g, offload, tiled, batched_guidance in product(towers, generations, get_args(Offload), tiles, batched):
        setting = Setting(u, network.method or g, offload, tiled, batched_guidance)
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


def _base_candidates(network: BaseNetwork, size: tuple[int, int], quant: tuple[Quant, Quant] | None) -> list[Candidate]:
    found = []
    for setting in base_models.all_settings(network, size, quant):
        u, g = setting.understanding, setting.generation
        found.append(
            Candidate(
                setting=setting,
                quant=u if u == g else f"{u},{g}",
                stages=base_models.stages(network, setting, size),
                host=base_models.host_bytes(network, setting),
                seconds=base_models.seconds(network, setting, size),
            )
        )
    return sorted(found, key=lambda c: (c.total_seconds, c.setting.tiled))


def fastest(found: list[Candidate], gib: float) -> Candidate:
    """The fastest candidate that fits a GPU of `gib` GiB; of about equally fast ones the most precise.

    Raises:
        MemoryLimitError: none fits.
    """
    fitting = _fitting(found, gib)
    alike = [c for c in fitting if c.total_seconds <= _ALIKE * fitting[0].total_seconds]
    return min(alike, key=lambda c: _drawbacks(c.setting))


def fastest_on_cpu(found: list[Candidate], gib: float) -> Candidate:
    """The fastest candidate that fits `gib` GiB of main memory; the rates of a GPU do not apply.

    Quantised layers are slower on a CPU, int8 more so than NF4. The understanding tower runs once and is not counted.

    Raises:
        MemoryLimitError: none fits.
    """
    here = [c for c in found if c.setting.offload == "none" and c.setting.batched_guidance]
    return min(_fitting(here, gib), key=lambda c: (_CPU_ORDER.index(c.setting.generation), _drawbacks(c.setting)))


def _fitting(found: list[Candidate], gib: float) -> list[Candidate]:
    fitting = [c for c in found if c.needs <= gib * GIB]
    if not fitting:
        nearest = min(found, key=lambda c: c.needs)
        raise MemoryLimitError(
            f"nothing fits {gib:.4g} GiB: the nearest, {nearest.options}, needs {nearest.needs / GIB:.1f} GiB, "
            f"{nearest.needs / GIB - gib:.1f} more (the stage '{_worst(nearest).name}')"
        )
    return fitting


def _worst(candidate: Candidate) -> MemoryStage:
    return max(candidate.stages, key=lambda stage: stage.peak)


def _drawbacks(setting: Setting) -> tuple[int, int, int, bool, bool]:
    """A key of equally fast settings, the best first: by precision, then by offloading, then by tiling."""
    offload = get_args(Offload).index(setting.offload)
    bits = -_BITS[setting.generation], -_BITS[setting.understanding]
    return *bits, offload, setting.tiled, not setting.batched_guidance


def _seconds(network: Network, setting: Setting, size: tuple[int, int]) -> dict[str, float]:
    """The estimate for one picture: encoding both prompts, copying weights, and all passes of the generation tower."""
    g, defaults, made = network.generation, network.defaults, weights(network, setting)
    low, high = defaults.cfg_interval
    forwards = defaults.steps * (1 + (high - low) * (network.guided and defaults.cfg != 1))
    # A batch of branches unpacks and copies the weights once.
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
        # Unpacked to bf16 in every pass.
        parts["quantised layers"] = passes * 2.5 * linear / MEMORY
    if setting.generation == "int8":
        # Inputs are rounded, outputs rescaled.
        parts["quantised layers"] = forwards * rows * sum(3 * i + 10 * o for i, o in g.linears) / MEMORY
    if setting.offload != "none":
        rest = made.rest + made.others + (0 if setting.offload == "blocks" else made.blocks)
        parts["towers over the bus"] = (made.understanding + rest) / BUS
    if moved:
        # Blocks are copied while others compute: only the excess is waited for.
        parts["waiting for blocks"] = max(_NOT_HIDDEN * moved, moved - compute)
    return parts
