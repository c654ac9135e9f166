"""The small world of the fusion comparison: one or two things on white, painted or not, in one style.

Pairs of words and painted words that SceneBench's rule holds out are held out of training; all prompts are of these.
Captions are read once per understanding tower and kept on the disk.

Shapes: N captions, T context tokens, M layers, S width of a state, H x W a picture's size.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from mos_cli.datasets.scenes.captions import caption
from mos_cli.datasets.scenes.compositor import Compositor
from mos_cli.datasets.scenes.description import DEFAULT_STYLE, Description, Thing, held_out
from mos_cli.datasets.scenes.layout import lay_out
from mos_cli.datasets.scenes.vocabulary import Vocabulary
from mos_cli.evaluation.scenebench import Category, Entry
from mos_cli.towers.layers import EPS
from mos_cli.towers.router import fixed_route
from mos_cli.towers.understanding import UnderstandingTower
from mos_cli.training.references import find_understanding

CATEGORIES: tuple[Category, ...] = ("single", "two", "colour", "position", "binding")
COLOURS = ("red", "yellow", "blue", "purple")
SIDES = ("left", "right", "above", "below")
MOST_WORDS = 9
"""Longer captions are replaced, since all are padded to the longest."""


@dataclass(frozen=True)
class Scenes:
    """Captions and pictures [N, 3, H, W] in -1..1 of the same scenes."""

    captions: list[str]
    pictures_N3HW: Tensor


class World:
    """Scenes to train on, and prompts for what is held out of them."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary, self.compositor = vocabulary, Compositor(vocabulary.sprites_VHW4)
        words = list(vocabulary.words)
        pairs = list(combinations(words, 2))
        self.met = [pair for pair in pairs if not held_out(*pair)]
        self.unmet = [pair for pair in pairs if held_out(*pair)]
        self.unpainted = [key for key in product(words, COLOURS) if held_out(*key)]

    def scenes(self, count: int, canvas: int, seed: str) -> Scenes:
        """Scenes to train on; the same seed gives the same ones."""
        random = Random(seed)
        described = [self._described(random) for _ in range(count)]
        captions = [self._caption(description, random) for description in described]
        return Scenes(captions, self.draw(described, canvas, random))

    def prompts(self, count: int) -> list[Entry]:
        """`count` prompts of every category, always the same ones."""
        entries = []
        for category in CATEGORIES:
            random = Random(f"fusion/{category}")
            for number in range(count):
                description = self._asked(category, random)
                prompt = self._caption(description, random)
                name, seed = f"{category}-{number:03d}", len(entries)
                entries.append(Entry(id=name, category=category, seed=seed, prompt=prompt, description=description))
        return entries

    def draw(self, described: list[Description], canvas: int, random: Random) -> Tensor:
        """One true scene of every description, [N, 3, H, W]."""
        placed = [lay_out(description, self.vocabulary, random) for description in described]
        return torch.cat([self.compositor.draw(placed[i : i + 64], canvas) for i in range(0, len(placed), 64)])

    def _described(self, random: Random) -> Description:
        """The description of a training scene: two things in three of four, half of the things painted."""
        alone = random.random() < 0.25
        words = random.sample(random.choice(self.met), 1 if alone else 2)
        things = tuple(self._painted(word, random) if random.random() < 0.5 else Thing(word=word) for word in words)
        relation = None if alone else random.choice((None, *SIDES))
        return Description(things=things, relation=relation, style=DEFAULT_STYLE, style_named=False)

    def _painted(self, word: str, random: Random) -> Thing:
        colours = [colour for colour in COLOURS if (word, colour) not in self.unpainted]
        return Thing(word=word, colour=random.choice(colours))

    def _asked(self, category: Category, random: Random) -> Description:
        pair = random.sample(random.choice(self.unmet), 2)
        colours = random.sample(COLOURS, 2)
        word, colour = random.choice(self.unpainted)
        things = {
            "single": (Thing(word=random.choice(list(self.vocabulary.words))),),
            "colour": (Thing(word=word, colour=colour),),
            "binding": tuple(Thing(word=w, colour=c) for w, c in zip(pair, colours, strict=True)),
        }.get(category, tuple(Thing(word=w) for w in pair))
        relation = random.choice(SIDES) if category == "position" else None
        return Description(things=things, relation=relation, style=DEFAULT_STYLE, style_named=False)

    def _caption(self, description: Description, random: Random) -> str:
        while True:
            text = caption(description, self.vocabulary, random)
            if len(text.split()) <= MOST_WORDS:
                return text


@dataclass(frozen=True)
class Library:
    """The hidden states [N, T, M, S] in bf16 and the mask [N, T] of the captions in `rows`."""

    states_NTMS: Tensor
    mask_NT: Tensor
    rows: dict[str, int]

    def rows_of(self, captions: list[str]) -> Tensor:
        return torch.tensor([self.rows[text] for text in captions])

    def handed(self, fusion: str, blocks: int) -> "Library":
        """The same with only the states that a fusion's blocks read, with equal results.

        "mean" becomes one state, the mean of the normalised layers: a block's norm hides the sum's length.
        """
        states = self.states_NTMS
        if fusion == "mean":
            parts = [_normed(part).mean(dim=2, keepdim=True).to(states.dtype) for part in states.split(256)]
            return Library(torch.cat(parts), self.mask_NT, self.rows)
        if fusion == "routed":
            return self
        ids = fixed_route(fusion, states.shape[2], blocks, states.device).ids_BTJK.flatten()
        kept = ids.unique() if fusion == "last" else ids
        return Library(states[:, :, kept], self.mask_NT, self.rows)


def read_library(tower: str, captions: Iterator[str], folder: Path, report: Callable[[str], None]) -> Library:
    """Encodes every different caption once, or loads the states from `folder`."""
    texts = sorted(set(captions), key=lambda text: (len(text), text))
    key = hashlib.sha256("\n".join([tower, *texts]).encode()).hexdigest()[:12]
    path = folder / f"{tower}-{key}.safetensors"
    if not path.exists():
        report(f"{tower} reads {len(texts)} captions")
        folder.mkdir(parents=True, exist_ok=True)
        understanding = UnderstandingTower(find_understanding(tower)[1], dtype=torch.bfloat16)
        batches = [understanding.encode(texts[start : start + 64]) for start in range(0, len(texts), 64)]
        longest = max(batch.mask_BT.shape[1] for batch in batches)
        states = torch.zeros(len(texts), longest, *batches[0].states_BTMS.shape[2:], dtype=torch.bfloat16)
        mask = torch.zeros(len(texts), longest, dtype=torch.bool)
        for start, batch in zip(range(0, len(texts), 64), batches, strict=True):
            rows, tokens = batch.mask_BT.shape
            states[start : start + rows, :tokens] = batch.states_BTMS
            mask[start : start + rows, :tokens] = batch.mask_BT
        save_file({"states": states, "mask": mask}, path)
    held = load_file(path)
    return Library(held["states"], held["mask"], {text: row for row, text in enumerate(texts)})


def _normed(states: Tensor) -> Tensor:
    return F.rms_norm(states.float(), states.shape[-1:], eps=EPS)
