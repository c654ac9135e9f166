"""Judging pictures of prompts: the judge's detections, with styles from a comparison with true scenes.

Shapes: B pictures, H x W a picture's size, F features, A styles.
"""

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from mos_cli.datasets.art.file import Art
from mos_cli.datasets.scenes.compositor import Compositor
from mos_cli.datasets.scenes.layout import Scene, lay_out
from mos_cli.datasets.scenes.vocabulary import load_vocabulary
from mos_cli.errors import ModelError
from mos_cli.evaluation.checks import passes
from mos_cli.evaluation.judge import Detection, Judge
from mos_cli.evaluation.scenebench import Entry, bench_data

TRUE_SCENES = 4
"""True scenes per prompt, for the ceiling; the first of each is compared by KID."""
REFERENCE = TRUE_SCENES
"""The take of the true scenes for the comparison of styles, not one of those that are judged."""

Detections = tuple[Detection, ...]


class TrueScenes:
    """Draws the scenes that prompts describe from the art file."""

    def __init__(self, art: Art) -> None:
        self.vocabulary = load_vocabulary(art, bench_data())
        self.compositor = Compositor(self.vocabulary.sprites_VHW4)
        self.art_hash = art.manifest.sha256

    def draw(self, entries: Sequence[Entry], canvas: int, take: int, style: str | None = None) -> Tensor:
        """One picture per entry, [B, 3, H, W] in -1..1; another `take` is another scene of the same description.

        `style` replaces the description's style.
        """
        scenes = []
        for entry in entries:
            described = entry.description.model_copy(update={} if style is None else {"style": style})
            scenes.append(lay_out(described, self.vocabulary, Random(f"true/{entry.id}/{take}")))
        return self.draw_scenes(scenes, canvas)

    def draw_scenes(self, scenes: Sequence[Scene], canvas: int) -> Tensor:
        """One picture per scene, [B, 3, H, W] in -1..1."""
        parts = [list(scenes[start : start + 64]) for start in range(0, len(scenes), 64)]
        return torch.cat([self.compositor.draw(part, canvas) for part in parts])


def check_words(judge: Judge, words: set[str]) -> None:
    """Raises ModelError if the judge has not learned a word."""
    if unknown := sorted(words - set(judge.config.words)):
        raise ModelError(f"the judge has not learned {', '.join(unknown[:3])}: run mos train-judge")


class Examiner:
    """Judges pictures of some prompts.

    In pictures of style prompts, detections get the style whose true scene of the same description is most similar to
    the picture, by the cosine of the judge's features.

    Args:
        canvas: side of the pictures, in pixels; true scenes are drawn in the same size.

    Raises:
        ModelError: a prompt has a word that the judge has not learned.
    """

    def __init__(self, judge: Judge, true: TrueScenes, entries: Sequence[Entry], canvas: int) -> None:
        check_words(judge, {thing.word for entry in entries for thing in entry.description.things})
        self.judge, self.true, self.entries, self.canvas = judge, true, entries, canvas
        self.styled = [row for row, entry in enumerate(entries) if entry.category == "style"]
        self.styles = true.vocabulary.styles
        prompts = [entries[row] for row in self.styled]
        self.references_BAF = torch.stack(
            [judge.features(true.draw(prompts, canvas, REFERENCE, style)) for style in self.styles], dim=1
        )

    def examine(self, pictures_B3HW: Tensor) -> tuple[list[Detections], list[bool]]:
        """The detections in one picture per prompt, and whether it passes the check of its category."""
        seen = self.judge.detect(pictures_B3HW)
        for row, style in zip(self.styled, self.nearest_style(pictures_B3HW[self.styled]), strict=True):
            seen[row] = tuple(replace(one, style=style) for one in seen[row])
        return seen, [passes(entry, what) for entry, what in zip(self.entries, seen, strict=True)]

    def nearest_style(self, pictures_B3HW: Tensor) -> list[str]:
        """The most similar style of each picture of the style prompts, in their order."""
        features_BF = self.judge.features(pictures_B3HW)
        nearest = F.cosine_similarity(features_BF[:, None], self.references_BAF, dim=2).argmax(dim=1)
        return [self.styles[style] for style in nearest.tolist()]

    def ceiling(self) -> list[list[bool]]:
        """For each entry, whether its true scenes pass."""
        takes = [self.examine(self.true.draw(self.entries, self.canvas, take))[1] for take in range(TRUE_SCENES)]
        return [list(passed) for passed in zip(*takes, strict=True)]
