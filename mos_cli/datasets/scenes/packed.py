"""Scenes as an array of numbers, which worker processes write and the compositor draws from.

Shapes: B scenes, O objects, N = 7 + 10 * O numbers of a scene: its background, then its objects from back to front.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mos_cli.datasets.scenes.layout import Placed, Scene

BACKGROUND_WIDTHS = (3, 3, 1)
OBJECT_WIDTHS = (1, 1, 1, 1, 1, 1, 1, 3)
BACKGROUND, OBJECT = sum(BACKGROUND_WIDTHS), sum(OBJECT_WIDTHS)
NO_HORIZON = -1.0


class PackedBackgrounds(NamedTuple):
    """Colours of the top and the bottom in 0..1, and the height of the horizon, `NO_HORIZON` without one."""

    top_B3: Tensor
    bottom_B3: Tensor
    horizon_B: Tensor


class PackedObjects(NamedTuple):
    """One object of each scene, as `Placed`; `present_B` is 0 for a scene that has fewer objects."""

    present_B: Tensor
    picture_B: Tensor
    x_B: Tensor
    y_B: Tensor
    side_B: Tensor
    mirrored_B: Tensor
    tinted_B: Tensor
    tint_B3: Tensor


def pack_scenes(scenes: Sequence[Scene], objects: int) -> Tensor:
    """Scenes of at most `objects` objects, float32 [B, N]."""
    absent = (0.0,) * OBJECT
    rows = []
    for scene in scenes:
        top, bottom, horizon = scene.background.top, scene.background.bottom, scene.background.horizon
        row = [*top, *bottom, NO_HORIZON if horizon is None else horizon]
        for placed in scene.objects:
            row += _numbers(placed)
        rows.append([*row, *absent * (objects - len(scene.objects))])
    return torch.tensor(rows)


def unpack_backgrounds(packed_BN: Tensor) -> PackedBackgrounds:
    """The backgrounds of packed scenes."""
    return PackedBackgrounds(*_columns(packed_BN[:, :BACKGROUND], BACKGROUND_WIDTHS))


def unpack_objects(packed_BN: Tensor) -> list[PackedObjects]:
    """The objects of packed scenes from back to front, one of each scene at a time."""
    return [PackedObjects(*_columns(each, OBJECT_WIDTHS)) for each in packed_BN[:, BACKGROUND:].split(OBJECT, dim=1)]


def _numbers(placed: Placed) -> tuple[float, ...]:
    tint = placed.tint or (0.0, 0.0, 0.0)
    return 1.0, placed.picture, placed.x, placed.y, placed.side, placed.mirrored, placed.tint is not None, *tint


def _columns(part: Tensor, widths: tuple[int, ...]) -> list[Tensor]:
    return [column.squeeze(1) for column in part.split(widths, dim=1)]
