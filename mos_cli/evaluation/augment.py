"""Augmentation of the judge's training pictures: rotation, blur, compression, colours, noise.

Shapes: B pictures, H x W = 128.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

TURN = math.radians(10)


def turned(pictures_B3HW: Tensor, angles_B: Tensor) -> Tensor:
    """Rotates each picture around its centre; the point (x, y) moves to `turned_point(x, y, angle)`."""
    cos, sin = angles_B.cos(), angles_B.sin()
    zero = torch.zeros_like(cos)
    affine = torch.stack([torch.stack([cos, sin, zero], dim=1), torch.stack([-sin, cos, zero], dim=1)], dim=1)
    grid = F.affine_grid(affine, list(pictures_B3HW.shape), align_corners=False)
    return F.grid_sample(pictures_B3HW, grid, padding_mode="border", align_corners=False)


def turned_point(x: float, y: float, angle: float) -> tuple[float, float]:
    """The position of a point (in picture widths) after rotation by `angle`, in radians."""
    x, y = x - 0.5, y - 0.5
    return x * math.cos(angle) - y * math.sin(angle) + 0.5, x * math.sin(angle) + y * math.cos(angle) + 0.5


def degraded(pictures_B3HW: Tensor, generator: torch.Generator) -> Tensor:
    """Blurs, quantises as JPEG does, shifts colours and adds noise, each to some of the pictures."""
    pictures = _blurred(pictures_B3HW, generator)
    pictures = _shifted_colours(pictures, generator)
    pictures = _quantised(pictures, generator)
    strength = _each(len(pictures), generator).square() * 0.15
    return (pictures + strength * torch.randn(pictures.shape, generator=generator)).clamp(-1, 1)


def _blurred(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Blurs half of the pictures by shrinking and enlarging."""
    groups = torch.randperm(len(pictures), generator=generator).chunk(8)
    blurred, side = pictures.clone(), pictures.shape[-1]
    for group, smaller in zip(groups[4:], (48, 64, 80, 96), strict=False):
        shrunk = F.interpolate(pictures[group], (smaller, smaller), mode="bilinear", antialias=True)
        blurred[group] = F.interpolate(shrunk, (side, side), mode="bilinear")
    return blurred


def _shifted_colours(pictures: Tensor, generator: torch.Generator) -> Tensor:
    count = len(pictures)
    contrast = 0.75 + 0.45 * _each(count, generator)
    saturation = 0.7 + 0.5 * _each(count, generator)
    light = 0.2 * (_each(count, generator) - 0.5)
    cast = 0.12 * (torch.rand(count, 3, 1, 1, generator=generator) - 0.5)
    grey = pictures.mean(dim=1, keepdim=True)
    return (grey + (pictures - grey) * saturation) * contrast + light + cast


def _quantised(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Rounds the cosine transform of 8 x 8 blocks, finer where the frequency is low, for half of the pictures."""
    rows = torch.randperm(len(pictures), generator=generator)[: len(pictures) // 2]
    k = torch.arange(8.0)
    basis = (math.pi * (k[None] + 0.5) * k[:, None] / 8).cos() * torch.where(k == 0, 0.125, 0.25).sqrt()[:, None]
    count, _, side, _ = pictures[rows].shape
    blocks = pictures[rows].reshape(count, 3, side // 8, 8, side // 8, 8).transpose(3, 4)
    steps = 0.02 + 0.03 * _each(count, generator)[:, :, None, None] * (k[None] + k[:, None])
    rounded = (basis @ blocks @ basis.T / steps).round() * steps
    degraded = pictures.clone()
    degraded[rows] = (basis.T @ rounded @ basis).transpose(3, 4).reshape(count, 3, side, side)
    return degraded


def _each(count: int, generator: torch.Generator) -> Tensor:
    """One value in 0..1 per picture, [B, 1, 1, 1]."""
    return torch.rand(count, 1, 1, 1, generator=generator)
