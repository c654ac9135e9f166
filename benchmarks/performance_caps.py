"""A picture of MoS-L under a hard memory cap, in the setting that the plan chooses for it, stage by stage."""

import time
from collections.abc import Callable
from typing import Any

import performance_networks as networks
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from mos_cli.inference.offload import Offloader
from mos_cli.inference.profiling import PeakMemory
from mos_cli.planning.candidates import candidates, fastest
from mos_cli.planning.memory import GIB, Quant, Setting
from mos_cli.quantization.method import Method
from mos_cli.sampling.guidance import NEGATIVE, POSITIVE, Guidance
from mos_cli.sampling.sampler import make_sigmas, sample
from mos_cli.towers.attention import choose_attention
from mos_cli.utils.validation import DEFAULT_SOLVER


class Stages:
    """Seconds of every stage, and the memory at its peak, in bytes: all that the device holds, what was there included.

    On a CPU it is what the process grew by within the stage.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.bytes: dict[str, int] = {}

    def run(self, name: str, action: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        with PeakMemory(self.device) as memory, torch.no_grad():
            made = action()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
        self.bytes[name] = max(self.bytes.get(name, 0), memory.bytes)
        return made


def draw_under(
    gib: int, plan: networks.Network, network: networks.Network, device: torch.device, outside: float | None = None
) -> dict[str, Any]:
    """One picture under a memory limit: whether it fits, and the plan compared with the measurement.

    Args:
        plan: the model whose setting is taken.
        network: the model that draws: the same, or a small one of its kind.
        outside: the GiB of the limit that the allocator does not have; all memory that others use if None.
    """
    best, stages = fastest(candidates(plan, plan.canvas.native), gib), Stages(device)
    networks.free(device)
    if device.type == "cuda":
        _cap(gib * GIB, device, None if outside is None else outside * GIB)
    laid = {"setting": best.options, "tiled": best.setting.tiled, "batched_guidance": best.setting.batched_guidance}
    row = {"cap_gib": gib, **laid, "planned_gib": best.peak / GIB}
    try:
        picture = _draw(network, best.setting, stages)
    except torch.OutOfMemoryError as error:
        return {**row, "passes": False, "stopped_after": list(stages.seconds), "why": str(error).split(".")[0]}
    finally:
        networks.free(device)
    steps = network.defaults.steps
    return {
        **row,
        "measured_gib": max(stages.bytes[name] for name in ("encode", "bank", "sample", "decode")) / GIB,
        "loading_gib": stages.bytes["load"] / GIB,
        "passes": True,
        "size": list(picture.shape[-2:]),
        "steps": steps,
        "step_seconds": stages.seconds["sample"] / steps,
        "picture_seconds": sum(stages.seconds.values()) - stages.seconds["load"],
        "stage_seconds": stages.seconds,
        "stage_gib": {name: size / GIB for name, size in stages.bytes.items()},
        "planned_stage_gib": {stage.name: stage.peak / GIB for stage in best.stages},
    }


def _cap(size: int, device: torch.device, outside: float | None = None) -> None:
    """Memory outside of the allocator, of the driver and others, counts, as on a GPU of that size."""
    unused, whole = torch.cuda.mem_get_info(device)
    if outside is None:
        outside = whole - unused - torch.cuda.memory_reserved(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, (size - outside) / whole), device.index)


def _draw(network: networks.Network, setting: Setting, stages: Stages) -> Tensor:
    """The picture [1, 3, height, width]; towers come and go as in `load_parts` and `MoSPipeline`, by the same code."""
    device, defaults, offloader = stages.device, network.defaults, Offloader(stages.device, setting.offload)

    def load() -> tuple[Any, ...]:
        reader = networks.understanding_tower(network.understanding, device, _method(setting.understanding))
        offloader.add_understanding(reader)  # type: ignore[arg-type]
        tower = networks.generation_tower(network.generation, offloader.loading, _method(setting.generation))
        with offloader.briefly_onloaded(tower):
            choose_attention(tower, "auto")
        offloader.add_tower(tower)
        autoencoder = networks.autoencoder(network, device)
        if setting.tiled:
            autoencoder.enable_tiling()
        offloader.add_other(autoencoder)
        return reader, tower, autoencoder

    def read() -> list[Tensor]:
        with offloader.understanding_onloaded():
            return [networks.read_states(reader) for _ in range(2)]

    def decode() -> Tensor:
        with offloader.others_onloaded():
            return autoencoder.decode(z.bfloat16(), return_dict=False)[0]

    reader, tower, autoencoder = stages.run("load", load)
    states = stages.run("encode", read)
    banks = stages.run("bank", lambda: [tower.project_states(states.pop(0)) for _ in range(2)])
    noise, branches = networks.latents(network, device), {POSITIVE: banks[0], NEGATIVE: banks[1]}
    sigmas = make_sigmas(FlowMatchEulerDiscreteScheduler(), defaults.steps)
    guidance = Guidance(defaults.cfg, defaults.cfg_interval)
    arguments: dict[str, Any] = {"sigmas": sigmas, "solver": DEFAULT_SOLVER, "guidance": guidance}
    arguments["batched_guidance"] = setting.batched_guidance
    z = stages.run("sample", lambda: sample(tower, noise, branches, **arguments))
    return stages.run("decode", decode)


def _method(quant: Quant) -> Method | None:
    return None if quant == "none" else quant
