"""EfficientNet-Lite0: the features that KID compares, from weights trained on ImageNet by others.

The network is table 1 of arXiv 1905.11946 without squeeze-and-excitation, with ReLU6, and with stem and head unscaled.

Shapes: B pictures, H x W = 224, C channels, F = 1280 features.
"""

from pathlib import Path
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mos_cli.runtime.folders import models_folder
from mos_cli.runtime.specs import TowerSpec, read_json

SIDE = 224
FEATURES = 1280
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


class FeaturesSpec(TowerSpec):
    """The network's file by reference, fetched and verified as understanding towers are.

    It is a pickle, which bundles and towers may not hold: once its sha256 is checked it is read with torch's
    weights-only reader, which builds tensors and nothing else.
    """

    schema_: Literal["mos-features/1"] = Field(alias="schema")  # type: ignore[assignment]
    format: Literal["pth"]  # type: ignore[assignment]

    @model_validator(mode="after")
    def _known_files(self) -> Self:
        if len(self.files) != 1:
            raise ValueError("the features come from a single file")
        return self


def features_spec() -> FeaturesSpec:
    """Where the weights come from."""
    return read_json(FeaturesSpec, models_folder() / "judge" / "efficientnet-lite0.json")


class EfficientNetLite0(nn.Module):
    """Pictures with values in -1..1, of any square size, to features [B, F]. Names are those of the weights' file."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = nn.Conv2d(3, 32, 3, 2, bias=False)
        self._bn0 = _norm(32)
        self._blocks = nn.ModuleList()
        before = 32
        for kernel, stride, expansion, channels, count in STAGES:
            for index in range(count):
                self._blocks.append(_Block(before, channels, kernel, stride if index == 0 else 1, expansion))
                before = channels
        self._conv_head = nn.Conv2d(before, FEATURES, 1, bias=False)
        self._bn1 = _norm(FEATURES)
        self.eval().requires_grad_(False)

    def forward(self, pictures_B3HW: Tensor) -> Tensor:
        x = F.interpolate(pictures_B3HW, (SIDE, SIDE), mode="bilinear", antialias=True)
        x = F.relu6(self._bn0(_same(self._conv_stem, x)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean(dim=(2, 3))


class _Block(nn.Module):
    """Expand, convolve each channel alone, project."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = before * expansion
        self.expands, self.residual = expansion > 1, stride == 1 and before == after
        if self.expands:
            self._expand_conv = nn.Conv2d(before, wide, 1, bias=False)
            self._bn0 = _norm(wide)
        self._depthwise_conv = nn.Conv2d(wide, wide, kernel, stride, groups=wide, bias=False)
        self._bn1 = _norm(wide)
        self._project_conv = nn.Conv2d(wide, after, 1, bias=False)
        self._bn2 = _norm(after)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        inner = F.relu6(self._bn1(_same(self._depthwise_conv, inner)))
        inner = self._bn2(self._project_conv(inner))
        return x + inner if self.residual else inner


def load_features(folder: Path) -> EfficientNetLite0:
    """The network with the weights in `folder`, as `fetch_tower` returns it; the classifier is left out."""
    net = EfficientNetLite0()
    (name,) = features_spec().files
    weights = torch.load(folder / name, map_location="cpu", weights_only=True)
    net.load_state_dict({key: value for key, value in weights.items() if not key.startswith("_fc.")})
    return net


@torch.inference_mode()
def features_of(net: nn.Module, pictures_B3HW: Tensor) -> Tensor:
    """Features [B, F], a few pictures at a time."""
    return torch.cat([net(part) for part in pictures_B3HW.split(32)])


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


def _same(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Pads as TensorFlow does, where the weights were trained: what is odd goes to the right and the bottom."""
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    missing = max((-(-x.shape[-1] // stride) - 1) * stride + kernel - x.shape[-1], 0)
    return conv(F.pad(x, (missing // 2, missing - missing // 2) * 2))
