"""The state bank: all that a generation tower reads while it draws, made once per prompt.

Shapes: B batch, T context tokens, V of them image tokens, R patches of the references, D width, M understanding layers,
J generation blocks, K kept layers. In router_BTR, R is the width of the router.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mos_cli.towers.layers import grid_positions
from mos_cli.towers.router import Route

SIGHT = 4
"""Image tokens of a picture along each side, where they are made by eyes apart from the understanding tower."""
Grid = tuple[int, int]
"""Rows and columns of the image tokens of a picture."""


@dataclass(frozen=True)
class References:
    """The pictures to draw from, with the grids of their image tokens.

    kv holds what every block remembers of them, keys and values [B, R, 2 D], and positions_R3 where that stands. The
    first is the picture that is edited: under_BND is to be laid under the noised patches, each under its own.
    """

    grids: tuple[Grid, ...]
    kv: tuple[Tensor, ...]
    positions_R3: Tensor
    under_BND: Tensor


@dataclass(frozen=True)
class StateBank:
    """A prompt's states, projected once for all steps: mixing rows of the bank equals projecting mixed states.

    bank_BTMD holds every layer at the generation tower's width, router_BTR the router's view of the tokens (None where
    there is no router). mask_BT (True = a real token) is None where nothing is padded, which is always so when drawing.
    Where there are references, the last of the tokens are their image tokens, grid by grid.
    """

    bank_BTMD: Tensor
    router_BTR: Tensor | None
    mask_BT: Tensor | None = None
    references: References | None = None

    def mix(self, route: Route, block: int) -> Tensor:
        """Context of one block, [B, T, D]: the weighted sum of the kept layers of each token."""
        ids_BTK, weights_BTK = route.ids_BTJK[:, :, block], route.weights_BTJK[:, :, block]
        rows_BTKD = self.bank_BTMD.gather(2, ids_BTK[..., None].expand(-1, -1, -1, self.bank_BTMD.shape[-1]))
        return (weights_BTK[..., None].to(rows_BTKD.dtype) * rows_BTKD).sum(dim=2)


def sight_positions(grids: Sequence[Grid], rows: float, columns: float) -> Tensor:
    """Where the image tokens of the references stand on a canvas of rows x columns patches, [V, 3]."""
    cells = [
        grid_positions(*grid, order=-order, spacing=(rows / grid[0], columns / grid[1]))
        for order, grid in enumerate(grids, 1)
    ]
    return torch.cat([torch.zeros(0, 3), *cells])
