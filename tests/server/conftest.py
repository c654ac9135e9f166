"""A server with a tiny model, and one whose pictures are drawn when the test says so."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mos_cli.bundles.bundle import Bundle
from mos_cli.server.state import ServerState, read_state
from tests.helpers.running_server import Gate, RunningServer, running_server, until


@pytest.fixture
def server(editor: Bundle) -> Iterator[RunningServer]:
    """Draws and edits with the tiny model "editor"."""
    with running_server() as running:
        yield running


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open.set()


@pytest.fixture
def gated(bundle: Bundle, gate: Gate) -> Iterator[RunningServer]:
    """Its queue has room for three."""
    with running_server(draw=gate, limit=3) as running:
        yield running
        gate.open.set()


@pytest.fixture
def started(editor: Bundle, tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen, ServerState]]]:
    """Starts `mos serve` as a user does, and waits until it can be found."""
    processes = []

    def start(*options: str) -> tuple[subprocess.Popen, ServerState]:
        line = [sys.executable, "-m", "mos_cli", "serve", "--port", "0", *options]
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        assert "editor is served at http://127.0.0.1:" in process.stdout.readline()
        until(lambda: (state := read_state()) and state.process == process.pid)
        state = read_state()
        assert state is not None
        return process, state

    yield start
    for process in processes:
        process.kill()
        process.communicate()
