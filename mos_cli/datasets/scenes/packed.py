"""Scenes as an array of numbers, which worker processes write and the compositor draws from.

Shapes: B scenes, O objects of a scene, N = 7 + 10 * O numbers of a scene: its background, then its objects from back to
front. P objects of several scenes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mos_cli.datasets.scenes.layout import Placed, Scene

BACKGROUND_WIDTHS = (3, 3, 1)
OBJECT_WIDTHS = (1, 1, 2, 1, 1, 1, 3)
BACKGROUND, OBJECT = sum(BACKGROUND_WIDTHS), sum(OBJECT_WIDTHS)
ABSENT = (0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
"""The numbers of an object that is not there. It has a side because sides are divided by."""
NO_HORIZON = -1.0


class PackedBackgrounds(NamedTuple):
    """Colours of the top and the bottom in 0..1, and the height of the horizon, `NO_HORIZON` without one."""

    top_B3: Tensor
    bottom_B3: Tensor
    horizon_B: Tensor


class PackedObjects(NamedTuple):
    """Objects, as `Placed`; `present_P` is 0 where a scene has fewer objects, and `centre_P2` is x and y."""

    present_P: Tensor
    picture_P: Tensor
    centre_P2: Tensor
    side_P: Tensor
    mirrored_P: Tensor
    tinted_P: Tensor
    tint_P3: Tensor


def pack_scenes(scenes: Sequence[Scene], objects: int) -> Tensor:
    """Scenes of at most `objects` objects, float32 [B, N]."""
    rows = []
    for scene in scenes:
        top, bottom, horizon = scene.background.top, scene.background.bottom, scene.background.horizon
        row = [*top, *bottom, NO_HORIZON if horizon is None else horizon]
        for placed in scene.objects:
            row += _numbers(placed)
        rows.append([*row, *ABSENT * (objects - len(scene.objects))])
    return torch.tensor(rows)


def unpack_backgrounds(packed_BN: Tensor) -> PackedBackgrounds:
    """The backgrounds of packed scenes."""
    return PackedBackgrounds(*_columns(packed_BN[:, :BACKGROUND], BACKGROUND_WIDTHS))


def split_objects(packed_BN: Tensor) -> tuple[Tensor, ...]:
    """The numbers of the objects of packed scenes from back to front, one of each scene at a time: O times [B, 10]."""
    return packed_BN[:, BACKGROUND:].split(OBJECT, dim=1)


def unpack_objects(packed_PN: Tensor) -> PackedObjects:
    """Objects from their numbers, [P, 10]."""
    return PackedObjects(*_columns(packed_PN, OBJECT_WIDTHS))


def _numbers(placed: Placed) -> tuple[float, ...]:
    tint = placed.tint or (0.0, 0.0, 0.0)
    return 1.0, placed.picture, placed.x, placed.y, placed.side, placed.mirrored, placed.tint is not None, *tint


def _columns(part: Tensor, widths: tuple[int, ...]) -> list[Tensor]:
    return [column.squeeze(1) for column in part.split(widths, dim=1)]
