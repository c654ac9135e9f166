"""The part of making batches that needs no device: which pictures and captions a step has, and from which source.

Picture `index` of a step depends only on (seed, step, index). So batches do not depend on the number of processes, each
of which makes its share.

Shapes: B examples of this process, N pictures of each, T context tokens, H x W a picture's size.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
from torch import Tensor

from mos_cli.errors import InputError, MosError, UsageError
from mos_cli.towers.understanding import PromptTokenizer
from mos_cli.training.recipe import TrainTable
from mos_cli.training.stages import Curriculum

Kind = tuple[str, bool]
"""The kind of a step: the name of its stage, and whether it trains edits."""
Pick = Callable[[Random, int], tuple[Any, str]]
Collate = Callable[[list[Any]], Any]
Draw = Callable[[Any, int], Tensor]


@dataclass(frozen=True)
class Source:
    """A source of pictures and captions, or of edits and instructions.

    `pick` chooses one for a canvas, and `collate` turns a batch of them into tensors. Both need no device and may run
    in another process. `draw` makes the pictures of the tensors on the device, [B, N, 3, H, W] in -1..1, H = W =
    canvas: N = 1, or 2 with `edits`, the second before the edit. It does not work through the pictures one by one.
    """

    pick: Pick
    collate: Collate
    draw: Draw
    edits: bool = False
    name: Callable[[Random], str] | None = None
    """The name of the file that `pick` would choose."""
    static: bool = False
    """Batches of `pick` are one tensor of one shape, drawn by operations of the device alone."""
    captions: tuple[str, ...] = ()
    """All captions, of a source that has them in files."""
    held_out: Callable[[int], list[tuple[Any, str]]] | None = None
    """For a canvas, pictures that `pick` never chooses, and their captions."""
    bucket: Callable[[Random], "Source"] | None = None
    """Chooses the source of a step, whose pictures have one shape; None if all have."""
    buckets: tuple["Source", ...] = ()
    """The sources that `bucket` chooses from, with the held-out pictures of each shape."""


@dataclass(frozen=True)
class Mixture:
    """Two sources in one: each picture is of the second with the probability `share`."""

    first: Source
    second: Source
    share: float

    def source(self) -> Source:
        """The mixture as a source."""
        # Pictures of another shape cannot be in one batch with those of the second source.
        apart = self.first.bucket is not None
        return replace(
            self.first,
            pick=self._pick,
            collate=self._collate,
            draw=self._draw,
            name=self._name,
            static=False,
            held_out=None if self.first.held_out is None else self._held_out,
            bucket=self._bucket if apart else None,
        )

    def _bucket(self, random: Random) -> Source:
        assert self.first.bucket is not None
        return self.second if self._of(random) else self.first.bucket(random)

    def _held_out(self, canvas: int) -> list[tuple[Any, str]]:
        assert self.first.held_out is not None
        return [((0, picture), caption) for picture, caption in self.first.held_out(canvas)]

    def _of(self, random: Random) -> int:
        return int(random.random() < self.share)

    def _pick(self, random: Random, canvas: int) -> tuple[Any, str]:
        which = self._of(random)
        picture, caption = (self.first, self.second)[which].pick(random, canvas)
        return (which, picture), caption

    def _name(self, random: Random) -> str:
        which = self._of(random)
        source = (self.first, self.second)[which]
        return "a scene" if source.name is None else source.name(random)

    def _collate(self, picked: list[tuple[int, Any]]) -> tuple[list[Any], Tensor]:
        """The tensors of either source, None if nothing was picked of it, and the place of every picture in them."""
        own = [[picture for which, picture in picked if which == number] for number in (0, 1)]
        sources = zip((self.first, self.second), own, strict=True)
        parts = [source.collate(pictures) if pictures else None for source, pictures in sources]
        return parts, torch.tensor([which for which, _ in picked]).argsort(stable=True).argsort()

    def _draw(self, collated: tuple[list[Any], Tensor], canvas: int) -> Tensor:
        """The pictures of both sources, in the order in which they were picked."""
        parts, places = collated
        sources = zip((self.first, self.second), parts, strict=True)
        drawn = torch.cat([source.draw(part, canvas) for source, part in sources if part is not None])
        return drawn[places.to(drawn.device, non_blocking=True)]


@dataclass(frozen=True)
class Share:
    """The part of every batch that process `rank` of `processes` makes."""

    rank: int = 0
    processes: int = 1

    def of(self, batch: int) -> slice:
        size = batch // self.processes
        return slice(self.rank * size, (self.rank + 1) * size)


@dataclass(frozen=True)
class Picked:
    """The pictures of a step for this process, before they are drawn, and their captions.

    `captions` are their token numbers and their mask, [2, B, T]; for a tower with vision, which reads them with
    pictures, the captions themselves.
    """

    step: int
    pictures: Any
    captions: Tensor | list[str]

    def pin_memory(self) -> "Picked":
        """With tensors in memory that a GPU reads by itself; called by the DataLoader."""
        return replace(self, pictures=_pinned(self.pictures), captions=_pinned(self.captions))


@dataclass(frozen=True)
class Picks:
    """The part of making batches that needs no device, with a source for every kind of step.

    Args:
        tokenizer: of the understanding tower, if it has no vision.
        padded: the captions of static sources all have the same number of tokens, of which some are padding.
    """

    curriculum: Curriculum
    train: TrainTable
    sources: dict[Kind, Source]
    tokenizer: PromptTokenizer | None
    share: Share = Share()
    padded: bool = False

    def __getitem__(self, step: int) -> "Picked | MosError":
        """Errors are returned, not raised, because a worker process would add its own traceback."""
        stage = self.curriculum.stage_at(step)
        source = source_of(self.sources, self.curriculum, self.train.seed, step)
        part, pictures, captions = self.share.of(stage.batch), [], []
        try:
            for index in range(part.start, part.stop):
                random = Random(f"{self.train.seed}/{step}/{index}")
                picture, caption = source.pick(random, stage.canvas)
                pictures.append(picture)
                captions.append("" if random.random() < self.train.drop_caption else caption)
            return Picked(step, source.collate(pictures), self.readable(captions, padded=self.padded and source.static))
        except MosError as error:
            return error

    def readable(self, captions: list[str], *, padded: bool = False) -> Tensor | list[str]:
        """Captions as in `Picked`; raises UsageError for one that is too long.

        Args:
            padded: have as many tokens as there may be, not as many as the longest has.
        """
        tokenizer = self.tokenizer
        if tokenizer is None:
            return captions
        least = min(self.train.context_tokens, tokenizer.max_tokens) if padded else None
        try:
            batch = tokenizer([""] * len(captions), captions, least)
        except InputError:
            batch = None
        if batch is None or batch["input_ids"].shape[1] > self.train.context_tokens:
            raise too_long(captions, tokenizer, self.train.context_tokens)
        return torch.stack([batch["input_ids"], batch["attention_mask"]])  # type: ignore[list-item]


def too_long(captions: list[str], tokenizer: PromptTokenizer, context_tokens: int) -> UsageError:
    """The error that names the longest of captions."""
    tokens = [len(ids) for ids in tokenizer.tokenizer(captions, verbose=False)["input_ids"]]  # type: ignore[index]
    longest = captions[tokens.index(max(tokens))]
    return UsageError(
        f"the caption '{longest[:80]}' has {max(tokens)} tokens: shorten it, or raise context_tokens in the recipe "
        f"(now {context_tokens}; the understanding tower takes {tokenizer.max_tokens})"
    )


def kind_of(curriculum: Curriculum, seed: int, step: int) -> Kind:
    """The kind of a step: one for all its pictures, so that shapes are static."""
    stage = curriculum.stage_at(step)
    return stage.name, Random(f"{seed}/{step}/edits").random() < stage.edits


def source_of(sources: dict[Kind, Source], curriculum: Curriculum, seed: int, step: int) -> Source:
    """The source of a step's pictures, all of one shape."""
    source = sources[kind_of(curriculum, seed, step)]
    return source if source.bucket is None else source.bucket(Random(f"{seed}/{step}/bucket"))


def _pinned(value: Any) -> Any:
    """Tensors, also in lists and tuples, in pinned memory."""
    if isinstance(value, Tensor):
        return value.pin_memory()
    return type(value)(map(_pinned, value)) if isinstance(value, list | tuple) else value
