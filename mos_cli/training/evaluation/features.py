"""EfficientNet-Lite0: the features that KID compares, from weights trained on ImageNet by others.

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
from mos_cli.towers.eyes import STAGES, Trunk, norm

SIDE = 224
FEATURES = 1280


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


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights in `folder`, without the classifier."""
    (name,) = features_spec().files
    weights = torch.load(folder / name, map_location="cpu", weights_only=True)
    return {key: value for key, value in weights.items() if not key.startswith("_fc.")}


@torch.inference_mode()
def features_of(net: nn.Module, pictures_B3HW: Tensor) -> Tensor:
    """Features [B, F], a few pictures at a time."""
    return torch.cat([net(part) for part in pictures_B3HW.split(32)])
