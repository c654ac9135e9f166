"""The bank of a prompt: what its tokens are to the first block, for every slot and layer.

Shapes: Q tokens of the prompt, T text tokens, Z slots, M layers, J blocks, K kept layers, E width of an embedding, D
width of the transformer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mos_cli.adapters.facts import BaseModel
from mos_cli.adapters.text import EncodedText
from mos_cli.towers.router import Route


@dataclass(frozen=True)
class TextBank:
    """The rows of a prompt's tokens.

    Args:
        rows_QZMD: the text that enters the first block if slot z reads layer m, and the others their own layers.
        positions_Q: where the tokens are in the text.
        length: T.
        own_layers: the layer that the base model reads in each slot.
        states_QS: the states at layer 0, for a router.
    """

    rows_QZMD: Tensor
    positions_Q: Tensor
    length: int
    own_layers: tuple[int, ...]
    states_QS: Tensor

    def change(self, ids_QZK: Tensor, weights_QZK: Tensor) -> Tensor:
        """What reading these layers with these weights changes in the text of a block, [Q, D].

        A slot reads its own layer with the rest of the weight, up to 1. The sum is taken in fp32.
        """
        total_QD = torch.zeros(self.rows_QZMD.shape[0], self.rows_QZMD.shape[-1], device=self.rows_QZMD.device)
        for slot, own in enumerate(self.own_layers):
            rows_QMD = self.rows_QZMD[:, slot]
            index_QKD = ids_QZK[:, slot, :, None].expand(-1, -1, rows_QMD.shape[-1])
            moved_QKD = rows_QMD.gather(1, index_QKD).float() - rows_QMD[:, own : own + 1].float()
            total_QD = total_QD + (weights_QZK[:, slot, :, None] * moved_QKD).sum(1)
        return total_QD


def make_bank(base: BaseModel, transformer: nn.Module, encoded: EncodedText, own_layers: tuple[int, ...]) -> TextBank:
    """Runs the transformer's own text path, up to its first block, on every layer in every slot."""
    embeds_TE, positions_Q = encoded.embeds_TE, encoded.positions_Q
    parts_QME = encoded.layers_QME.chunk(len(own_layers), dim=-1)
    own_QE = embeds_TE[positions_Q]
    slots = []
    for slot, part_QME in enumerate(parts_QME):
        width = part_QME.shape[-1]
        rows = []
        for layer in range(part_QME.shape[1]):
            replaced_QE = own_QE.clone()
            replaced_QE[:, slot * width : (slot + 1) * width] = part_QME[:, layer]
            if not base.refines:
                rows.append(base.first_text(transformer, replaced_QE))
                continue
            replaced_TE = embeds_TE.clone()
            replaced_TE[positions_Q] = replaced_QE
            rows.append(base.first_text(transformer, replaced_TE)[positions_Q])
        slots.append(torch.stack(rows, dim=1))
    rows_QZMD = torch.stack(slots, dim=1)
    return TextBank(rows_QZMD, positions_Q, embeds_TE.shape[0], own_layers, encoded.states_QS)


def effective(route: Route, gates_BQJZ: Tensor, own_layers: tuple[int, ...], layers: int) -> Route:
    """What a base model reads under a route and gates: its own layers with 1 - gate, the routed ones with the rest.

    Args:
        route: ids and weights [B, Q, J * Z, K].

    Returns:
        Per block all layers of all slots, best first, [B, Q, J, Z * (K + 1)], with the slot of each. A slot has 1 / Z
        of the weight. Weights are rounded to half precision, as a trace stores them: those of routed layers are the
        ones that `routed` returns.
    """
    slots = len(own_layers)
    ids_BQJZK, weights_BQJZK = routed(route, gates_BQJZ)
    share_BQJZM = torch.zeros(*ids_BQJZK.shape[:-1], layers, device=ids_BQJZK.device)
    share_BQJZM.scatter_add_(-1, ids_BQJZK, weights_BQJZK / slots)
    own_Z = torch.tensor(own_layers, device=ids_BQJZK.device)
    own_BQJZ1 = own_Z[:, None].expand(*ids_BQJZK.shape[:-1], 1)
    rest_BQJZ1 = (1 / slots - weights_BQJZK.sum(-1, keepdim=True) / slots).clamp_min(0)
    # The rounding of the other weights leaves a little, which is nothing.
    rest_BQJZ1 = torch.where(rest_BQJZ1 < 3e-4, 0.0, rest_BQJZ1)
    share_BQJZM.scatter_add_(-1, own_BQJZ1, rest_BQJZ1)
    count = min(slots * (ids_BQJZK.shape[-1] + 1), slots * layers)
    weights, places = share_BQJZM.flatten(-2).topk(count, dim=-1)
    unused = weights == 0
    places = torch.where(unused, places[..., :1], places)
    return Route(places % layers, weights.half().float(), slots_BTJK=places // layers)


def routed(route: Route, gates_BQJZ: Tensor) -> tuple[Tensor, Tensor]:
    """The layers of a route and their weights in a block's text, gate times weight, both [B, Q, J, Z, K].

    Without gradients they are rounded to half precision (as shares of the block), so that a trace has what was read.
    """
    slots = gates_BQJZ.shape[-1]
    ids_BQJZK = route.ids_BTJK.unflatten(2, (-1, slots))
    weights_BQJZK = route.weights_BTJK.unflatten(2, (-1, slots)) * gates_BQJZ[..., None]
    if not weights_BQJZK.requires_grad:
        weights_BQJZK = (weights_BQJZK / slots).half().float() * slots
    return ids_BQJZK, weights_BQJZK
