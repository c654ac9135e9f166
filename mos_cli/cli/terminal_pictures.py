"""Pictures in the terminal, by kitty's graphics protocol or as sixels: the extra `terminal`."""

import logging
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Console

from mos_cli.cli.output import Report
from mos_cli.utils.extras import require

if TYPE_CHECKING:
    from PIL.Image import Image

    Show = Callable[[Image], None]

MOST_COLUMNS = 297
"""Kitty's protocol numbers no further ones."""


def picture_printer(wanted: bool, report: Report) -> "Show | None":
    """What prints pictures in the terminal; None where it is not wanted, or cannot, which is said in one line.

    It asks the terminal what it can, and so is called before anything else is read from it or drawn there.

    Raises:
        UsageError: the extra is not installed.
    """
    if not wanted or report.quiet or report.json:
        return None
    require("--preview", "terminal", "textual_image")
    kind, reason = _protocol()
    if kind is None:
        report.note("note", f"--preview shows nothing: {reason}", note=reason)
        return None
    # Kitty reads from the colour of the text which picture it stands for.
    console = Console(force_terminal=True, color_system="truecolor", no_color=False)

    def show(image: "Image") -> None:
        # As large as half of the terminal's height and its width allow.
        width, height = min(console.width, MOST_COLUMNS), max(1, console.height // 2)
        try:
            console.print(kind(image, "auto", "auto"), soft_wrap=True, width=width, height=height)
        except ValueError:
            # textual-image 0.12, the last for Python 3.11, scales it to no pixels.
            report.note("note", note := "--preview shows no picture as narrow as this", note=note)

    return show


def _protocol() -> tuple[Any, str]:
    """The library's renderable of a picture for this terminal, or None and why there is none."""
    streams = (sys.__stdin__, sys.__stdout__)
    if not all(stream is not None and stream.isatty() for stream in streams):
        return None, "standard input and output are no terminal"
    if _in_background():
        # The system stops a process that asks the terminal from there.
        return None, "the command runs in the background"
    if 0 in os.get_terminal_size(1):
        return None, "the terminal has no size"
    # It warns, with a traceback, of terminals that do not answer.
    logging.getLogger("textual_image").setLevel(logging.ERROR)
    # It asks the terminal when it is imported.
    from textual_image.renderable import Image, SixelImage, TGPImage  # pyright: ignore[reportMissingImports]

    if Image not in (SixelImage, TGPImage):
        return None, "this terminal has neither kitty's graphics nor sixels"
    return Image, ""


def _in_background() -> bool:
    try:
        return os.tcgetpgrp(0) != os.getpgrp()
    except (AttributeError, OSError):
        # There are no jobs on this system, or in this terminal.
        return False
