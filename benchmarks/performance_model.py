"""MoS-L ready to be timed, and how time is taken.

Shapes: B pictures, C channels, H x W the latent's size.
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import performance_networks as networks
import torch
from diffusers.hooks.hooks import HookRegistry
from torch import Tensor

from mos_cli.inference.profiling import Clock
from mos_cli.planning.candidates import GPU_SIZES
from mos_cli.planning.memory import TOKENS
from mos_cli.quantization.method import Method
from mos_cli.sampling.graphs import HOOK, CudaCapture, StepGraphs
from mos_cli.sampling.guidance import NEGATIVE, POSITIVE, Branches
from mos_cli.towers.attention import choose_attention
from mos_cli.towers.bank import StateBank
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.router import Route

Row = dict[str, Any]
SHORT = 8
"""Tokens of the negative prompt, about those of an empty one in a template."""


@dataclass(frozen=True)
class Run:
    """Where and how often to measure, and the memory caps in GiB, as `draw_under` has them."""

    device: torch.device
    rounds: int
    tiny: bool
    caps: tuple[int, ...] = GPU_SIZES
    outside: float | None = None


class MoSL:
    """MoS-L's generation tower, a bank and noise: ready for a forward, or for a step with guidance.

    Args:
        scale: the side of the latent, in that of a 1024 px picture: 2 makes 4,096 tokens instead of 1,024.
    """

    def __init__(self, run: Run, method: Method | None = None, *, scale: int = 1) -> None:
        self.network = networks.mos_l(tiny=run.tiny)
        self.run, self.scale = run, scale
        self.tower = networks.generation_tower(self.network.generation, run.device, method)
        self.attention = choose_attention(self.tower, "auto")
        self.bank = networks.bank(self.network, self.tower, run.device)
        self.z_BCHW = networks.latents(self.network, run.device, scale=scale)
        self.t_B = torch.full((1,), 0.5, device=run.device)

    @property
    def patches(self) -> int:
        """The tokens of the picture."""
        return self.z_BCHW.shape[-1] * self.z_BCHW.shape[-2]

    def banks(self, tokens: int) -> dict[str, StateBank]:
        """Of both branches: a prompt of `tokens` tokens, and a short one."""
        counts = {POSITIVE: tokens, NEGATIVE: SHORT}
        return {name: networks.bank(self.network, self.tower, self.run.device, count) for name, count in counts.items()}

    @torch.inference_mode()
    def forward(self, route: Route | None = None) -> tuple[Tensor, Route]:
        """The prediction and the route: the router's, or the one that is given."""
        return self.tower(self.z_BCHW, self.t_B, self.bank, steering=route)

    def times(self, route: Route | None = None) -> Row:
        """Seconds of a forward, eager and, on a GPU, replayed as a CUDA graph; or why it is not."""
        forward = partial(self.forward, route)
        times: Row = {"eager_seconds": seconds(forward, self.run)}
        if self.run.device.type == "cuda":
            with replayed(self.tower, self.run.device, True) as passes:
                took = seconds(forward, self.run)
            assert passes is not None
            times |= {"why": passes.failure} if passes.failure else {"graph_seconds": took}
        return times

    def step(
        self, tokens: int = TOKENS, *, batched_guidance: bool = True, bucket: int | None = None
    ) -> Callable[[], Tensor]:
        """What predicts both branches of a step, [2, C, H, W]."""
        banks = self.banks(tokens)
        predict = Branches(self.tower, [banks], batched_guidance=batched_guidance, bucket=bucket)

        @torch.inference_mode()
        def predicted() -> Tensor:
            x_hats, _ = predict(tuple(banks), self.z_BCHW, 0.5, lambda picture, name: None)
            return torch.cat([x_hats[name] for name in banks])

        return predicted


@contextmanager
def replayed(tower: GenerationTower, device: torch.device, cuda_graph: bool) -> Iterator[StepGraphs | None]:
    """Passes are replayed as CUDA graphs within the context, or none."""
    if not cuda_graph:
        yield None
        return
    yield StepGraphs(CudaCapture(device)).add_to(tower)
    HookRegistry.check_if_exists_or_initialize(tower).remove_hook(HOOK, recurse=False)


def seconds(action: Callable[[], object], run: Run) -> float:
    """The median time of an action on the device, after two that warm up."""
    clock, pairs = Clock(run.device), []
    for _ in range(run.rounds + 2):
        began = clock.now()
        action()
        pairs.append((began, clock.now()))
    return statistics.median(clock.between(*pair) for pair in pairs[2:])


def matmul_rate(run: Run) -> float:
    """Operations per second of a large product in bf16."""
    side = 256 if run.tiny else 8192
    a, b = (torch.randn(side, side, device=run.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / seconds(lambda: a @ b, run)


def difference(said: Tensor, expected: Tensor) -> float:
    """The largest of the rows' differences, relative to the norm of the expected result."""
    rows = zip(said, expected, strict=True)
    return max(((one - other).norm() / other.norm()).item() for one, other in rows)
