"""Muon for the matrices inside the blocks, AdamW for everything else, and for the weights of a LoRA."""

import torch
from torch import nn

from mos_cli.training.stages import Curriculum


def build_optimisers(tower: nn.Module) -> list[torch.optim.Optimizer]:
    """The optimisers, with every parameter in exactly one of them; `set_rates` sets their learning rates."""
    muon, adamw = [], []
    for name, parameter in tower.named_parameters():
        if parameter.requires_grad:
            in_block = name.startswith(("blocks.", "router.blocks.")) and name.endswith(".weight")
            matrix = in_block and parameter.ndim == 2 and ".lora_" not in name
            (muon if matrix else adamw).append(parameter)
    optimisers: list[torch.optim.Optimizer] = []
    if muon:
        optimisers.append(torch.optim.Muon(muon, lr=0.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    return [*optimisers, torch.optim.AdamW(adamw, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)]


def start_states(optimisers: list[torch.optim.Optimizer]) -> None:
    """Creates the optimiser state of every parameter, so that all have one to save before their first gradient."""
    for optimiser in optimisers:
        for parameter in (p for group in optimiser.param_groups for p in group["params"]):
            if isinstance(optimiser, torch.optim.Muon):
                optimiser.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
            else:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                optimiser.state[parameter] = {"step": torch.tensor(0.0), **moments}


def set_rates(optimisers: list[torch.optim.Optimizer], rates: tuple[float, float]) -> None:
    """Sets the learning rates of `rates_at` in the optimisers of `build_optimisers`."""
    # A LoRA has AdamW alone.
    for optimiser, rate in zip(optimisers, rates[-len(optimisers) :], strict=True):
        for group in optimiser.param_groups:
            group["lr"] = rate


def rates_at(curriculum: Curriculum, step: int, used: float = 0.0) -> tuple[float, float]:
    """The learning rates of Muon and AdamW at a step; `used` as in `Curriculum.rate`."""
    stage, rate = curriculum.stage_at(step), curriculum.rate(step, used)
    return rate * stage.muon_lr, rate * stage.adamw_lr
