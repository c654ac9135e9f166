"""Kernel Inception Distance (arXiv 1801.01401): the distance of two sets of pictures, by their features.

Shapes: N pictures of a set, F features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SUBSETS = 100
SUBSET_SIZE = 200


@dataclass(frozen=True)
class Kid:
    """Mean and standard deviation of the unbiased squared MMD over random subsets."""

    mean: float
    spread: float
    subset: int


def kid(drawn_NF: Tensor, true_NF: Tensor, *, subsets: int = SUBSETS, size: int = SUBSET_SIZE, seed: int = 0) -> Kid:
    """Compares random subsets of two sets in which row i is a picture of the same prompt.

    Two compared subsets have no prompt in common, since pictures of one prompt resemble each other. So a subset has at
    most half of the prompts.
    """
    assert len(drawn_NF) == len(true_NF)
    size = min(size, len(drawn_NF) // 2)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(drawn_NF), generator=generator) for _ in range(subsets)]
    drawn_NF, true_NF = drawn_NF.double(), true_NF.double()
    distances = torch.stack([squared_mmd(drawn_NF[order[:size]], true_NF[order[size : 2 * size]]) for order in orders])
    return Kid(float(distances.mean()), float(distances.std()), size)


def squared_mmd(a_NF: Tensor, b_NF: Tensor) -> Tensor:
    """The unbiased estimate of the squared MMD of two sets of one size, with the kernel (x y / F + 1)^3."""
    count = len(a_NF)
    within = sum(_kernel(x, x).fill_diagonal_(0).sum() for x in (a_NF, b_NF)) / (count * (count - 1))
    return within - 2 * _kernel(a_NF, b_NF).mean()


def _kernel(a_NF: Tensor, b_NF: Tensor) -> Tensor:
    return (a_NF @ b_NF.T / a_NF.shape[1] + 1) ** 3
