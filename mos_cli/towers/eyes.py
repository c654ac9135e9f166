"""The eyes: image tokens for an understanding tower that reads only words, one state per layer as its words have.

They are the stages of a frozen EfficientNet-Lite0, each pooled to the same few cells: a token is a cell of the picture,
its first state says what lines are there and its last what things. The network is table 1 of arXiv 1905.11946 without
squeeze-and-excitation, with ReLU6, and with the stem unscaled.

Shapes: B pictures, H x W a picture's size, C channels, V image tokens, M layers, Z widest state.
"""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from mos_cli.runtime.shapes import IMAGE_GRID

SIDE = 32 * IMAGE_GRID
"""Pictures are looked at in this size, at which a cell of the last stage is a token."""
STAGES = (
    # kernel, stride, expansion, channels, blocks
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


class Trunk(nn.Module):
    """EfficientNet-Lite0 up to its head. Names are those of the weights' file."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = nn.Conv2d(3, 32, 3, 2, bias=False)
        self._bn0 = norm(32)
        self._blocks = nn.ModuleList()
        before = 32
        for kernel, stride, expansion, channels, count in STAGES:
            for index in range(count):
                self._blocks.append(_Block(before, channels, kernel, stride if index == 0 else 1, expansion))
                before = channels

    def stages(self, pictures_B3HW: Tensor) -> list[Tensor]:
        """What each stage makes of pictures with values in -1..1, [B, C, H', W'] each."""
        x = F.relu6(self._bn0(_same(self._conv_stem, pictures_B3HW)))
        blocks, seen = iter(self._blocks), []
        for *_, count in STAGES:
            for _ in range(count):
                x = next(blocks)(x)
            seen.append(x)
        return seen


class Eyes(ModelMixin, ConfigMixin):
    """Pictures to image tokens.

    Args:
        layers: states of a token, M, as many as the words' have; they are spread evenly over the stages.
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
    def see(self, pictures_B3HW: Tensor) -> Tensor:
        """Image tokens, row by row, of pictures in -1..1 of any size: [B, V, M, Z], narrow states filled with zeros."""
        sized = F.interpolate(pictures_B3HW, (SIDE, SIDE), mode="bilinear", antialias=True).to(self.dtype)
        # Convolutions of single channels are three times as fast on a CPU with the channels last.
        stages = self.trunk.stages(sized.contiguous(memory_format=torch.channels_last))
        cells = [F.adaptive_avg_pool2d(stage.float(), IMAGE_GRID).flatten(2).mT for stage in stages]
        return torch.stack([F.pad(cells[s], (0, max(self.widths) - cells[s].shape[-1])) for s in self.stages_read], 2)


class _Block(nn.Module):
    """Expand, convolve each channel alone, project."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = before * expansion
        self.expands, self.residual = expansion > 1, stride == 1 and before == after
        if self.expands:
            self._expand_conv = nn.Conv2d(before, wide, 1, bias=False)
            self._bn0 = norm(wide)
        self._depthwise_conv = nn.Conv2d(wide, wide, kernel, stride, groups=wide, bias=False)
        self._bn1 = norm(wide)
        self._project_conv = nn.Conv2d(wide, after, 1, bias=False)
        self._bn2 = norm(after)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        inner = F.relu6(self._bn1(_same(self._depthwise_conv, inner)))
        inner = self._bn2(self._project_conv(inner))
        return x + inner if self.residual else inner


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


def _same(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Pads as TensorFlow does, where the weights were trained: what is odd goes to the right and the bottom."""
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    missing = max((-(-x.shape[-1] // stride) - 1) * stride + kernel - x.shape[-1], 0)
    return conv(F.pad(x, (missing // 2, missing - missing // 2) * 2))
