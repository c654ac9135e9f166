"""The state bank: what the generation tower reads of a prompt and its pictures, computed once for all steps.

Shapes: B batch, T context tokens, V of them image tokens, R patches of the references, D width, M understanding layers,
J generation blocks, K kept layers. In router_BTR, R is the width of the router.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mos_cli.towers.layers import Padding, TokenGrid, VariableLengths
from mos_cli.towers.router import Route

Grid = tuple[int, int]
"""Rows and columns of the image tokens of a picture."""


@dataclass(frozen=True)
class References:
    """Reference pictures, with the grids of their image tokens. The first is the picture that is edited.

    `kv` has their cached keys and values for every block, [B, R, 2 D], and `layout` the positions of these.
    `reference_BND` is the projected latent of the first; it is added to the noised patches, patch by patch.
    """

    grids: tuple[Grid, ...]
    kv: tuple[Tensor, ...]
    layout: tuple[TokenGrid, ...]
    reference_BND: Tensor

    @property
    def tokens(self) -> int:
        """The number of image tokens."""
        return sum(rows * columns for rows, columns in self.grids)


@dataclass(frozen=True)
class StateBank:
    """The hidden states of a prompt, projected once. Mixing rows of the bank equals projecting mixed states.

    `bank_BTMD` holds every layer at the generation tower's width, `router_BTR` the router's input for the tokens (None
    where there is no router). With references, the last tokens are their image tokens, grid by grid. `scale_BT` are
    the weights of the tokens in the prompt, by which their contexts are multiplied; None where all are 1.
    """

    bank_BTMD: Tensor
    router_BTR: Tensor | None
    padding: Padding = None
    references: References | None = None
    scale_BT: Tensor | None = None

    def mix(self, route: Route) -> Tensor:
        """The contexts of all blocks, [B, T, J, D]: the weighted sum of the kept layers of each token.

        One product reads the bank once for all blocks; layers that are not kept have a weight of 0.
        """
        weights_BTJM = route.weights_BTJK.new_zeros((*route.ids_BTJK.shape[:3], self.bank_BTMD.shape[2]))
        # A route may name a layer twice, with a weight of 0.
        weights_BTJM = weights_BTJM.scatter_add(-1, route.ids_BTJK, route.weights_BTJK)
        return weights_BTJM.to(self.bank_BTMD.dtype) @ self.bank_BTMD


def join(banks: Sequence[StateBank], bucket: int | None = None) -> StateBank:
    """The banks of several rows, guidance branches of one picture or more, as one bank with a row for each.

    The rows have the same references, or none.

    Shorter prompts are padded with zeros; image tokens stay the last.

    Args:
        bucket: pad to a multiple of so many tokens, with a mask where there is padding. By default to the longest row,
            without a mask.
    """
    references, router_inputs = banks[0].references, [bank.router_BTR for bank in banks]
    image_tokens = 0 if references is None else references.tokens
    padding = VariableLengths(tuple(bank.bank_BTMD.shape[1] - image_tokens for bank in banks))
    if bucket is not None:
        padding = replace(padding, bucket=-(-padding.longest // bucket) * bucket)
        if not padding.equal:
            real = [bank.bank_BTMD.new_ones(bank.bank_BTMD.shape[:2], dtype=torch.bool) for bank in banks]
            padding = replace(padding, mask_BL=padding.join(real, fill=False))
    if references is not None:
        references = replace(references, kv=tuple(kv.expand(len(banks), -1, -1) for kv in references.kv))
    scale_BT = None
    if any(bank.scale_BT is not None for bank in banks):
        ones = [bank.bank_BTMD.new_ones(bank.bank_BTMD.shape[:2], dtype=torch.float32) for bank in banks]
        scales = [one if bank.scale_BT is None else bank.scale_BT for bank, one in zip(banks, ones, strict=True)]
        scale_BT = padding.join(scales, fill=1)
    return StateBank(
        padding.join([bank.bank_BTMD for bank in banks]),
        None if router_inputs[0] is None else padding.join(router_inputs),  # type: ignore[arg-type]
        padding,
        references,
        scale_BT,
    )


def image_layout(grids: Sequence[Grid], rows: float, columns: float) -> tuple[TokenGrid, ...]:
    """The positions of the references' image tokens on a canvas of rows x columns patches."""
    return tuple(
        TokenGrid(*grid, order=-order, spacing=(rows / grid[0], columns / grid[1]))
        for order, grid in enumerate(grids, 1)
    )
