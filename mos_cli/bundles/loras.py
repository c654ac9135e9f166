"""LoRA files: naming them with a scale, and finding them again by their hash. Imports no torch.

A LoRA is one safetensors file in diffusers' format, small changes of the linear layers of a network. The file is not
part of a bundle: a picture's recipe has its sha256 and scale.
"""

import json
import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mos_cli.errors import InputError, UsageError
from mos_cli.utils.files import atomic_write, expand, make_folder, sha256_of
from mos_cli.utils.folders import user_data_folder

SUFFIX = ".safetensors"
SHA256_DIGITS = 64
LORA_METADATA = "lora_adapter_metadata"
"""The entry of a file's header in which diffusers keeps peft's settings."""


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file and the factor of its changes."""

    path: Path
    scale: float = 1.0

    def __str__(self) -> str:
        return f"{self.path}:{self.scale:g}"


def check_lora_name(path: Path) -> None:
    """Raises InputError for a name that a LoRA cannot be written under."""
    if path.suffix.lower() != SUFFIX:
        raise InputError(f"{path}: a LoRA is one file, choose a name that ends in {SUFFIX}")


def parse_lora(text: str) -> LoraFile:
    """The file and scale of PATH or PATH:SCALE.

    Raises:
        UsageError: the scale is no number.
        InputError: there is no such file, or it is no safetensors.
    """
    path, colon, last = text.rpartition(":")
    # The colon of a drive is followed by a separator, and a file may have one in its name.
    if not colon or expand(text).is_file() or last[:1] in ("/", "\\"):
        path, last = text, "1"
    try:
        scale = float(last)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise UsageError(f"--lora {text}: write FILE or FILE:SCALE, for example my.safetensors:0.8")
    file = expand(path)
    if not file.is_file():
        raise InputError(f"there is no LoRA file {path}")
    if file.suffix.lower() != SUFFIX:
        raise InputError(f"{path} is no LoRA file: its name must end in {SUFFIX}")
    return LoraFile(file, scale)


def find_lora(name: str, sha256: str, given: Iterable[LoraFile]) -> Path:
    """The LoRA file of a hash: among those given, or where one was last used.

    Raises:
        InputError: there is none.
    """
    others = []
    for file in given:
        if sha256_of(file.path) == sha256:
            return file.path
        others.append(str(file.path))
    used = _last_used(sha256)
    if used is not None and used.is_file() and sha256_of(used) == sha256:
        return used
    there = "which is not known here" if used is None else f"which is no longer at {used}"
    if others:
        there = f"and {', '.join(others)} is another"
    raise InputError(f"this was drawn with the LoRA {name} (sha256 {sha256[:10]}), {there}: name it with --lora FILE")


def record_lora(path: Path, sha256: str) -> None:
    """Records where a LoRA file is in the user's data folder, for pictures drawn with it."""
    # Drawing does not depend on it, so a data folder that cannot be written to is no error.
    with suppress(OSError, InputError):
        make_folder(_locations())
        atomic_write(_locations() / sha256, f"{path.resolve()}\n".encode(), overwrite=True)


@dataclass(frozen=True)
class KnownLora:
    """A LoRA file that was drawn with or made here, by its hash; `there` says whether the file is still that."""

    sha256: str
    path: Path
    there: bool
    model: str | None
    """The model that it was trained on; None for a file of another program."""


def known_loras() -> list[KnownLora]:
    """The LoRA files that were drawn with or made here, sorted by name."""
    known = []
    for record in sorted(_locations().glob("*")) if _locations().is_dir() else ():
        if len(record.name) == SHA256_DIGITS and (path := _last_used(record.name)) is not None:
            there = path.is_file() and sha256_of(path) == record.name
            known.append(KnownLora(record.name, path, there, read_metadata(path).get("model") if there else None))
    return sorted(known, key=lambda lora: (lora.path.name, str(lora.path)))


def forget_lora(sha256: str) -> None:
    """Removes what is recorded of a LoRA; the file stays."""
    (_locations() / sha256).unlink(missing_ok=True)


def read_metadata(path: Path) -> dict[str, Any]:
    """The settings in a LoRA file's header, those of peft without the prefix; empty where it has none.

    Raises:
        InputError: the file is no safetensors.
    """
    try:
        with path.open("rb") as file:
            head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        metadata = dict(head.get("__metadata__", {}))
        settings = json.loads(metadata.get(LORA_METADATA, "{}"))
        return metadata | {name.rpartition(".")[2]: value for name, value in settings.items()}
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, MemoryError):
        raise InputError(f"{path} is no LoRA file, or damaged") from None


def _last_used(sha256: str) -> Path | None:
    # The hash comes from a picture, which is not trusted; `Sha256` has checked its form.
    try:
        return Path((_locations() / sha256).read_text(encoding="utf-8").strip())
    except (OSError, UnicodeDecodeError):
        return None


def _locations() -> Path:
    return user_data_folder() / "loras"
