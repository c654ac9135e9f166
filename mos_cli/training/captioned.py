"""Pictures with captions in files: a folder of them, or webdataset shards.

Three layouts, told apart by what lies in the folder:
- `*.tar`: webdataset shards, `KEY.jpg` (png, webp) and `KEY.txt` side by side in each;
- `metadata.jsonl`: lines with `file_name` and `text` (Hugging Face's imagefolder);
- else pictures anywhere below the folder, with `NAME.txt` beside `NAME.jpg`.

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


@dataclass(frozen=True)
class Blob:
    """A file on the disk, or `size` bytes from `offset` of a shard; `name` is what people know it by."""

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
    """A picture and its caption, which may also be text that was in an index already."""

    picture: Blob
    caption: Blob | str


@dataclass(frozen=True)
class Captioned:
    """All examples of a folder; any of them can be picked at once, without reading the others."""

    examples: tuple[Example, ...]

    def pick(self, random: Random, canvas: int) -> tuple[np.ndarray, str]:
        """A picture, filling the canvas and cropped in the middle (uint8 [H, W, 3]), and its caption.

        Raises:
            InputError: the picture or the caption cannot be read; it is named.
        """
        example = random.choice(self.examples)
        caption = example.caption
        if isinstance(caption, Blob):
            try:
                caption = caption.read().decode()
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"cannot read the caption {caption.name}: {error}") from None
        try:
            with Image.open(io.BytesIO(example.picture.read())) as opened:
                image = ImageOps.exif_transpose(opened).convert("RGB")
                fitted = ImageOps.fit(image, (canvas, canvas), Image.Resampling.LANCZOS)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"cannot read the picture {example.picture.name}: {error}") from None
        return np.asarray(fitted), " ".join(caption.split())


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
        examples = [_beside(path, folder) for path in pictures]
    if not examples:
        raise InputError(f"no pictures in {folder}: put {', '.join(sorted(SUFFIXES))} files there, or *.tar shards")
    return Captioned(tuple(examples))


def to_device(pictures: list[np.ndarray], device: torch.device) -> Tensor:
    """Picked pictures as [B, 3, H, W] in -1..1."""
    batch_BHW3 = torch.from_numpy(np.stack(pictures)).to(device)
    return batch_BHW3.permute(0, 3, 1, 2).float() / 127.5 - 1


def _beside(path: Path, folder: Path) -> Example:
    caption = path.with_suffix(".txt")
    if not caption.is_file():
        raise InputError(f"{path.relative_to(folder)} has no caption: write one into {caption}")
    return Example(Blob(str(path), path), Blob(str(caption), caption))


def _in_index(index: Path) -> list[Example]:
    examples = []
    for number, line in enumerate(index.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            entry = json.loads(line)
            path, caption = index.parent / entry["file_name"], entry["text"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{index}, line {number}: not a JSON object with file_name and text") from None
        if not path.is_file():
            raise InputError(f"{index}, line {number}: there is no {path}")
        examples.append(Example(Blob(str(path), path), str(caption)))
    return examples


def _in_shard(shard: Path) -> list[Example]:
    pictures: dict[str, Blob] = {}
    captions: dict[str, Blob] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                # The key ends at the first dot of the file's name, as webdataset has it.
                parent, _, name = member.name.rpartition("/")
                key, _, suffix = name.partition(".")
                key, kind = f"{parent}/{key}", f".{suffix.lower()}"
                blob = Blob(f"{member.name} in {shard}", shard, member.offset_data, member.size)
                if member.isfile() and kind in SUFFIXES:
                    pictures[key] = blob
                elif member.isfile() and kind == ".txt":
                    captions[key] = blob
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"cannot read the shard {shard}: {error}") from None
    for key, picture in pictures.items():
        if key not in captions:
            raise InputError(f"{picture.name} has no caption: a .txt of the same name belongs beside it")
    return [Example(picture, captions[key]) for key, picture in pictures.items()]
