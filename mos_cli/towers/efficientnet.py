"""EfficientNet-Lite0 without its head, and the source of its weights.

The network is table 1 of arXiv 1905.11946 without squeeze-and-excitation, with ReLU6, and with the stem unscaled.

Shapes: B pictures, H x W a picture's size, C channels.
"""

from pathlib import Path
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mos_cli.bundles.specs import TowerSpec
from mos_cli.utils.folders import models_folder
from mos_cli.utils.validation import read_json

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
    """EfficientNet-Lite0 without its head. Names are those of the weights file."""

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
        """The output of each stage for pictures in -1..1, each [B, C, H', W']."""
        x = F.relu6(self._bn0(_same(self._conv_stem, pictures_B3HW)))
        blocks, outputs = iter(self._blocks), []
        for *_, count in STAGES:
            for _ in range(count):
                x = next(blocks)(x)
            outputs.append(x)
        return outputs


class _Block(nn.Module):
    """Expansion, depthwise convolution, projection."""

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
        inner = F.relu6(self._bn0(self._expand_conv(x)), inplace=True) if self.expands else x
        inner = F.relu6(self._bn1(_same(self._depthwise_conv, inner)), inplace=True)
        inner = self._bn2(self._project_conv(inner))
        return x + inner if self.residual else inner


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


def _same(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Pads as TensorFlow does, with which the weights were trained: an odd pixel goes to the right and the bottom."""
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    missing = max((-(-x.shape[-1] // stride) - 1) * stride + kernel - x.shape[-1], 0)
    padding, odd = divmod(missing, 2)
    if odd:
        x, padding = F.pad(x, (padding, padding + 1) * 2), 0
    return F.conv2d(x, conv.weight, conv.bias, stride, padding, groups=conv.groups)


class FeaturesSpec(TowerSpec):
    """The file of the network's weights, fetched and verified like an understanding tower.

    It is a pickle, which bundles and towers may not contain. After its sha256 is checked it is read with torch's
    weights-only reader, which builds only tensors.
    """

    schema_: Literal["mos-features/1"] = Field(alias="schema")  # type: ignore[assignment]
    format: Literal["pth"]  # type: ignore[assignment]

    @model_validator(mode="after")
    def _known_files(self) -> Self:
        if len(self.files) != 1:
            raise ValueError("the features come from a single file")
        return self


def features_spec() -> FeaturesSpec:
    """The description of the weights file."""
    return read_json(FeaturesSpec, models_folder() / "judge" / "efficientnet-lite0.json")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights in `folder`, without the classifier."""
    (name,) = features_spec().files
    weights = torch.load(folder / name, map_location="cpu", weights_only=True)
    return {key: value for key, value in weights.items() if not key.startswith("_fc.")}
