"""Pictures with captions in files: a folder of them, or webdataset shards.

The content of the folder decides among three layouts:
- `*.tar`: webdataset shards, with `KEY.jpg` (png, webp) and `KEY.txt`;
- `metadata.jsonl`: lines with `file_name` and `text` (Hugging Face's imagefolder);
- else pictures anywhere below the folder, with `NAME.txt` beside `NAME.jpg`.

An edit has the picture it starts from as well, and its caption is the instruction: `KEY.before.jpg`, `before` in the
index, or `NAME.before.jpg`.

Shapes: H x W the canvas, B batch.
"""

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mos_cli.errors import InputError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
BEFORE = ".before"


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


@dataclass(frozen=True)
class Captioned:
    """All examples of a folder, which are read when they are picked."""

    examples: tuple[Example, ...]

    @property
    def pictures(self) -> "Captioned":
        """The examples that are not edits."""
        return Captioned(tuple(example for example in self.examples if example.before is None))

    @property
    def edits(self) -> "Captioned":
        """The examples that are edits."""
        return Captioned(tuple(example for example in self.examples if example.before is not None))

    def pick(self, random: Random, canvas: int) -> tuple[np.ndarray, str]:
        """A random example: the picture and, for an edit, the one before, uint8 [1 or 2, H, W, 3], and the caption.

        Pictures are scaled and cropped to the canvas.

        Raises:
            InputError: a picture or the caption cannot be read; it is named.
        """
        example = random.choice(self.examples)
        caption = example.caption
        if isinstance(caption, Blob):
            try:
                caption = caption.read().decode()
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"cannot read the caption {caption.name}: {error}") from None
        blobs = (example.picture,) if example.before is None else (example.picture, example.before)
        opened = [_opened(blob) for blob in blobs]
        if len({image.size for image in opened}) > 1:
            raise InputError(f"{example.picture.name} and the picture before it are of different sizes")
        fitted = [ImageOps.fit(image, (canvas, canvas), Image.Resampling.LANCZOS) for image in opened]
        return np.stack([np.asarray(image) for image in fitted]), " ".join(caption.split())


def load_captioned(folder: Path) -> Captioned:
    """Finds the pictures and captions of a folder without opening the pictures; sorted by name.

    Raises:
        InputError: there are none, or a picture has no caption; it is named.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: [data] path is where the pictures with captions lie")
    if shards := sorted(folder.glob("*.tar")):
        examples = [example for shard in shards for example in _in_shard(shard)]
    elif (index := folder / "metadata.jsonl").is_file():
        examples = _in_index(index)
    else:
        pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        examples = _beside(pictures, folder)
    if not examples:
        raise InputError(f"no pictures in {folder}: put {', '.join(sorted(SUFFIXES))} files there, or *.tar shards")
    return Captioned(tuple(examples))


def to_device(picked: list[np.ndarray], device: torch.device, which: int = 0) -> Tensor:
    """The picked pictures, or with `which` 1 those before, as [B, 3, H, W] in -1..1."""
    batch_BHW3 = torch.from_numpy(np.stack([example[which] for example in picked])).to(device)
    return batch_BHW3.permute(0, 3, 1, 2).float() / 127.5 - 1


def _opened(picture: Blob) -> Image.Image:
    try:
        with Image.open(io.BytesIO(picture.read())) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read the picture {picture.name}: {error}") from None


def _beside(pictures: list[Path], folder: Path) -> list[Example]:
    befores = {path.with_suffix("").with_suffix(""): path for path in pictures if path.stem.endswith(BEFORE)}
    examples = []
    for path in pictures:
        if path.stem.endswith(BEFORE):
            continue
        caption = path.with_suffix(".txt")
        if not caption.is_file():
            raise InputError(f"{path.relative_to(folder)} has no caption: write one into {caption}")
        before = befores.pop(path.with_suffix(""), None)
        examples.append(_example(path, Blob(str(caption), caption), before))
    for before in befores.values():
        raise InputError(f"{before.relative_to(folder)} has no picture after it beside it")
    return examples


def _example(path: Path, caption: Blob | str, before: Path | None) -> Example:
    return Example(Blob(str(path), path), caption, None if before is None else Blob(str(before), before))


def _in_index(index: Path) -> list[Example]:
    examples = []
    for number, line in enumerate(index.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            path, caption = index.parent / entry["file_name"], entry["text"]
            before = index.parent / entry["before"] if entry.get("before") else None
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{index}, line {number}: not a JSON object with file_name and text") from None
        for named in (path, before):
            if named is not None and not named.is_file():
                raise InputError(f"{index}, line {number}: there is no {named}")
        examples.append(_example(path, str(caption), before))
    return examples


def _in_shard(shard: Path) -> list[Example]:
    pictures: dict[str, Blob] = {}
    befores: dict[str, Blob] = {}
    captions: dict[str, Blob] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                # The key ends at the first dot of the file's name, as in webdataset.
                parent, _, name = member.name.rpartition("/")
                key, _, suffix = name.partition(".")
                key, kind = f"{parent}/{key}", f".{suffix.lower()}"
                blob = Blob(f"{member.name} in {shard}", shard, member.offset_data, member.size)
                if member.isfile() and kind in SUFFIXES:
                    pictures[key] = blob
                elif member.isfile() and kind.startswith(BEFORE) and kind.removeprefix(BEFORE) in SUFFIXES:
                    befores[key] = blob
                elif member.isfile() and kind == ".txt":
                    captions[key] = blob
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"cannot read the shard {shard}: {error}") from None
    for key, picture in pictures.items():
        if key not in captions:
            raise InputError(f"{picture.name} has no caption: a .txt of the same name belongs beside it")
    for key in befores.keys() - pictures.keys():
        raise InputError(f"{befores[key].name} has no picture after it beside it")
    return [Example(picture, captions[key], befores.get(key)) for key, picture in pictures.items()]
