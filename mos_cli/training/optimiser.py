"""Muon for the matrices inside the blocks, AdamW for everything else, and for the weights of a LoRA.

Shapes: N matrices of one shape, R rows, C columns.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mos_cli.training.stages import Curriculum

LARGEST = 2**26
"""The most values of the matrices that are orthogonalised at once."""


class Muon(torch.optim.Muon):
    """PyTorch's Muon without weight decay, its rates matched to AdamW's (arXiv 2502.16982, section 2.2).

    Matrices of one shape are orthogonalised as one batch: few operations for all of them instead of 23 for each.
    The state is PyTorch's. Sharded matrices are orthogonalised one by one, by PyTorch.
    """

    def __init__(self, matrices: Sequence[nn.Parameter]) -> None:
        super().__init__(matrices, lr=0.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Changes the matrices that have gradients."""
        if any(isinstance(matrix, DTensor) for group in self.param_groups for matrix in group["params"]):
            super().step()
            return
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape[matrix.shape].append(matrix)
            for shape, matrices in by_shape.items():
                size = max(1, LARGEST // shape.numel())
                for first in range(0, len(matrices), size):
                    self._change(matrices[first : first + size], group)

    def _change(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        """One step of matrices of one shape."""
        gradients = [matrix.grad for matrix in matrices]
        momenta = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])  # type: ignore[attr-defined]
        updates = torch._foreach_lerp(gradients, momenta, group["momentum"])  # type: ignore[attr-defined]
        update_NRC = orthogonalised(torch.stack(updates), group["ns_coefficients"], group["ns_steps"], group["eps"])
        update_NRC = update_NRC.float().mul_(-0.2 * group["lr"] * math.sqrt(max(update_NRC.shape[1:])))
        torch._foreach_add_(matrices, list(update_NRC.unbind()))  # type: ignore[attr-defined]


def orthogonalised(
    matrices_NRC: Tensor, coefficients: tuple[float, float, float], steps: int, epsilon: float
) -> Tensor:
    """Every matrix with its singular values near 1, in bfloat16, by the Newton-Schulz iteration of PyTorch's Muon."""
    a, b, c = coefficients
    tall = matrices_NRC.shape[1] > matrices_NRC.shape[2]
    # The products with the transpose are smaller for wide matrices.
    X = matrices_NRC.bfloat16().mT if tall else matrices_NRC.bfloat16()
    X = X / torch.linalg.vector_norm(X, dim=(1, 2), keepdim=True).clamp_min(epsilon)
    for _ in range(steps):
        gram = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), X, beta=a)
    return X.mT.contiguous() if tall else X


def build_optimisers(tower: nn.Module, *, capturable: bool = False) -> list[torch.optim.Optimizer]:
    """The optimisers, with every parameter in exactly one of them; `set_rates` sets their learning rates.

    Args:
        capturable: their steps can be part of a CUDA graph, where learning rates are tensors.
    """
    muon, adamw = [], []
    for name, parameter in tower.named_parameters():
        if parameter.requires_grad:
            in_block = name.startswith(("blocks.", "router.blocks.")) and name.endswith(".weight")
            matrix = in_block and parameter.ndim == 2 and ".lora_" not in name
            (muon if matrix else adamw).append(parameter)
    optimisers: list[torch.optim.Optimizer] = []
    if muon:
        optimisers.append(Muon(muon))
    # Of the kinds that can be captured, the fused one takes a learning rate that is a tensor on every device.
    kind = {"capturable": True, "fused": True} if capturable else {}
    return [*optimisers, torch.optim.AdamW(adamw, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, **kind)]


def start_states(optimisers: list[torch.optim.Optimizer]) -> None:
    """Creates the optimiser state of every parameter, so that all have one to save before their first gradient."""
    for optimiser in optimisers:
        for parameter in (p for group in optimiser.param_groups for p in group["params"]):
            if isinstance(optimiser, torch.optim.Muon):
                optimiser.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
            else:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                counts_on = parameter.device if optimiser.defaults["capturable"] else None
                optimiser.state[parameter] = {"step": torch.zeros((), device=counts_on), **moments}


def set_rates(optimisers: list[torch.optim.Optimizer], rates: Sequence[float | Tensor]) -> None:
    """Sets the learning rates of `rates_at` in the optimisers of `build_optimisers`."""
    # A LoRA has AdamW alone.
    for optimiser, rate in zip(optimisers, rates[-len(optimisers) :], strict=True):
        for group in optimiser.param_groups:
            group["lr"] = rate


def rates_at(curriculum: Curriculum, step: int, used: float = 0.0) -> tuple[float, float]:
    """The learning rates of Muon and AdamW at a step; `used` as in `Curriculum.rate`."""
    stage, rate = curriculum.stage_at(step), curriculum.rate(step, used)
    return rate * stage.muon_lr, rate * stage.adamw_lr
