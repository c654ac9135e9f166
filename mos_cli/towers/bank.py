"""The state bank: all that a generation tower reads while it draws, made once per prompt.

Shapes: B batch, T context tokens, V of them image tokens, R patches of the references, D width, M understanding layers,
J generation blocks, K kept layers. In router_BTR, R is the width of the router.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from mos_cli.towers.layers import Cells, Padding, VariableLengths
from mos_cli.towers.router import Route

Grid = tuple[int, int]
"""Rows and columns of the image tokens of a picture."""


@dataclass(frozen=True)
class References:
    """The pictures to draw from, with the grids of their image tokens.

    kv holds what every block remembers of them, keys and values [B, R, 2 D], and places where that stands. The first is
    the picture that is edited: under_BND is to be laid under the noised patches, each under its own.
    """

    grids: tuple[Grid, ...]
    kv: tuple[Tensor, ...]
    places: tuple[Cells, ...]
    under_BND: Tensor

    @property
    def tokens(self) -> int:
        """The number of image tokens."""
        return sum(rows * columns for rows, columns in self.grids)


@dataclass(frozen=True)
class StateBank:
    """A prompt's states, projected once for all steps: mixing rows of the bank equals projecting mixed states.

    bank_BTMD holds every layer at the generation tower's width, router_BTR the router's view of the tokens (None where
    there is no router). Where there are references, the last of the tokens are their image tokens, grid by grid.
    """

    bank_BTMD: Tensor
    router_BTR: Tensor | None
    padding: Padding = None
    references: References | None = None

    def mix(self, route: Route, block: int) -> Tensor:
        """Context of one block, [B, T, D]: the weighted sum of the kept layers of each token."""
        ids_BTK, weights_BTK = route.ids_BTJK[:, :, block], route.weights_BTJK[:, :, block]
        rows_BTKD = self.bank_BTMD.gather(2, ids_BTK[..., None].expand(-1, -1, -1, self.bank_BTMD.shape[-1]))
        return (weights_BTK[..., None].to(rows_BTKD.dtype) * rows_BTKD).sum(dim=2)


def join(banks: Sequence[StateBank]) -> StateBank:
    """The banks of a picture's branches, which share their references or have none, as one with a row for each.

    Shorter prompts are padded with zeros; image tokens stay the last.
    """
    references, seen = banks[0].references, [bank.router_BTR for bank in banks]
    sight = 0 if references is None else references.tokens
    padding = VariableLengths(tuple(bank.bank_BTMD.shape[1] - sight for bank in banks))
    if references is not None:
        references = replace(references, kv=tuple(kv.expand(len(banks), -1, -1) for kv in references.kv))
    return StateBank(
        padding.join([bank.bank_BTMD for bank in banks]),
        None if seen[0] is None else padding.join(seen),  # type: ignore[arg-type]
        padding,
        references,
    )


def image_layout(grids: Sequence[Grid], rows: float, columns: float) -> tuple[Cells, ...]:
    """Where the image tokens of the references stand on a canvas of rows x columns patches."""
    return tuple(
        Cells(*grid, order=-order, spacing=(rows / grid[0], columns / grid[1])) for order, grid in enumerate(grids, 1)
    )
