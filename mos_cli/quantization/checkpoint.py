"""Checkpoints of weights, read tensor by tensor.

A quantised checkpoint is one safetensors file with diffusers' usual name. The quantisation is described in its header.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from mos_cli.errors import ModelError
from mos_cli.quantization.method import HEADER, Quantisation
from mos_cli.utils.migration import current_weight
from mos_cli.utils.validation import PLAIN_NAME, first_problem

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "diffusion_pytorch_model.safetensors"
SHARDS = f"{WEIGHTS}.index.json"
GENERATION = "generation"


class Checkpoint:
    """The tensors of a folder in diffusers' format, one file or shards, read one at a time.

    Names of earlier versions are replaced. Files are not mapped into memory.

    Raises:
        ModelError: a file is missing or damaged, or its header is invalid.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self.folder = folder
        names = _shards(folder) if (folder / SHARDS).is_file() else (WEIGHTS,)
        self._files: dict[str, tuple[Any, str]] = {}
        metadata: dict[str, str] = {}
        for name in names:
            with _readable(folder / name):
                file: Any = safe_open(folder / name, framework="pt", backend="pread")
                metadata |= file.metadata() or {}
                self._files |= {current_weight(stored): (file, stored) for stored in list(file.keys())}
        self.quantisation = from_header(folder, metadata)

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def read(self, name: str) -> "Tensor":
        """One tensor, on the CPU; raises ModelError if it is missing or cannot be read."""
        if name not in self._files:
            raise ModelError(f"the weights in {self.folder} lack {name}")
        with _readable(self.folder):
            file, stored = self._files[name]
            return file.get_tensor(stored)


def _shards(folder: Path) -> tuple[str, ...]:
    """The names of the shards, from diffusers' index."""
    try:
        names = set(json.loads((folder / SHARDS).read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{folder / SHARDS} is damaged") from None
    if not all(isinstance(name, str) and re.fullmatch(PLAIN_NAME, name) for name in names):
        raise ModelError(f"{folder / SHARDS} names files that are not beside it")
    return tuple(sorted(names))


def from_header(folder: Path, metadata: dict[str, str]) -> Quantisation | None:
    if HEADER not in metadata:
        return None
    try:
        return Quantisation.model_validate_json(metadata[HEADER])
    except ValidationError as error:
        raise ModelError(f"the weights in {folder} are quantised in an unknown way: {first_problem(error)}") from None


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read as safetensors: {error}") from None
