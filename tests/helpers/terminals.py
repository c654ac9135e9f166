"""Terminals: a pseudo terminal that answers as kitty, as one with sixels, or as one that shows no pictures."""

import base64
import fcntl
import os
import re
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from PIL import Image

QUERY = re.compile(rb"\x1b\[c|\x1b_Gi=(\d+),[^;\x1b]*a=q[^\x1b]*\x1b\\")
SENT = re.compile(rb"\x1b_Gi=(\d+),m=([01]),f=100,q=2;([^\x1b]*)\x1b\\")
SIXELS = re.compile(rb'\x1bP[\d;]*q"1;1;(\d+);(\d+)[^\x1b]*\x1b\\')
PATIENT = """
import sys
from textual_image import _posix
read = _posix.read
_posix.read = lambda stream, length, timeout=None: read(stream, length, 30)
from mos_cli.__main__ import main
main()
"""
"""The command, which waits for the answers of a terminal on a busy machine."""


@dataclass
class Shown:
    """What a command wrote to a terminal, and its exit code."""

    code: int
    output: bytes

    @property
    def text(self) -> str:
        """Without control sequences."""
        plain = re.sub(rb"\x1b_[^\x1b]*\x1b\\|\x1bP[^\x1b]*\x1b\\|\x1b\[[\d;?]*[a-zA-Z]|\x1b[78]", b"", self.output)
        return plain.decode().replace("\r", "")

    @property
    def kitty(self) -> list[Image.Image]:
        """The pictures that were sent by kitty's protocol."""
        parts: dict[bytes, bytes] = {}
        for number, _, data in SENT.findall(self.output):
            parts[number] = parts.get(number, b"") + data
        return [Image.open(BytesIO(base64.b64decode(data))) for data in parts.values()]

    @property
    def sixels(self) -> list[tuple[int, int]]:
        """The sizes of the pictures that were sent as sixels."""
        return [(int(width), int(height)) for width, height in SIXELS.findall(self.output)]


def in_terminal(
    line: "Sequence[object] | str",
    kind: str = "none",
    *,
    size: tuple[int, int] = (40, 100),
    environment: dict[str, str] | None = None,
    **streams: Any,
) -> Shown:
    """Runs a command in a terminal of 10 x 20 pixels a cell.

    Args:
        line: what follows `mos`, or a line for a shell.
        kind: "kitty", "sixel", or "none".
        size: rows and columns.
        streams: which of the standard streams are not the terminal.
    """
    terminal, side = os.openpty()
    rows, columns = size
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 10 * columns, 20 * rows))
    # The runner of tests in parallel says of its own terminal how large it is.
    inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    code = "from mos_cli.__main__ import main; main()" if kind == "none" else PATIENT
    typed = ["bash", "-c", line] if isinstance(line, str) else [sys.executable, "-c", code, *map(str, line)]
    process = subprocess.Popen(
        typed,
        env=inherited | {"TERM": "xterm-256color"} | (environment or {}),
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(side, termios.TIOCSCTTY, 0),
        **{"stdin": side, "stdout": side, "stderr": side} | streams,
    )
    os.close(side)
    output = b""

    def answer() -> None:
        nonlocal output
        answered = 0
        while part := _read(terminal):
            output += part
            while query := QUERY.search(output, answered):
                answered = query.end()
                if query[0] == b"\x1b[c":
                    os.write(terminal, b"\x1b[?62;4c" if kind == "sixel" else b"\x1b[?62c")
                elif kind == "kitty":
                    os.write(terminal, b"\x1b_Gi=" + query[1] + b";OK\x1b\\")

    reader = threading.Thread(target=answer)
    reader.start()
    process.wait()
    reader.join()
    os.close(terminal)
    return Shown(process.returncode, output)


def _read(terminal: int) -> bytes:
    """What was written to a terminal; nothing when nobody has it open any more."""
    try:
        return os.read(terminal, 2**16)
    except OSError:
        return b""
