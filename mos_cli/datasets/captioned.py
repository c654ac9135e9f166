"""Pictures with captions, and edits, that are read when they are picked; `captioned_folders` finds them.

Shapes: H x W the size of a picture, B batch.
"""

import io
import logging
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mos_cli.errors import InputError
from mos_cli.images.pictures import over, read_picture

ATTEMPTS = 100
"""Examples that are tried in a row for one place of a batch before a run gives up."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Blob:
    """A file on the disk, or `size` bytes from `offset` of a shard; `name` is for messages."""

    name: str
    path: Path
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class Example:
    """A picture and its caption, a file or text from an index; for an edit, also the picture before."""

    picture: Blob
    caption: Blob | str
    before: Blob | None = None
    folder: str = ""
    """The name of its folder."""
    size: tuple[int, int] = (1, 1)
    """Its width and height."""


@dataclass(frozen=True)
class Unused:
    """A file that is not used, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Captioned:
    """The examples of a folder that can be used, whose pictures are read when they are picked, and the other files.

    `held_out` are further examples, which are never picked. `background` is the colour behind transparent parts; with
    `flip` half of the pictures are mirrored; `repeats` are the weights of folders. Pictures get the `shape`, width and
    height; without one they are squares of the canvas.
    """

    examples: tuple[Example, ...]
    unused: tuple[Unused, ...] = ()
    held_out: tuple[Example, ...] = ()
    background: str = "white"
    flip: bool = False
    repeats: Mapping[str, int] = field(default_factory=dict)
    shape: tuple[int, int] | None = None
    _skipped: set[str] = field(default_factory=set, compare=False)

    @property
    def pictures(self) -> "Captioned":
        """The examples that are not edits."""
        return self._only(lambda example: example.before is None)

    @property
    def edits(self) -> "Captioned":
        """The examples that are edits."""
        return self._only(lambda example: example.before is not None)

    def buckets(self, shape_of: Callable[[tuple[int, int]], tuple[int, int]]) -> "tuple[Captioned, ...]":
        """The examples by the shape that each size gets, the narrowest first."""
        shapes = {example: shape_of(example.size) for example in self.examples}
        held_out = {example: shape_of(example.size) for example in self.held_out}
        return tuple(
            replace(
                self,
                examples=tuple(example for example, own in shapes.items() if own == shape),
                held_out=tuple(example for example, own in held_out.items() if own == shape),
                shape=shape,
            )
            for shape in sorted({*shapes.values(), *held_out.values()})
        )

    def _only(self, kept: Callable[[Example], bool]) -> "Captioned":
        return replace(self, examples=tuple(filter(kept, self.examples)), held_out=tuple(filter(kept, self.held_out)))

    @cached_property
    def weights(self) -> tuple[int, ...]:
        """How often the examples up to each are shown, those of repeated folders more than once."""
        return tuple(accumulate(self.repeats.get(example.folder, 1) for example in self.examples))

    def choose(self, random: Random) -> Example:
        """A random example, those of repeated folders as much more often."""
        if not self.repeats:
            return random.choice(self.examples)
        return random.choices(self.examples, cum_weights=self.weights)[0]

    def pick(self, random: Random, canvas: int) -> tuple[np.ndarray, str]:
        """A random example: the picture and, for an edit, the one before, uint8 [1 or 2, H, W, 3], and the caption.

        One that can no longer be read is reported once and passed over.

        Raises:
            InputError: none of many can be read.
        """
        attempts = 0
        while True:
            attempts += 1
            example = self.choose(random)
            try:
                return self.load(example, self._size(canvas), mirrored=self.flip and random.random() < 0.5)
            except InputError as error:
                if example.picture.name not in self._skipped:
                    self._skipped.add(example.picture.name)
                    _log.warning("skipped, it has changed since the data was checked: %s", error)
                if attempts == ATTEMPTS:
                    such = f"{ATTEMPTS} in a row, such as {min(self._skipped)}"
                    raise InputError(f"the pictures can no longer be read: {such}") from None

    def load_held_out(self, canvas: int) -> list[tuple[np.ndarray, str]]:
        """The held-out examples that can still be read, as `pick` returns them."""
        loaded = []
        for example in self.held_out:
            with suppress(InputError):
                loaded.append(self.load(example, self._size(canvas)))
        return loaded

    def _size(self, canvas: int) -> tuple[int, int]:
        return self.shape or (canvas, canvas)

    def load(self, example: Example, size: tuple[int, int], *, mirrored: bool = False) -> tuple[np.ndarray, str]:
        """An example as `pick` returns it, scaled and cropped to a width and height.

        Raises:
            InputError: it cannot be read.
        """
        blobs = (example.picture,) if example.before is None else (example.picture, example.before)
        opened = [open_blob(blob, self.background) for blob in blobs]
        if len({image.size for image in opened}) > 1:
            raise InputError(f"{example.picture.name} and the picture before it are of different sizes")
        fitted = [ImageOps.fit(image, size, Image.Resampling.LANCZOS) for image in opened]
        if mirrored:
            fitted = [ImageOps.mirror(image) for image in fitted]
        return np.stack([np.asarray(image) for image in fitted]), caption_of(example)


def bucket_shape(size: tuple[int, int], canvas: int, *, multiple: int, smallest: int, largest: int) -> tuple[int, int]:
    """The width and height for a picture of a size: the nearest to its shape.

    Sides are multiples of `multiple` from `smallest` to `largest`, and the area is at most that of the square canvas
    and at least half of it (aspect ratio buckets, as in NovelAI's improvements on Stable Diffusion, 2022).
    """
    shapes = [(canvas, canvas)]
    for width in range(-(-smallest // multiple) * multiple, largest + 1, multiple):
        height = min(canvas**2 // width, largest) // multiple * multiple
        if height >= smallest and 2 * width * height >= canvas**2:
            shapes += [(width, height), (height, width)]
    wanted = math.log(size[0] / size[1])
    return min(shapes, key=lambda shape: (abs(math.log(shape[0] / shape[1]) - wanted), -shape[0] * shape[1]))


def caption_of(example: Example) -> str:
    """The caption of an example in one line; raises InputError if it cannot be read."""
    text = example.caption
    return " ".join((text_of(text) if isinstance(text, Blob) else text).split())


def collate(picked: list[np.ndarray]) -> Tensor:
    """A batch of picked pictures, uint8 [B, 1 or 2, H, W, 3]."""
    return torch.from_numpy(np.stack(picked))


def to_device(pictures_BNHW3: Tensor, device: torch.device, which: int = 0) -> Tensor:
    """The pictures, or with `which` 1 those before, as [B, 3, H, W] in -1..1."""
    batch_BHW3 = pictures_BNHW3[:, which].to(device, non_blocking=True)
    return batch_BHW3.permute(0, 3, 1, 2).float() / 127.5 - 1


def open_blob(picture: Blob, background: str) -> Image.Image:
    """A picture as RGB, transparent parts over the background; raises InputError if it cannot be read."""
    if picture.size < 0:
        return over(read_picture(picture.path).image, background)
    try:
        return over(read_picture(io.BytesIO(picture.read())).image, background)
    except (InputError, OSError):
        raise InputError(f"{picture.name} is no picture that can be read, or damaged") from None


def text_of(blob: Blob) -> str:
    """The text of a file in UTF-8 or, with a mark at its beginning, UTF-16; raises InputError."""
    try:
        data = blob.read()
    except OSError as error:
        raise InputError(f"cannot read {blob.name}: {error.strerror}") from None
    try:
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"{blob.name}, line {line}: not UTF-8 text: save it as UTF-8") from None
