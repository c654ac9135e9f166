"""Draws scenes on the device that holds the sprites.

Shapes: B batch, V pictures, O objects of a layer, N numbers of a scene, H x W the canvas, h x w a sprite.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mos_cli.datasets.scenes.layout import Scene
from mos_cli.datasets.scenes.packed import (
    PackedBackgrounds,
    PackedObjects,
    pack_scenes,
    unpack_backgrounds,
    unpack_objects,
)

EDGE = 16
"""Width of the transparent border around a sprite for the filter, in sprite pixels."""
LUMA = (0.299, 0.587, 0.114)


class Compositor:
    """Draws batches of scenes from premultiplied RGBA sprites, scaled with an antialiasing triangle filter.

    The filter is separable and objects are not rotated, so scaling is two matrix products.

    Args:
        sprites_VHW4: uint8, premultiplied alpha.
        compiled: fuse the operations of an object, for a GPU. They go over all pixels of its sprite about 20 times.
    """

    def __init__(self, sprites_VHW4: Tensor, *, compiled: bool = False) -> None:
        self.sprites_V4hw = sprites_VHW4.permute(0, 3, 1, 2).contiguous()
        # On the device once: a number that is copied there waits for it.
        self._luma_311 = torch.tensor(LUMA, device=sprites_VHW4.device)[:, None, None]
        self.lightness_V = torch.cat([self._lightness(part) for part in self.sprites_V4hw.split(256)])
        self._draw_layer = torch.compile(self._layer) if compiled else self._layer

    @property
    def device(self) -> torch.device:
        return self.sprites_V4hw.device

    def draw(self, scenes: Sequence[Scene], canvas: int) -> Tensor:
        """Pictures [B, 3, H, W] in -1..1, H = W = `canvas`; every scene's objects in order, later ones in front."""
        packed = pack_scenes(scenes, max(len(scene.objects) for scene in scenes))
        return self.draw_packed(packed.to(self.device), canvas)

    def draw_packed(self, packed_BN: Tensor, canvas: int) -> Tensor:
        """As `draw`, from the numbers of `pack_scenes` on the device of the sprites."""
        picture_B3HW = _backgrounds(unpack_backgrounds(packed_BN), canvas)
        for objects in unpack_objects(packed_BN):
            rows = _rows(objects.present_B)
            objects = PackedObjects(*(column[rows] for column in objects))
            layer = self._draw_layer(objects, canvas)
            picture_B3HW[rows] = picture_B3HW[rows] * (1 - layer[:, 3:]) + layer[:, :3]
        return picture_B3HW.clamp(0, 1) * 2 - 1

    def _layer(self, objects: PackedObjects, canvas: int) -> Tensor:
        """One object of each scene, [B, 4, H, W], premultiplied; nothing where there is none."""
        sprites = self._painted(objects)
        # Absent objects have no size.
        centres, sides = torch.cat([objects.x_B, objects.y_B]), objects.side_B.clamp_min(1e-3).repeat(2)
        across, down = _filter(centres, sides, sprites.shape[-1], canvas).chunk(2)
        across = torch.where(objects.mirrored_B[:, None, None] > 0, across.flip(-1), across)
        down = down * objects.present_B[:, None, None]
        narrowed = sprites.flatten(1, 2) @ across.transpose(1, 2)
        return down[:, None] @ narrowed.unflatten(1, sprites.shape[1:3])

    def _painted(self, objects: PackedObjects) -> Tensor:
        """The sprites of objects in 0..1, painted.

        A painted sprite keeps its lightness, on a scale from black over the paint to white.
        """
        pictures = objects.picture_B.long()
        sprites = self.sprites_V4hw[pictures].float() / 255
        rows = _rows(objects.tinted_B)
        colour, alpha = sprites[rows, :3], sprites[rows, 3:]
        paint, tinted = objects.tint_B3[rows, :, None, None], objects.tinted_B[rows, None, None, None]
        light = self._luma(colour) * (0.5 / self.lightness_V[pictures[rows]])[:, None, None, None]
        light = torch.minimum(light, alpha)
        shade = torch.minimum(2 * light, alpha)
        painted = paint * shade + (1 - paint) * (2 * light - alpha).clamp_min(0)
        sprites[rows, :3] = torch.where(tinted > 0, painted, colour)
        return sprites

    def _luma(self, colour_Q3hw: Tensor) -> Tensor:
        return (colour_Q3hw * self._luma_311).sum(dim=1, keepdim=True)

    def _lightness(self, sprites_V4hw: Tensor) -> Tensor:
        """Mean lightness of the opaque pixels, [V], at least 0.15."""
        sprites = sprites_V4hw.float() / 255
        light = self._luma(sprites[:, :3]).sum(dim=(1, 2, 3))
        return (light / sprites[:, 3].sum(dim=(1, 2)).clamp_min(1)).clamp_min(0.15)


def _rows(chosen_B: Tensor) -> Tensor | slice:
    """The rows that are not 0; on a GPU all rows, whose number is known without waiting for it."""
    return chosen_B.nonzero().squeeze(1) if chosen_B.device.type == "cpu" else slice(None)


def _backgrounds(backgrounds: PackedBackgrounds, canvas: int) -> Tensor:
    tops, bottoms = backgrounds.top_B3[:, :, None, None], backgrounds.bottom_B3[:, :, None, None]
    horizons = backgrounds.horizon_B[:, None]
    y_H = (torch.arange(canvas, device=horizons.device) + 0.5) / canvas
    # The edge of a horizon is one pixel wide; without one the mix is linear in the height.
    sharp_BH = ((y_H - horizons) * canvas + 0.5).clamp(0, 1)
    share_BH = torch.where(horizons < 0, y_H, sharp_BH)[:, None, :, None]
    return (tops + (bottoms - tops) * share_BH).expand(-1, -1, -1, canvas).clone()


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
