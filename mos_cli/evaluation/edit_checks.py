"""EditBench's checks: whether an edit did what was requested, and only that.

They use the judge's detections, the similarity to true pictures of other edits, and measures of the pixels.

Shapes: B pictures, H x W a picture's size.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from mos_cli.datasets.scenes.backgrounds import PAINTS, SCENERIES
from mos_cli.datasets.scenes.composition import Composition, Item
from mos_cli.datasets.scenes.edits import EditKind
from mos_cli.evaluation.editbench import EditEntry
from mos_cli.evaluation.judge import Detection
from mos_cli.evaluation.scenebench import bench_data

NEAR = 0.16
"""The largest distance of a detection from its object, in picture widths: half of that of the nearest spots."""
MOST_DB = 60.0
"""The upper limit of a PSNR; above it, differences are those of rounding to 8 bits."""
LEAST_OUTSIDE = 1 / 64
"""The least share of a picture for which a PSNR is computed."""


def shows(entry: EditEntry, seen: Sequence[Detection], seen_before: Sequence[Detection]) -> bool:
    """Whether new objects are detected in their places, unchanged objects as before, and nothing else.

    Objects that are added, moved or painted must have their colours. An unchanged object may be detected as another
    word if it was so before. No further object may have a word of the edit, or be where one was removed.

    Args:
        seen: the detections in the edited picture; a mirror image is flipped back first, since the judge was trained on
            unflipped objects.
        seen_before: the detections in the true picture before.
    """
    was = entry.before.items
    now = was if entry.kind == "mirror" else entry.after.items
    words = {item.word for item in (*was, *now)}
    left = list(seen)
    for item in now:
        if item in was:
            kept = _nearest(item, seen_before)
            found = _nearest(item, [one for one in left if one.word in (item.word, kept and kept.word)])
            done = found or not kept
        else:
            colour = item.colour if entry.kind in COLOURED else None
            found = _nearest(item, [one for one in left if one.word == item.word and colour in (None, one.colour)])
            done = found
        if not done:
            return False
        if found:
            left.remove(found)
    gone = [item for item in was if item not in now]
    return not any(one.word in words or any(_near(item, one) for item in gone) for one in left)


def _near(item: Item, one: Detection) -> bool:
    return math.hypot(one.x - item.x, one.y - item.y) < NEAR


def _nearest(item: Item, seen: Sequence[Detection]) -> Detection | None:
    """The detection nearest to an object, if there is one."""
    there = [one for one in seen if _near(item, one)]
    return min(there, key=lambda one: math.hypot(one.x - item.x, one.y - item.y), default=None)


def rivals(entry: EditEntry) -> tuple[Composition, ...]:
    """Wrong results that the judge cannot distinguish from the right one, to which the result must be more similar.

    The picture before for a size or a colour; the other styles; the other backgrounds; for a mirror image, the picture
    before, and the objects moved but not flipped.
    """
    return RIVALRIES[entry.kind](entry) if entry.kind in RIVALRIES else ()


def _other_styles(entry: EditEntry) -> tuple[Composition, ...]:
    changed = {index for index, item in enumerate(entry.after.items) if item not in entry.before.items}
    (style,) = {entry.after.items[index].style for index in changed}
    return tuple(
        replace(
            entry.after,
            items=tuple(
                replace(item, style=other) if index in changed else item for index, item in enumerate(entry.after.items)
            ),
        )
        for other in bench_data().styles
        if other != style
    )


def _other_backgrounds(entry: EditEntry) -> tuple[Composition, ...]:
    plain = [None if paint == "white" else paint for paint in PAINTS]
    backgrounds = dict.fromkeys([entry.before.background, *plain, *SCENERIES])
    return tuple(
        replace(entry.after, background=background)
        for background in backgrounds
        if background != entry.after.background
    )


def _not_flipped(entry: EditEntry) -> tuple[Composition, ...]:
    return (
        entry.before,
        replace(entry.after, items=tuple(replace(item, mirrored=False) for item in entry.after.items)),
    )


COLOURED: set[EditKind] = {"add", "replace", "move", "recolour", "count", "swap"}
"""Kinds whose new and moved objects must have their paint's colour."""
RIVALRIES: dict[EditKind, Callable[[EditEntry], tuple[Composition, ...]]] = {
    "resize": lambda entry: (entry.before,),
    "recolour": lambda entry: (entry.before,),
    "style": _other_styles,
    "style all": _other_styles,
    "background": _other_backgrounds,
    "mirror": _not_flipped,
}


def may_change(before_B3HW: Tensor, after_B3HW: Tensor) -> Tensor:
    """The pixels that an edit may change, [B, H, W]: where before and after differ, and 1/32 of a width around."""
    differs_BHW = (before_B3HW - after_B3HW).abs().amax(dim=1) > 1 / 255
    reach = max(1, round(before_B3HW.shape[-1] / 32))
    return F.max_pool2d(differs_BHW.float()[:, None], 2 * reach + 1, 1, reach)[:, 0] > 0


def psnr_outside(pictures_B3HW: Tensor, before_B3HW: Tensor, region_BHW: Tensor) -> list[float | None]:
    """The PSNR of each picture outside its region, in dB; None where the region covers nearly everything.

    Args:
        pictures_B3HW, before_B3HW: in -1..1.
        region_BHW: the pixels that may change.
    """
    outside_BHW = ~region_BHW
    squares_BHW = ((pictures_B3HW - before_B3HW) / 2).square().mean(dim=1)
    errors = ((squares_BHW * outside_BHW).sum(dim=(1, 2)) / outside_BHW.sum(dim=(1, 2)).clamp_min(1)).tolist()
    shares = outside_BHW.float().mean(dim=(1, 2)).tolist()
    least = 10 ** (-MOST_DB / 10)
    return [
        -10 * math.log10(max(error, least)) if share >= LEAST_OUTSIDE else None
        for error, share in zip(errors, shares, strict=True)
    ]


def no_op_error(pictures_B3HW: Tensor, before_B3HW: Tensor) -> list[float]:
    """The mean difference from the picture before, in levels of 255."""
    return ((pictures_B3HW - before_B3HW).abs().mean(dim=(1, 2, 3)) * 127.5).tolist()
