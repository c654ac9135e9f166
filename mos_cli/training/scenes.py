"""Scenes: which pictures stand where on which ground, and the compositor that draws a batch of them.

Shapes: B batch, O objects of a scene, V pictures, H x W the canvas (square), lengths and places in canvas widths.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

RGB = tuple[float, float, float]


@dataclass(frozen=True)
class Placed:
    """A picture on the canvas: its row in the sprite tensor, its centre (x right, y down) and its side."""

    picture: int
    x: float
    y: float
    side: float


@dataclass(frozen=True)
class Scene:
    """Objects from back to front on a plain ground (RGB in 0..1), and the caption that says so."""

    objects: tuple[Placed, ...]
    ground: RGB
    caption: str


class Compositor:
    """Draws scenes from premultiplied RGBA sprites, on the sprites' device.

    Args:
        sprites_VHW4: uint8, premultiplied alpha; kept with its halved copies, so that shrinking never aliases.
        canvas: side of the pictures drawn, in pixels.
    """

    def __init__(self, sprites_VHW4: Tensor, canvas: int) -> None:
        self.canvas = canvas
        level = sprites_VHW4.permute(0, 3, 1, 2)
        self.levels = [level.contiguous()]
        while level.shape[-1] > 16:
            level = F.avg_pool2d(level.float(), 2).round().to(torch.uint8)
            self.levels.append(level)

    def draw(self, scenes: list[Scene]) -> Tensor:
        """Pictures [B, 3, H, W] in -1..1; every scene's objects in order, later ones in front."""
        device = self.levels[0].device
        picture_B3HW = torch.tensor([scene.ground for scene in scenes], device=device)[:, :, None, None]
        picture_B3HW = picture_B3HW.expand(-1, -1, self.canvas, self.canvas).clone()
        for depth in range(max(len(scene.objects) for scene in scenes)):
            rows = [row for row, scene in enumerate(scenes) if len(scene.objects) > depth]
            layer = self._place([scenes[row].objects[depth] for row in rows])
            picture_B3HW[rows] = picture_B3HW[rows] * (1 - layer[:, 3:]) + layer[:, :3]
        return picture_B3HW.clamp(0, 1) * 2 - 1

    def _place(self, objects: list[Placed]) -> Tensor:
        """One layer [B, 4, H, W]: each object scaled and moved, with bilinear interpolation."""
        layer = torch.empty(len(objects), 4, self.canvas, self.canvas, device=self.levels[0].device)
        levels = [self._level(placed.side) for placed in objects]
        for level in set(levels):
            rows = [row for row, chosen in enumerate(levels) if chosen == level]
            group = [objects[row] for row in rows]
            sprites = self.levels[level][[placed.picture for placed in group]].float() / 255
            # Output to input, both in -1..1: u = (x - centre) / side.
            affine = torch.tensor(
                [
                    [
                        [1 / placed.side, 0, (1 - 2 * placed.x) / placed.side],
                        [0, 1 / placed.side, (1 - 2 * placed.y) / placed.side],
                    ]
                    for placed in group
                ],
                device=sprites.device,
            )
            grid = F.affine_grid(affine, [len(group), 4, self.canvas, self.canvas], align_corners=False)
            layer[rows] = F.grid_sample(sprites, grid, align_corners=False)
        return layer

    def _level(self, side: float) -> int:
        """The smallest copy that is at least as large as the object drawn."""
        pixels = side * self.canvas
        return max(i for i, sprites in enumerate(self.levels) if i == 0 or sprites.shape[-1] >= pixels)
