"""Judging edited pictures: detections, whether the edit is done, and what else has changed.

Shapes: B pictures, H x W a picture's size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mos_cli.datasets.scenes.composition import Composition
from mos_cli.evaluation.edit_checks import may_change, no_op_error, psnr_outside, rivals, shows
from mos_cli.evaluation.editbench import EditEntry
from mos_cli.evaluation.examine import Detections, TrueScenes, check_words
from mos_cli.evaluation.judge import Judge


@dataclass(frozen=True)
class Examined:
    """One edited picture.

    Attributes:
        passed: whether the edit is done and nothing else has changed.
        outside: PSNR where nothing may change, in dB; None where nearly everything may.
        error: mean difference in levels of 255 if nothing should change, else None.
    """

    passed: bool
    seen: Detections
    outside: float | None
    error: float | None


class EditExaminer:
    """Judges the results of some edits.

    Args:
        canvas: side of the pictures, in pixels; true pictures are drawn in the same size.

    Attributes:
        before_B3HW, after_B3HW: the true pictures, in -1..1.

    Raises:
        ModelError: an edit has a word that the judge has not learned.
    """

    def __init__(self, judge: Judge, true: TrueScenes, entries: Sequence[EditEntry], canvas: int) -> None:
        check_words(judge, {item.word for entry in entries for item in (*entry.before.items, *entry.after.items)})
        self.judge, self.true, self.entries, self.canvas = judge, true, entries, canvas
        self.mirrored = [row for row, entry in enumerate(entries) if entry.kind == "mirror"]
        self.before_B3HW = self._draw([entry.before for entry in entries])
        self.after_B3HW = self._draw([entry.after for entry in entries])
        self.seen_before = judge.detect(self.before_B3HW)
        self.region_BHW = may_change(self.before_B3HW, self.after_B3HW)

    def examine(self, pictures_B3HW: Tensor) -> list[Examined]:
        """The verdicts on one picture per edit, [B, 3, H, W] in -1..1."""
        unflipped_B3HW = pictures_B3HW.clone()
        unflipped_B3HW[self.mirrored] = pictures_B3HW[self.mirrored].flip(-1)
        seen = self.judge.detect(unflipped_B3HW)
        outside = psnr_outside(pictures_B3HW, self.before_B3HW, self.region_BHW)
        errors = no_op_error(pictures_B3HW, self.before_B3HW)
        return [
            Examined(
                passed=shows(entry, seen[row], self.seen_before[row]) and self._most_similar(row, pictures_B3HW[row]),
                seen=seen[row],
                outside=outside[row],
                error=errors[row] if entry.kind == "nothing" else None,
            )
            for row, entry in enumerate(self.entries)
        ]

    def ceiling(self) -> list[bool]:
        """For each edit, whether the true picture after passes."""
        return [one.passed for one in self.examine(self.after_B3HW)]

    def _most_similar(self, row: int, picture_3HW: Tensor) -> bool:
        """Whether the picture is nearer to the true one after than to any rival, by squared error."""
        others = rivals(self.entries[row])
        if not others:
            return True
        true_B3HW = torch.cat([self.after_B3HW[row : row + 1], self._draw(others)])
        return int((true_B3HW - picture_3HW).square().mean(dim=(1, 2, 3)).argmin()) == 0

    def _draw(self, compositions: Sequence[Composition]) -> Tensor:
        return self.true.draw_scenes([one.scene(self.true.vocabulary) for one in compositions], self.canvas)
