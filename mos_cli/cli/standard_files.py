"""`-` as the name of a file: a picture from standard input, or to standard output."""

import sys
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from mos_cli.errors import InputError, UsageError

if TYPE_CHECKING:
    from mos_cli.images.pictures import PictureFile

DASH = Path("-")
LARGEST = 2**30
"""Bytes of standard input that are read at most."""


def check_one_input(*names: object) -> None:
    """Raises UsageError if more than one argument is to be read from standard input."""
    if sum(str(name) == "-" for name in names) > 1:
        raise UsageError("only one of the arguments can be -, standard input: name a file for the others")


def picture_file(path: Path) -> "PictureFile":
    """The path of a picture or a mask, or for `-` what standard input holds.

    Raises:
        InputError: it is a trace; or standard input is closed, a terminal, or too large.
    """
    if path.suffix.lower() == ".json":
        raise InputError(f"{path} is no picture: name the one that it stands beside")
    if path != DASH:
        return path
    if sys.stdin is None or sys.stdin.isatty():
        raise InputError("standard input has no picture: pipe one into it, as in `cat a.png | mos edit - ...`")
    data = sys.stdin.buffer.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise InputError(f"standard input is too large: {LARGEST >> 20} MiB at most")
    return BytesIO(data)


def check_output(output: str, *, json: bool, trace: str | None, regions: bool, previews: bool) -> None:
    """Checks whether a picture can go to standard output, if it is named.

    Args:
        json: events are printed there.
        trace: the level that is requested, if any.

    Raises:
        UsageError: it cannot.
    """
    if output != "-":
        return
    if json:
        raise UsageError("-o - writes the picture to standard output, and --json its events: drop one of the two")
    for option, requested in {"--regions": regions, "--preview-steps": previews}.items():
        if requested:
            raise UsageError(f"-o - writes the picture alone: drop {option}, or name a file")
    if trace not in (None, "off"):
        raise UsageError(f"-o - writes the picture alone, without a trace: replace --trace {trace} by --trace off")
    if sys.stdout is None or sys.stdout.isatty():
        raise UsageError("-o - writes the bytes of a PNG, and standard output is no pipe or file: add > a.png")
