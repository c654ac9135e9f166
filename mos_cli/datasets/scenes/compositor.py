"""Draws scenes on the device that holds the sprites.

A layer is one object of each scene. The objects of all layers are prepared at once, and the layers drawn one by one.

Shapes: B batch, V pictures, P objects, N numbers of a scene, H x W the canvas, h x w a sprite.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mos_cli.datasets.scenes.layout import Scene
from mos_cli.datasets.scenes.packed import (
    PackedBackgrounds,
    PackedObjects,
    pack_scenes,
    split_objects,
    unpack_backgrounds,
    unpack_objects,
)

EDGE = 16
"""Width of the transparent border around a sprite for the filter, in sprite pixels."""
CPU_SCENES = 16
"""Scenes that a CPU draws at once. The sprites of many do not fit into its cache: each then takes twice the time."""
LUMA = (0.299, 0.587, 0.114)


class Compositor:
    """Draws batches of scenes from premultiplied RGBA sprites, scaled with an antialiasing triangle filter.

    The filter is separable and objects are not rotated, so scaling is two matrix products.

    Args:
        sprites_VHW4: uint8, premultiplied alpha.
        compiled: fuse operations on a GPU. Those of an object go over all pixels of its sprite about 20 times.
    """

    def __init__(self, sprites_VHW4: Tensor, *, compiled: bool = False) -> None:
        # Channels between rows and columns: both products of the scaling then need no copy.
        self.sprites_Vh4w = sprites_VHW4.transpose(2, 3).contiguous()
        # On the device once: a number that is copied there waits for it.
        self._luma_31 = torch.tensor(LUMA, device=sprites_VHW4.device)[:, None]
        self.lightness_V = torch.cat([self._lightness(part) for part in sprites_VHW4.split(256)])
        self._prepare = torch.compile(self.prepared) if compiled else self.prepared

    @property
    def device(self) -> torch.device:
        return self.sprites_Vh4w.device

    def draw(self, scenes: Sequence[Scene], canvas: int) -> Tensor:
        """Pictures [B, 3, H, W] in -1..1, H = W = `canvas`; every scene's objects in order, later ones in front."""
        packed = pack_scenes(scenes, max(len(scene.objects) for scene in scenes))
        return self.draw_packed(packed.to(self.device), canvas)

    def draw_packed(self, packed_BN: Tensor, canvas: int) -> Tensor:
        """As `draw`, from the numbers of `pack_scenes` on the device of the sprites."""
        if self.device.type != "cpu":
            return self._drawn(packed_BN, canvas)
        return torch.cat([self._drawn(part_BN, canvas) for part_BN in packed_BN.split(CPU_SCENES)])

    def _drawn(self, packed_BN: Tensor, canvas: int) -> Tensor:
        picture_B3HW = _backgrounds(unpack_backgrounds(packed_BN), canvas)
        layers = split_objects(packed_BN)
        rows = [_rows(unpack_objects(layer).present_P) for layer in layers]
        chosen = [layer[those] for layer, those in zip(layers, rows, strict=True)]
        prepared = self._prepare(torch.cat(chosen), canvas)
        parts = (each.split([len(layer) for layer in chosen]) for each in prepared)
        for those, *part in zip(rows, *parts, strict=True):
            layer = scaled(*part)
            picture_B3HW[those] = picture_B3HW[those] * (1 - layer[:, 3:]) + layer[:, :3]
        return picture_B3HW.clamp(0, 1) * 2 - 1

    def prepared(self, packed_PN: Tensor, canvas: int) -> tuple[Tensor, Tensor, Tensor]:
        """The arguments of `scaled` for packed objects."""
        objects = unpack_objects(packed_PN)
        sprites_Ph4w = self._painted(objects)
        across, down = _filters(objects, sprites_Ph4w.shape[-1], canvas).unbind(1)
        across = torch.where(objects.mirrored_P[:, None, None] > 0, across.flip(-1), across)
        return sprites_Ph4w, across, down

    def _painted(self, objects: PackedObjects) -> Tensor:
        """The sprites of objects in 0..1, painted.

        A painted sprite keeps its lightness, on a scale from black over the paint to white.
        """
        pictures = objects.picture_P.long()
        sprites = self.sprites_Vh4w[pictures] / 255
        rows = _rows(objects.tinted_P)
        colour, alpha = sprites[rows, :, :3], sprites[rows, :, 3:]
        paint, tinted = objects.tint_P3[rows, None, :, None], objects.tinted_P[rows, None, None, None]
        # Twice the lightness: up to `alpha` it is a shade of the paint, beyond that it is white.
        luma = (colour * self._luma_31).sum(dim=2, keepdim=True)
        light = luma * self.lightness_V[pictures[rows]].reciprocal()[:, None, None, None]
        shade = torch.minimum(light, alpha)
        painted = paint * shade + (1 - paint) * torch.minimum(light - shade, alpha)
        sprites[rows, :, :3] = torch.where(tinted > 0, painted, colour)
        return sprites

    def _lightness(self, sprites_VHW4: Tensor) -> Tensor:
        """Mean lightness of the opaque pixels, [V], at least 0.15."""
        sprites_V4HW = sprites_VHW4.permute(0, 3, 1, 2).contiguous() / 255
        luma_VHW = (sprites_V4HW[:, :3] * self._luma_31[:, :, None]).sum(dim=1)
        return (luma_VHW.sum(dim=(1, 2)) / sprites_V4HW[:, 3].sum(dim=(1, 2)).clamp_min(1)).clamp_min(0.15)


def scaled(sprites_Bh4w: Tensor, across_BWw: Tensor, down_BHh: Tensor) -> Tensor:
    """Sprites on the canvas, [B, 4, H, W], premultiplied; nothing where no object is."""
    narrowed = (sprites_Bh4w.flatten(1, 2) @ across_BWw.mT).unflatten(1, (-1, 4)).flatten(2)
    return (down_BHh @ narrowed).unflatten(2, (4, -1)).transpose(1, 2)


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


def _filters(objects: PackedObjects, pixels: int, canvas: int) -> Tensor:
    """Weights [P, 2, canvas, pixels] that scale and place the columns and the rows of sprites."""
    sides_P1 = objects.side_P[:, None]
    step_P11 = (pixels / (sides_P1 * canvas))[:, None]
    output = torch.arange(canvas, device=sides_P1.device) + 0.5
    at_P2H = (output - (objects.centre_P2 - sides_P1 / 2)[:, :, None] * canvas) * step_P11 - 0.5
    taps = torch.arange(-EDGE, pixels + EDGE, device=sides_P1.device)
    weights = (1 - (at_P2H[..., None] - taps).abs() / step_P11.clamp_min(1)[..., None]).clamp_min(0)
    total_P2H1 = weights.sum(dim=3, keepdim=True).clamp_min(1e-3)
    # An absent object has an infinite total, and so no weights.
    return (weights / (total_P2H1 / objects.present_P[:, None, None, None]))[..., EDGE:-EDGE]
