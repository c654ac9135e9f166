"""Writing a bundle whose generation tower is quantised."""

import contextlib
import json
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from mos_cli.bundles.bundle import INDEX, Bundle, check_new_name, verify_bundle, write_index
from mos_cli.bundles.shapes import Header
from mos_cli.errors import InputError, ModelError
from mos_cli.quantization.checkpoint import GENERATION, from_header
from mos_cli.quantization.method import METHODS, Method
from mos_cli.utils.files import expand, make_folder, replace_folder
from mos_cli.utils.migration import CLASSES, current_file, current_recipe


def write_quantised_bundle(
    bundle: Bundle,
    folder: Path,
    method: Method,
    write_tower: Callable[[Path, Path], None],
    *,
    overwrite: bool = False,
) -> Bundle:
    """Writes `bundle` to `folder` with its generation tower quantised and everything else as it is.

    The folder appears whole or not at all, and its name is the new bundle's. Only new names of fields and folders are
    written.

    Args:
        write_tower: writes the quantised tower of the first folder to the second, weights and config.
        overwrite: replace a bundle that is there; nothing else is ever replaced.

    Raises:
        InputError: the folder is there, or cannot be written: the disk is full, for one.
        ModelError: the bundle is damaged or quantised already.
    """
    folder = expand(folder).absolute()
    check_quantising(bundle, folder, overwrite=overwrite)
    verify_bundle(bundle)
    make_folder(folder.parent)
    made = folder.with_name(f".{secrets.token_hex(6)}")
    try:
        with _writing(folder):
            made.mkdir()
            for file in bundle.index.files:
                if not file.startswith(f"{GENERATION}/"):
                    _copy(bundle.folder, file, made)
            write_tower(bundle.folder / GENERATION, made / GENERATION)
            written = _described(bundle, made, folder.name, method)
            replace_folder(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return replace(written, folder=folder)


def _copy(source: Path, file: str, made: Path) -> None:
    """Copies a file of a bundle. Names of earlier versions are replaced: the result is a new bundle."""
    target = made / current_file(file)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / file, target)
    if file == "recipe.json":
        fields = current_recipe(json.loads(target.read_bytes()))
    elif current_file(file) == "image_encoder/config.json":
        config = json.loads(target.read_bytes())
        fields = {**config, "_class_name": CLASSES.get(config["_class_name"], config["_class_name"])}
    else:
        return
    target.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _described(bundle: Bundle, made: Path, name: str, method: Method) -> Bundle:
    """The bundle in `made`, with a note in its card and its index of what it was made from."""
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
    """Raises what `write_quantised_bundle` would, before anything is written."""
    folder = expand(folder).absolute()
    check_new_name(folder)
    tower = bundle.folder / GENERATION
    if made := from_header(tower, Header.of(tower).metadata):
        raise ModelError(f"{bundle.ref} is quantised already ({made.method}): take the model that it was made from")
    source, target = bundle.folder.resolve(), folder.resolve()
    if source.is_relative_to(target) or target.is_relative_to(source):
        raise InputError(f"{folder} and the model it is made from contain each other: choose another folder")
    if not folder.exists():
        return
    if not overwrite:
        raise InputError(f"{folder} exists: choose another name, or pass --overwrite")
    if not (folder / INDEX).is_file():
        raise InputError(f"{folder} is not a model: --overwrite replaces models only")
