"""A server with a tiny model, and one whose pictures are drawn when the test says so."""

from collections.abc import Iterator

import pytest

from mos_cli.bundles.bundle import Bundle
from tests.helpers.running_server import Gate, RunningServer, running_server


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
