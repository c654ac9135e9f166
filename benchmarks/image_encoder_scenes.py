"""Scenes for the comparison of image encoders: for training the small encoder, and for probes.

Scenes to learn from never show combinations that are held out (`mos_cli.datasets.scenes.description`), nor, for the
encoder, one word in thirteen: what states know of these they know from elsewhere.

Shapes: B pictures, H x W their size, O objects of a scene, V image tokens (cells), Q words.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from random import Random
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mos_cli.bundles.shapes import IMAGE_GRID
from mos_cli.datasets.scenes.backgrounds import Background
from mos_cli.datasets.scenes.compositor import Compositor
from mos_cli.datasets.scenes.description import Description, Thing, held_out, held_out_style
from mos_cli.datasets.scenes.layout import Scene, lay_out
from mos_cli.datasets.scenes.vocabulary import COLOURS, Vocabulary
from mos_cli.datasets.scenes.writer import SceneWriter, choose_background
from mos_cli.towers.image_encoder import SIDE

Kind = Literal["probe", "met", "new"]
"""The scenes that probes are trained on, and those they are tested on: others of that kind, and held-out ones."""
UNMET_EVERY = 13
"""One word in UNMET_EVERY is never shown to the trained encoder."""
DARK = Background((0.0, 0.0, 0.0), (0.0, 0.0, 0.0))


@dataclass(frozen=True)
class Sheet:
    """Pictures as bytes, and the true labels of their cells and things.

    Attributes:
        things_BV: what covers most of a cell: 0 the background, else 1 + the number of the word.
        paints_BV: number of its paint; -1 where it is the background or not painted.
        styles_BV: number of its style; -1 where it is the background.
        present_BQ: 1 for the words that are in the picture, else 0.
    """

    pictures_B3HW: Tensor
    things_BV: Tensor
    paints_BV: Tensor
    styles_BV: Tensor
    present_BQ: Tensor


class World:
    """Scenes made of a vocabulary, from fixed seeds."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary, self._compositor = vocabulary, Compositor(vocabulary.sprites_VHW4)
        alpha = F.adaptive_avg_pool2d(vocabulary.sprites_VHW4[..., 3].float(), SIDE // 4).byte()
        white, nothing = alpha[..., None].expand(-1, -1, -1, 4), torch.zeros_like(alpha)
        black = torch.stack([nothing, nothing, nothing, alpha], -1)
        self._silhouettes = Compositor(torch.cat([white, black]))

    def lesson(self, count: int) -> tuple[Tensor, list[str]]:
        """Pictures in bytes [B, 3, H, W] and their captions, without the words that stay unmet."""
        words = {word: known for at, (word, known) in enumerate(self.vocabulary.words.items()) if at % UNMET_EVERY}
        writer, random = SceneWriter(replace(self.vocabulary, words=words)), Random("eyes/lesson")
        written = [writer.write(random) for _ in range(count)]
        return self._drawn([scene for scene, _ in written]), [caption for _, caption in written]

    def sheet(self, kind: Kind, count: int) -> Sheet:
        """Scenes of one kind, with their true labels."""
        random, writer = Random(f"eyes/{kind}"), SceneWriter(self.vocabulary)
        scenes = [self._strange(random) if kind == "new" else writer.write(random)[0] for _ in range(count)]
        truth = [self.truth(scenes[at : at + 64]) for at in range(0, count, 64)]
        return Sheet(self._drawn(scenes), *(torch.cat(part) for part in zip(*truth, strict=True)))

    def truth(self, scenes: list[Scene]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """things_BV, paints_BV, styles_BV and present_BQ of a `Sheet`."""
        most = max(len(scene.objects) for scene in scenes)
        shares_BOV = torch.stack([self._seen(scenes, index) for index in range(most)], 1)
        ground_B1V = 1 - shares_BOV.sum(1, keepdim=True)
        winner_BV = torch.cat([ground_B1V, shares_BOV], 1).argmax(1)
        things, paints, drawn_in = (torch.full((len(scenes), most + 1), -1) for _ in range(3))
        present_BQ, styles = torch.zeros(len(scenes), len(self.vocabulary.words)), len(self.vocabulary.styles)
        for row, scene in enumerate(scenes):
            for at, placed in enumerate(scene.objects, start=1):
                word, drawn_in[row, at] = divmod(placed.picture, styles)
                things[row, at] = word + 1
                present_BQ[row, word] = 1
                paints[row, at] = self._paints[placed.tint] if placed.tint else -1
        things[:, 0] = 0
        things, paints, drawn_in = (known.gather(1, winner_BV) for known in (things, paints, drawn_in))
        return things, paints, drawn_in, present_BQ

    def _seen(self, scenes: list[Scene], index: int) -> Tensor:
        """The share of every cell in which object `index` is seen, [B, V]: it is white, and all else is black."""
        rows = len(self.vocabulary.sprites_VHW4)
        staged = []
        for scene in scenes:
            objects = [
                replace(placed, picture=placed.picture + rows * (at > 0), tint=None)
                for at, placed in enumerate(scene.objects[index:])
            ]
            staged.append(Scene(tuple(objects), DARK))
        drawn_B3HW = self._silhouettes.draw(staged, SIDE // 4)
        return F.adaptive_avg_pool2d((drawn_B3HW[:, 0] + 1) / 2, IMAGE_GRID).flatten(1)

    def _drawn(self, scenes: list[Scene]) -> Tensor:
        pictures = torch.empty(len(scenes), 3, SIDE, SIDE, dtype=torch.uint8)
        for at in range(0, len(scenes), 64):
            drawn = self._compositor.draw(scenes[at : at + 64], SIDE)
            pictures[at : at + 64] = ((drawn + 1) * 127.5).round().byte()
        return pictures

    def _strange(self, random: Random) -> Scene:
        """A pair of words, or a word in a style, held out of training; painted as often as in training."""
        relation = None
        if random.random() < 0.5:
            words: tuple[str, ...] = random.choice(self._held_out_pairs)
            style = random.choice([s for s in self.vocabulary.styles if not any(held_out_style(w, s) for w in words)])
            relation = random.choice((None, "left", "right", "above", "below"))
        else:
            word, style = random.choice(self._styled)
            words = (word,)
        things = tuple(self._thing(word, random) for word in words)
        background = choose_background({thing.colour for thing in things}, random)
        description = Description(things=things, relation=relation, style=style, background=background)
        return lay_out(description, self.vocabulary, random)

    def _thing(self, word: str, random: Random) -> Thing:
        paintable = self.vocabulary.words[word].names_for(counted=False, painted=True)
        painted = random.random() < 0.3 and paintable
        return Thing(word=word, colour=random.choice(list(COLOURS)) if painted else None)

    @cached_property
    def _held_out_pairs(self) -> list[tuple[str, str]]:
        return [pair for pair in combinations(self.vocabulary.words, 2) if held_out(*pair)]

    @cached_property
    def _styled(self) -> list[tuple[str, str]]:
        return [(w, s) for w in self.vocabulary.words for s in self.vocabulary.styles if held_out_style(w, s)]

    @cached_property
    def _paints(self) -> dict[tuple[float, float, float], int]:
        return {paint: number for number, (paint, _) in enumerate(COLOURS.values())}
