"""The training objective as one module, which launchers wrap for many processes or for sharding.

Shapes: B batch, T context tokens, V image tokens, M understanding layers, S width of a state, Z widest state of an
image token, J generation blocks, K kept layers, C channels, H x W the latent's size.
"""

from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mos_cli.sampling.flow import velocity_loss
from mos_cli.towers.bank import Grid, References, StateBank
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.router import Route
from mos_cli.training.batches import Batch

CHANGE = 0.1
"""The least difference of a latent's value that counts as changed by an edit."""


class Objective(nn.Module):
    """From a batch to the loss and the use of the layers by the routes, [J, M]; the shares of a block sum to 1.

    Args:
        epsilon: probability of exploring a random route.
        teacher: the frozen network whose guided prediction the tower learns, instead of the clean image (distillation
            of guidance, arXiv 2210.03142, section 3.1).
    """

    _no_split_modules: ClassVar = GenerationTower._no_split_modules

    def __init__(self, tower: GenerationTower, epsilon: float, teacher: GenerationTower | None = None) -> None:
        super().__init__()
        self.tower, self.epsilon, self.teacher = tower, epsilon, teacher
        self._compute: Any = self._uncompiled

    def compile_whole(self) -> None:
        """Compiles the computation as one graph, for static shapes."""
        self._compute = torch.compile(self._uncompiled, dynamic=False)

    def compile_blocks(self) -> None:
        """Compiles block by block, as sharding needs it, which gathers the weights of a block for its call."""
        for block in self.tower.blocks:
            block.compile(dynamic=False)

    def forward(self, batch: Batch, *, validate: bool = False) -> tuple[Tensor, Tensor]:
        """With `validate`, without random routes, and not compiled: held-out pictures have shapes of their own."""
        compute = partial(self._uncompiled, validate=True) if validate else self._compute
        return compute(
            batch.z0_BCHW,
            batch.z_BCHW,
            batch.t_B,
            batch.states_BTMS,
            batch.mask_BT,
            batch.references_BCHW,
            batch.image_states_BVMZ,
            batch.grid,
            batch.guidance_B,
            batch.empty_BTMS,
            batch.empty_mask_BT,
        )

    def _uncompiled(
        self,
        z0_BCHW: Tensor,
        z_BCHW: Tensor,
        t_B: Tensor,
        states_BTMS: Tensor,
        mask_BT: Tensor,
        references_BCHW: Tensor | None,
        image_states_BVMZ: Tensor | None,
        grid: Grid,
        guidance_B: Tensor | None,
        empty_BTMS: Tensor | None,
        empty_mask_BT: Tensor | None,
        validate: bool = False,
    ) -> tuple[Tensor, Tensor]:
        references, importance, target = _references(self.tower, references_BCHW, grid), 1.0, z0_BCHW
        bank = _bank(self.tower, states_BTMS, mask_BT, references, image_states_BVMZ)
        if references_BCHW is not None:
            importance = importance_of_change(z0_BCHW, references_BCHW)
        if self.teacher is not None:
            assert guidance_B is not None
            assert empty_BTMS is not None
            assert empty_mask_BT is not None
            self.teacher.patch_spacing = self.tower.patch_spacing
            with torch.no_grad():
                pictures = _references(self.teacher, references_BCHW, grid), image_states_BVMZ
                words = _bank(self.teacher, states_BTMS, mask_BT, *pictures)
                without = _bank(self.teacher, empty_BTMS, empty_mask_BT, *pictures)
                x_positive, x_negative = (self.teacher(z_BCHW, t_B, each)[0] for each in (words, without))
                target = torch.lerp(x_negative, x_positive, guidance_B[:, None, None, None])
        epsilon = 0.0 if validate else self.epsilon
        x_hat, route = self.tower(z_BCHW, t_B, bank, epsilon=epsilon, guidance_B=guidance_B)
        assert isinstance(bank.padding, Tensor)
        return velocity_loss(x_hat, target, t_B, importance), layer_use(route, bank.padding, states_BTMS.shape[2])


def _references(tower: GenerationTower, references_BCHW: Tensor | None, grid: Grid) -> References | None:
    return None if references_BCHW is None else tower.cache_references([references_BCHW], [grid])


def _bank(
    tower: GenerationTower,
    states_BTMS: Tensor,
    mask_BT: Tensor,
    references: References | None,
    image_states_BVMZ: Tensor | None,
) -> StateBank:
    """The state bank of captions, with the pictures before an edit."""
    bank = tower.project_states(states_BTMS, mask_BT)
    if references is None:
        return bank
    if image_states_BVMZ is None:
        return replace(bank, references=references)
    return tower.add_image_tokens(bank, image_states_BVMZ, references)


def importance_of_change(z0_BCHW: Tensor, before_BCHW: Tensor) -> Tensor:
    """The weight of each place of an edit in the loss, [B, 1, H, W]: 1 where nothing changes.

    Changed places have the weight 1 + log2(whole / part), so that small changes count (UniWorld-V1, arXiv 2506.03147).
    """
    changed_B1HW = ((z0_BCHW - before_BCHW).abs().amax(dim=1, keepdim=True) > CHANGE).float()
    part_B111 = changed_B1HW.mean(dim=(1, 2, 3), keepdim=True)
    return 1 - changed_B1HW * part_B111.clamp_min(1e-6).log2()


def layer_use(route: Route, mask_BT: Tensor, layers: int) -> Tensor:
    """The share of each layer among the choices of each block, [J, M], without padding."""
    ids_BTJK = route.ids_BTJK
    counted = mask_BT[:, :, None, None].expand_as(ids_BTJK).float()
    # Sums by index: selecting by mask or bincount would synchronise with the GPU.
    use_JM = counted.new_zeros(ids_BTJK.shape[2], layers)
    use_JM = use_JM.scatter_add(1, ids_BTJK.permute(2, 0, 1, 3).flatten(1), counted.permute(2, 0, 1, 3).flatten(1))
    return use_JM / use_JM.sum(dim=1, keepdim=True)
