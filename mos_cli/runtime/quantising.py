"""The files of a quantised tower: reading a checkpoint tensor by tensor, and writing a bundle whose tower is quantised.

A quantised checkpoint is one safetensors file under diffusers' usual name. What was done to it stands in its header,
so that it cannot be parted from it.
"""

import contextlib
import json
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from mos_cli.errors import InputError, ModelError
from mos_cli.runtime.bundles import INDEX, Bundle, check_new_name, verify_bundle, write_index
from mos_cli.runtime.files import make_folder
from mos_cli.runtime.shapes import Header
from mos_cli.runtime.specs import PLAIN_NAME, Frozen, first_problem

if TYPE_CHECKING:
    from torch import Tensor

Method = Literal["nf4", "int8"]
METHODS: dict[Method, str] = {"nf4": "4-bit NF4, double quantisation", "int8": "8-bit integers"}

WEIGHTS = "diffusion_pytorch_model.safetensors"
SHARDS = f"{WEIGHTS}.index.json"
GENERATION = "generation"
_HEADER = "mos_quantisation"


class Quantisation(Frozen):
    """How a network is quantised: the method, and what stays in high precision.

    `kept` names modules; everything below a module is kept with it.
    """

    method: Method
    kept: tuple[str, ...]

    def keeps(self, module: str) -> bool:
        """Whether a module is kept, by its full name."""
        return any(module == name or module.startswith(f"{name}.") for name in self.kept)

    @property
    def metadata(self) -> dict[str, str]:
        """What the header of a quantised file says."""
        return {"format": "pt", _HEADER: self.model_dump_json()}


class Checkpoint:
    """The tensors of a folder in diffusers' format, one file or shards, read one at a time.

    Nothing is mapped into memory: a tensor is there only while somebody holds it.

    Raises:
        ModelError: a file is missing, is no safetensors, or its header does not make sense.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self.folder = folder
        names = _shards(folder) if (folder / SHARDS).is_file() else (WEIGHTS,)
        self._files: dict[str, Any] = {}
        metadata: dict[str, str] = {}
        for name in names:
            with _readable(folder / name):
                file: Any = safe_open(folder / name, framework="pt", backend="pread")
                metadata |= file.metadata() or {}
                self._files |= dict.fromkeys(file.keys(), file)
        self.quantisation = _from_header(folder, metadata)

    @property
    def names(self) -> set[str]:
        return set(self._files)

    def read(self, name: str) -> "Tensor":
        """One tensor, on the CPU; raises ModelError if it is not there or cannot be read."""
        if name not in self._files:
            raise ModelError(f"the weights in {self.folder} lack {name}")
        with _readable(self.folder):
            return self._files[name].get_tensor(name)


def write_quantised_bundle(
    bundle: Bundle,
    folder: Path,
    method: Method,
    write_tower: Callable[[Path, Path], None],
    *,
    overwrite: bool = False,
) -> Bundle:
    """Writes `bundle` to `folder` with its generation tower quantised and everything else as it is.

    The folder appears whole or not at all, and its name is the new bundle's.

    Args:
        write_tower: writes the quantised tower of the first folder to the second, weights and config.
        overwrite: replace a bundle that is there; nothing else is ever replaced.

    Raises:
        InputError: the folder is there, or cannot be written: the disk is full, for one.
        ModelError: the bundle is damaged or quantised already.
    """
    folder = folder.expanduser().absolute()
    check_quantising(bundle, folder, overwrite=overwrite)
    verify_bundle(bundle)
    make_folder(folder.parent)
    made = folder.with_name(f".{secrets.token_hex(6)}")
    try:
        with _writing(folder):
            made.mkdir()
            for file in bundle.index.files:
                if not file.startswith(f"{GENERATION}/"):
                    target = made / file
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(bundle.folder / file, target)
            write_tower(bundle.folder / GENERATION, made / GENERATION)
            written = _described(bundle, made, folder.name, method)
            _put_in_place(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return replace(written, folder=folder)


def _described(bundle: Bundle, made: Path, name: str, method: Method) -> Bundle:
    """The bundle in `made`, told apart from the one it was made from in its card and its index."""
    if (card := made / "card.md").is_file():
        note = f"The generation tower is quantised: {METHODS[method]}. Made from `{bundle.ref}` {bundle.hash[:12]}."
        card.write_text(f"{card.read_text(encoding='utf-8').rstrip()}\n\n{note}\n", encoding="utf-8")
    index = bundle.index
    return write_index(
        made,
        name=name,
        description=f"{index.description} Quantised: {method}.",
        license=index.license,
        understanding=index.understanding,
        canvas=index.canvas,
        defaults=index.defaults,
        edits=index.edits,
    )


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise InputError(f"cannot write {folder}: {reason}") from None


def check_quantising(bundle: Bundle, folder: Path, *, overwrite: bool = False) -> None:
    """What `write_quantised_bundle` raises before it does anything, at no cost."""
    folder = folder.expanduser().absolute()
    check_new_name(folder)
    tower = bundle.folder / GENERATION
    if made := _from_header(tower, Header.of(tower).notes):
        raise ModelError(f"{bundle.ref} is quantised already ({made.method}): take the model that it was made from")
    source, target = bundle.folder.resolve(), folder.resolve()
    if source.is_relative_to(target) or target.is_relative_to(source):
        raise InputError(f"{folder} and the model it is made from lie in each other: choose another folder")
    if not folder.exists():
        return
    if not overwrite:
        raise InputError(f"{folder} exists: choose another name, or pass --overwrite")
    if not (folder / INDEX).is_file():
        raise InputError(f"{folder} is not a model: --overwrite replaces models only")


def _put_in_place(made: Path, folder: Path) -> None:
    if not folder.exists():
        made.rename(folder)
        return
    old = folder.with_name(f".{secrets.token_hex(6)}")
    folder.rename(old)
    made.rename(folder)
    shutil.rmtree(old)


def _shards(folder: Path) -> tuple[str, ...]:
    """The names of the shards, from diffusers' index; they lie beside it."""
    try:
        names = set(json.loads((folder / SHARDS).read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{folder / SHARDS} is damaged") from None
    if not all(isinstance(name, str) and re.fullmatch(PLAIN_NAME, name) for name in names):
        raise ModelError(f"{folder / SHARDS} names files that are not beside it")
    return tuple(sorted(names))


def _from_header(folder: Path, metadata: dict[str, str]) -> Quantisation | None:
    if _HEADER not in metadata:
        return None
    try:
        return Quantisation.model_validate_json(metadata[_HEADER])
    except ValidationError as error:
        raise ModelError(f"the weights in {folder} are quantised in an unknown way: {first_problem(error)}") from None


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read as safetensors: {error}") from None
