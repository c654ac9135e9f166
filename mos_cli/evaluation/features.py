"""EfficientNet-Lite0, trained on ImageNet: the features that KID compares.

Shapes: B pictures, H x W = 224, C channels, F = 1280 features.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mos_cli.towers.efficientnet import STAGES, Trunk, norm, read_weights

SIDE = 224
FEATURES = 1280


class EfficientNetLite0(Trunk):
    """Pictures with values in -1..1, of any square size, to features [B, F]."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_head = nn.Conv2d(STAGES[-1][3], FEATURES, 1, bias=False)
        self._bn1 = norm(FEATURES)
        self.eval().requires_grad_(False)

    def forward(self, pictures_B3HW: Tensor) -> Tensor:
        sized = F.interpolate(pictures_B3HW, (SIDE, SIDE), mode="bilinear", antialias=True)
        return F.relu6(self._bn1(self._conv_head(self.stages(sized)[-1]))).mean(dim=(2, 3))


def load_features(folder: Path) -> EfficientNetLite0:
    """The network with the weights in `folder`, as `fetch_tower` returns it; the classifier is left out."""
    net = EfficientNetLite0()
    net.load_state_dict(read_weights(folder))
    return net


@torch.inference_mode()
def features_of(net: nn.Module, pictures_B3HW: Tensor) -> Tensor:
    """Features [B, F], computed in batches of 32."""
    return torch.cat([net(part) for part in pictures_B3HW.split(32)])
