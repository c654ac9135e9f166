"""Draws scenes on the device that holds the sprites.

Shapes: B batch, V pictures, O objects of a layer, H x W the canvas, h x w a sprite.
"""

import torch
from torch import Tensor

from mos_cli.datasets.scenes.layout import Placed, Scene

EDGE = 16
"""Width of the transparent border around a sprite for the filter, in sprite pixels."""


class Compositor:
    """Draws batches of scenes from premultiplied RGBA sprites, scaled with an antialiasing triangle filter.

    The filter is separable and objects are not rotated, so scaling is two matrix products.

    Args:
        sprites_VHW4: uint8, premultiplied alpha.
    """

    def __init__(self, sprites_VHW4: Tensor) -> None:
        self.sprites_V4hw = sprites_VHW4.permute(0, 3, 1, 2).contiguous()
        self.lightness_V = torch.cat([_lightness(part) for part in self.sprites_V4hw.split(256)])

    def draw(self, scenes: list[Scene], canvas: int) -> Tensor:
        """Pictures [B, 3, H, W] in -1..1, H = W = `canvas`; every scene's objects in order, later ones in front."""
        picture_B3HW = self._backgrounds(scenes, canvas)
        for depth in range(max(len(scene.objects) for scene in scenes)):
            rows = [row for row, scene in enumerate(scenes) if len(scene.objects) > depth]
            layer = self._layer([scenes[row].objects[depth] for row in rows], canvas)
            picture_B3HW[rows] = picture_B3HW[rows] * (1 - layer[:, 3:]) + layer[:, :3]
        return picture_B3HW.clamp(0, 1) * 2 - 1

    def _backgrounds(self, scenes: list[Scene], canvas: int) -> Tensor:
        device = self.sprites_V4hw.device
        tops, bottoms = (
            torch.tensor([getattr(scene.background, end) for scene in scenes], device=device)[:, :, None, None]
            for end in ("top", "bottom")
        )
        horizons = torch.tensor(
            [-1.0 if scene.background.horizon is None else scene.background.horizon for scene in scenes], device=device
        )[:, None]
        y_H = (torch.arange(canvas, device=device) + 0.5) / canvas
        # The edge of a horizon is one pixel wide; without one the mix is linear in the height.
        sharp_BH = ((y_H - horizons) * canvas + 0.5).clamp(0, 1)
        share_BH = torch.where(horizons < 0, y_H, sharp_BH)[:, None, :, None]
        return (tops + (bottoms - tops) * share_BH).expand(-1, -1, -1, canvas).clone()

    def _layer(self, objects: list[Placed], canvas: int) -> Tensor:
        """One object of each scene, [O, 4, H, W], premultiplied."""
        device = self.sprites_V4hw.device
        pictures = torch.tensor([placed.picture for placed in objects], device=device)
        sprites = self._painted(objects, pictures)
        x, y, side = (
            torch.tensor([getattr(placed, name) for placed in objects], device=device) for name in ("x", "y", "side")
        )
        across = _filter(x, side, sprites.shape[-1], canvas)
        down = _filter(y, side, sprites.shape[-1], canvas)
        narrowed = sprites.flatten(1, 2) @ across.transpose(1, 2)
        return down[:, None] @ narrowed.unflatten(1, sprites.shape[1:3])

    def _painted(self, objects: list[Placed], pictures: Tensor) -> Tensor:
        """The sprites of objects in 0..1, flipped and painted.

        A painted sprite keeps its lightness, on a scale from black over the paint to white.
        """
        sprites = self.sprites_V4hw[pictures].float() / 255
        rows = [row for row, placed in enumerate(objects) if placed.tint]
        if rows:
            paint = torch.tensor([objects[row].tint for row in rows], device=sprites.device)[:, :, None, None]
            alpha = sprites[rows, 3:]
            light = _luma(sprites[rows]) * (0.5 / self.lightness_V[pictures[rows]])[:, None, None, None]
            light = torch.minimum(light, alpha)
            shade = torch.minimum(2 * light, alpha)
            sprites[rows, :3] = paint * shade + (1 - paint) * (2 * light - alpha).clamp_min(0)
        if mirrored := [row for row, placed in enumerate(objects) if placed.mirrored]:
            sprites[mirrored] = sprites[mirrored].flip(-1)
        return sprites


def _luma(sprites_O4hw: Tensor) -> Tensor:
    weights = sprites_O4hw.new_tensor([0.299, 0.587, 0.114])[:, None, None]
    return (sprites_O4hw[:, :3] * weights).sum(dim=1, keepdim=True)


def _lightness(sprites_V4hw: Tensor) -> Tensor:
    """Mean lightness of the opaque pixels, [V], at least 0.15."""
    sprites = sprites_V4hw.float() / 255
    return (_luma(sprites).sum(dim=(1, 2, 3)) / sprites[:, 3].sum(dim=(1, 2)).clamp_min(1)).clamp_min(0.15)


def _filter(centre_O: Tensor, side_O: Tensor, pixels: int, canvas: int) -> Tensor:
    """Weights [O, canvas, pixels] that scale and place one axis of a sprite."""
    step_O = pixels / (side_O * canvas)
    output = torch.arange(canvas, device=centre_O.device) + 0.5
    at_OH = (output - (centre_O - side_O / 2)[:, None] * canvas) * step_O[:, None] - 0.5
    taps = torch.arange(-EDGE, pixels + EDGE, device=centre_O.device)
    reach_O11 = step_O.clamp_min(1)[:, None, None]
    weights = (1 - (at_OH[:, :, None] - taps).abs() / reach_O11).clamp_min(0)
    weights = weights / weights.sum(dim=2, keepdim=True).clamp_min(1e-3)
    return weights[:, :, EDGE:-EDGE]
