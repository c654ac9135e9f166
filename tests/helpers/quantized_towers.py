"""Towers just large enough to be quantised, and comparisons of them."""

from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from mos_cli.towers.generation import GenerationTower
from tests.helpers.tiny_bundle import randomised


def small_tower(**choices: Any) -> GenerationTower:
    """A tower just large enough to be quantised."""
    sizes = {"width": 64, "depth": 2, "heads": 2, "hidden": 64, "router_width": 64, "router_heads": 2}
    return randomised(GenerationTower(**{**sizes, "states_layers": 4, "states_width": 64, **choices}))


def output(tower: GenerationTower) -> Tensor:
    """What a tower makes of fixed inputs."""
    generator = torch.Generator().manual_seed(0)
    layers, width = tower.states_shape
    z, states = (torch.randn(shape, generator=generator) for shape in ((1, 3, 64, 64), (1, 6, layers, width)))
    z, t, states = (tensor.to(tower.device) for tensor in (z, torch.ones(1), states))
    with torch.inference_mode():
        return tower(z, t, tower.project_states(states))[0]


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two networks have the same states, bit by bit."""
    states_a, states_b = a.state_dict(), b.state_dict()
    return states_a.keys() == states_b.keys() and all(
        states_a[name].dtype == states_b[name].dtype and torch.equal(states_a[name].cpu(), states_b[name].cpu())
        for name in states_a
    )


def tensors_of(holder: object) -> list[Tensor]:
    """Every tensor that can be reached through attributes, lists and dicts."""
    found: list[Tensor] = []
    ahead, met = [holder], set()
    while ahead:
        one = ahead.pop()
        if id(one) in met:
            continue
        met.add(id(one))
        if isinstance(one, Tensor):
            # Quantised ones hold others in their attributes.
            found.append(one)
        if isinstance(one, dict):
            ahead += one.values()
        elif isinstance(one, list | tuple):
            ahead += one
        elif not isinstance(one, type | ModuleType | FunctionType):
            ahead += getattr(one, "__dict__", {}).values()
    return found
