"""Small generation towers of every fusion, and inputs for them.

Shapes: B batch, T context tokens, V image tokens of a picture, M understanding layers, S width of a state, J generation
blocks, K kept layers.
"""

from itertools import product

import torch
from torch import Tensor

from mos_cli.bundles.shapes import IMAGE_GRID
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.layers import EPS
from tests.helpers.tiny_bundle import randomised

B, T, M, S, J, K = 2, 5, 4, 32, 3, 2
WIDTHS = tuple(range(6, 6 + M))
V = IMAGE_GRID * IMAGE_GRID

FIXED = [
    *({"fusion": f, "context": c} for f, c in product(["last", "aligned", "mean"], ["kv", "tokens", "cross"])),
    {"fusion": "last", "context": "joint"},
]
ROUTED = [
    *({"context": context} for context in ("kv", "tokens", "cross")),
    # A single kept layer that is scaled to 1 leaves the router without a gradient.
    {"top_k": 1, "renormalise": False},
    {"top_k": 3},
    {"top_k": M},
    *({"router_inputs": ("tokens", *others)} for others in [("latent",), ("time",), ()]),
    {"routing": "sample"},
    {"routing": "sample", "context": "cross", "router_inputs": ("tokens", "time")},
]


def name_of(variant: dict) -> str:
    """The name of a variant in the ids of tests."""
    return " ".join(str(value) for value in variant.values())


def small_tower(**changes) -> GenerationTower:
    """A tower of J blocks with random weights; `changes` are fields of its config."""
    sizes = {
        "width": 32,
        "depth": J,
        "heads": 2,
        "hidden": 48,
        "router_width": 32,
        "states_layers": M,
        "states_width": S,
    }
    return randomised(GenerationTower(**{**sizes, **changes}))


def inputs(batch: int = B, tokens: int = T) -> tuple[Tensor, Tensor, Tensor]:
    """Noised latents [B, 3, 32, 24], their times [B] and states [B, T, M, S]."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(batch, 3, 32, 24, generator=generator)
    t = torch.rand(batch, generator=generator)
    # Layers of very different scale, as real ones are.
    states = torch.randn(batch, tokens, M, S, generator=generator) * torch.tensor([0.01, 1.0, 30.0, 500.0])[:, None]
    return z, t, states


def slow_norm(x: Tensor) -> Tensor:
    """RMS normalisation of the last dimension, by its formula."""
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
