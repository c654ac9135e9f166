"""The adapter of a base model: a router, and a gate for every block and slot.

Shapes: B = 1 row, Q tokens of a prompt, N patches, P values of a patch, S width of a state, Z slots, M layers, J
blocks.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mos_cli.bundles.adapters import ROUTER, AdapterIndex, RouterShape
from mos_cli.errors import ModelError
from mos_cli.towers.layers import TokenGrid
from mos_cli.towers.router import Router

PREFERENCE = 1e-3
"""Without a router, the logit that a layer loses for each layer between it and the base model's own.

It only orders layers that rules leave equal: of many, the nearest to the own one are kept.
"""


class Adapter(nn.Module):
    """The router and the gates of a base model. A gate of 0 leaves a slot to the base model, 1 to the route.

    Args:
        states_width, patch_values: S, P.
        layers, blocks, slots: M, J, Z.
    """

    def __init__(
        self, shape: RouterShape, *, states_width: int, patch_values: int, layers: int, blocks: int, slots: int
    ) -> None:
        super().__init__()
        self.top_k = shape.top_k
        self.router = Router(
            inputs=("tokens", "latent", "time"),
            per_sample=False,
            width=shape.width,
            depth=shape.depth,
            heads=shape.heads,
            rope_theta=100.0,
            states_width=states_width,
            image_state_width=0,
            patch_values=patch_values,
            layers=layers,
            blocks=blocks * slots,
        )
        self.gates_JZ = nn.Parameter(torch.zeros(blocks, slots))

    def initialise(self, seed: int) -> None:
        """Gives the router random weights; the gates are closed."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.router.modules():
            if isinstance(module, nn.Linear):
                std = 0.02 if module is self.router.head else module.in_features**-0.5
                nn.init.trunc_normal_(module.weight, std=std, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(self.gates_JZ)

    def logits(self, states_QS: Tensor, patches_1NP: Tensor, t: float, grid: TokenGrid) -> Tensor:
        """The router's logits, [1, Q, M, J * Z]."""
        tokens_1QR = self.router.embed(states_QS[None].float())
        time_B = torch.tensor([t], device=tokens_1QR.device)
        return self.router(tokens_1QR, patches_1NP.float(), time_B, (), grid, None)


def untrained_logits(own_layers: Sequence[int], layers: int, blocks: int, device: torch.device) -> Tensor:
    """The logits of an adapter without a router, [1, 1, M, J * Z]: all layers alike, the own one slightly preferred."""
    distance_ZM = torch.stack([torch.arange(layers) - own for own in own_layers]).float()
    # Of two layers at the same distance the later one comes first, so that no order is left open.
    distance_ZM = torch.where(distance_ZM < 0, 0.25 - distance_ZM, distance_ZM)
    return (-PREFERENCE * distance_ZM).T.repeat(1, blocks)[None, None].to(device)


def save_adapter(adapter: Adapter, path: Path) -> None:
    """Writes the weights of an adapter."""
    save_file({name: tensor.contiguous() for name, tensor in adapter.state_dict().items()}, path)


def load_adapter(
    folder: Path, index: AdapterIndex, *, states_width: int, patch_values: int, device: torch.device
) -> Adapter:
    """The trained adapter in a folder; raises ModelError if its weights are damaged or do not fit."""
    assert index.router is not None
    adapter = Adapter(
        index.router,
        states_width=states_width,
        patch_values=patch_values,
        layers=index.layers,
        blocks=index.blocks,
        slots=len(index.own_layers),
    )
    try:
        adapter.load_state_dict(load_file(folder / ROUTER))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"the router in {folder / ROUTER} cannot be loaded: {reason}") from None
    adapter.gates_JZ.data.clamp_(0, 1)
    return adapter.to(device).eval().requires_grad_(False)
