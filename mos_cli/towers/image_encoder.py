"""The image encoder: image tokens for an understanding tower without vision, with one state per layer as words have.

The states are the stages of a frozen EfficientNet-Lite0, each pooled to the same grid of cells. A token is a cell of
the picture. Early states describe edges, late ones objects.

Shapes: B pictures, H x W a picture's size, C channels, V image tokens, M layers, Z widest state.
"""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from mos_cli.bundles.shapes import IMAGE_GRID
from mos_cli.towers.efficientnet import STAGES, Trunk

SIDE = 32 * IMAGE_GRID
"""Side in pixels to which pictures are scaled; at this size a cell of the last stage is a token."""


class ImageEncoder(ModelMixin, ConfigMixin):
    """Turns pictures into image tokens.

    Args:
        layers: number of states of a token, M, equal to that of words; they are spread evenly over the stages.
    """

    @register_to_config
    def __init__(self, *, layers: int = len(STAGES)) -> None:
        super().__init__()
        self.trunk = Trunk()
        self.stages_read = [round(layer * (len(STAGES) - 1) / max(1, layers - 1)) for layer in range(layers)]
        self.eval().requires_grad_(False)

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each of the M states."""
        return tuple(STAGES[stage][3] for stage in self.stages_read)

    @torch.no_grad()
    def encode_images(self, pictures_B3HW: Tensor) -> Tensor:
        """Image tokens, row by row, of pictures in -1..1 of any size: [B, V, M, Z], narrow states padded with zeros."""
        # The dtype that diffusers gives goes through all modules each time.
        dtype = self.trunk._conv_stem.weight.dtype
        sized = F.interpolate(pictures_B3HW, (SIDE, SIDE), mode="bilinear", antialias=True).to(dtype)
        # Depthwise convolutions are three times as fast on a CPU with the channels last.
        stages = self.trunk.stages(sized.contiguous(memory_format=torch.channels_last))
        cells = [F.adaptive_avg_pool2d(stage.float(), IMAGE_GRID).flatten(2).mT for stage in stages]
        states = sized.new_zeros(len(sized), IMAGE_GRID**2, len(self.widths), max(self.widths), dtype=torch.float32)
        for layer, (stage, width) in enumerate(zip(self.stages_read, self.widths, strict=True)):
            states[:, :, layer, :width] = cells[stage]
        return states
