"""Power-function moving averages of the weights (EDM2, arXiv 2312.02696, section 3.1 and appendix C)."""

from collections.abc import Mapping
from functools import cache

import numpy as np
import torch
from torch import Tensor

from mos_cli.training.sharding import local_part

WIDTHS = ("0.05", "0.10")
"""The relative widths (sigma_rel) of the averages that are kept; the better one is chosen after training."""


@cache
def gamma_of(width: float) -> float:
    """The exponent for an averaging profile of relative width `width` (equation 126: the root of a cubic)."""
    inverse = width**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


class PowerEMA:
    """Averages of named parameters, one set for each of WIDTHS; sharded as the parameters are.

    After step t an average is beta * average + (1 - beta) * weights, with beta = (1 - 1/t) ** (gamma + 1). The first
    step replaces the initial values.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.averages = {width: {name: p.detach().clone() for name, p in parameters.items()} for width in WIDTHS}

    @torch.no_grad()
    def update(self, parameters: dict[str, Tensor], step: int) -> None:
        """Adds the weights after `step` steps, counted from 1."""
        weights = [local_part(parameter) for parameter in parameters.values()]
        for width, average in self.averages.items():
            share = 1 - (1 - 1 / step) ** (gamma_of(float(width)) + 1)
            torch._foreach_lerp_([local_part(kept) for kept in average.values()], weights, share)  # type: ignore[attr-defined]
