"""The prompts and pictures that arguments name: themselves, standard input, files of prompts, folders and lists."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mos_cli.cli.standard_files import picture_file
from mos_cli.errors import InputError
from mos_cli.utils.files import expand

if TYPE_CHECKING:
    from mos_cli.images.pictures import PictureFile

READ_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".avif", ".gif", ".tif", ".tiff", ".bmp"}
"""The names of pictures in a folder."""


def read_prompts(argument: str, advice: str) -> list[str]:
    """The prompts that an argument names: itself, or the lines of stdin (-) or of a file (@FILE).

    Lines that are empty or begin with # are left out.

    Raises:
        InputError: there are none, which `advice` helps with, or they cannot be read.
    """
    if argument == "-":
        if sys.stdin is None:
            raise InputError("stdin is closed: give the prompt itself, or @FILE")
        lines = _lines(sys.stdin.buffer.read(), "stdin")
    elif argument.startswith("@"):
        lines = _lines(expand(argument[1:]).read_bytes(), argument[1:])
    else:
        lines = [argument]
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"the prompt is empty: say {advice}")
    return prompts


def read_pictures(arguments: Sequence[Path]) -> "list[tuple[PictureFile, str]]":
    """The pictures that arguments name, and what messages call each: files, - for stdin, folders, lists (@FILE).

    A folder stands for the pictures in it, by name, without hidden files, previews of steps, and sheets.

    Raises:
        InputError: a folder or list has none, or cannot be read.
    """
    from mos_cli.images.companions import PREVIEWS_SUFFIX
    from mos_cli.images.sheets import is_sheet

    found: list[tuple[PictureFile, str]] = []
    for argument in arguments:
        if str(argument).startswith("@"):
            list_file = expand(str(argument)[1:])
            lines = [line.strip() for line in _lines(list_file.read_bytes(), str(list_file))]
            files = [expand(line) for line in lines if line]
        elif argument.is_dir():
            files = [
                path
                for path in sorted(argument.iterdir())
                if path.suffix.lower() in READ_SUFFIXES and not path.name.startswith(".")
                if not path.name.endswith(PREVIEWS_SUFFIX) and not is_sheet(path)
            ]
        else:
            if not argument.suffix and str(argument) != "-" and len(arguments) > 1 and not argument.exists():
                raise InputError(f"{argument} is not there: put a text of several words in quotes")
            files = [argument]
        if not files:
            raise InputError(f"{argument} has no pictures: name a folder or a list that has some")
        found += [(picture_file(file), str(file)) for file in files]
    return found


def _lines(data: bytes, source: str) -> list[str]:
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"the lines of {source} are not UTF-8 text") from None
    return [line for line in lines if not line.lstrip().startswith("#")]
