"""Muon for the matrices inside the blocks, AdamW for everything else, one schedule for both."""

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from mos_cli.training.recipe import TrainTable


def build_optimisers(tower: nn.Module, train: TrainTable) -> list[torch.optim.Optimizer]:
    """Puts every parameter into exactly one group."""
    muon, adamw = [], []
    for name, parameter in tower.named_parameters():
        in_block = name.startswith(("blocks.", "router.blocks.")) and name.endswith(".weight")
        (muon if in_block and parameter.ndim == 2 else adamw).append(parameter)
    assert len(muon) + len(adamw) == len(list(tower.parameters()))
    return [
        torch.optim.Muon(muon, lr=train.muon_lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(adamw, lr=train.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def build_schedule(optimiser: torch.optim.Optimizer, train: TrainTable) -> LambdaLR:
    """Linear warm-up, constant, then linear decay to 0 over the last part of the run."""

    def factor(step: int) -> float:
        left = (train.steps - step) / (train.decay * train.steps)
        return max(0.0, min(1.0, (step + 1) / max(1, train.warmup), left))

    return LambdaLR(optimiser, factor)
