"""KID and the features that it is measured in."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mos_cli.datasets.art.file import Art
from mos_cli.evaluation.examine import TrueScenes
from mos_cli.evaluation.features import FEATURES, EfficientNetLite0, features_of
from mos_cli.evaluation.kid import kid
from mos_cli.evaluation.scenebench import read_bench
from mos_cli.towers.efficientnet import features_spec
from tests.helpers.tiny_judge import RandomFeatures


def test_kid_grows_with_blur(art: Art):
    true, entries, net = TrueScenes(art), read_bench(), RandomFeatures()
    entries = tuple(e for e in entries if e.category in ("single", "style"))

    def blurred(pictures: Tensor, side: int) -> Tensor:
        return F.interpolate(F.interpolate(pictures, (side, side), mode="area"), (32, 32), mode="bilinear")

    pictures, others = true.draw(entries, 32, take=0), true.draw(entries, 32, take=1)
    reference = features_of(net, pictures)
    same, little, much = (
        kid(features_of(net, one), reference) for one in (others, blurred(others, 16), blurred(others, 4))
    )
    assert same.subset == 100
    assert abs(same.mean) < 0.1 * little.mean
    assert little.mean < 0.8 * much.mean
    assert kid(reference[:10], reference[:10]).subset == 5


def test_the_features_are_those_of_the_paper():
    net = EfficientNetLite0()
    # 4.65 million less the classifier, which is not used.
    assert sum(parameter.numel() for parameter in net.parameters()) == 4_652_008 - 1000 * 1281
    assert features_of(net, torch.zeros(1, 3, 32, 32)).shape == (1, FEATURES)


def test_the_features_file_is_pinned():
    spec = features_spec()
    assert (spec.format, len(spec.files)) == ("pth", 1)
