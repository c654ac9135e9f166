"""A server with a tiny model, and one whose pictures are drawn when the test says so."""

import threading
from collections.abc import Iterator
from io import BytesIO
from typing import NamedTuple

import pytest
from PIL import Image

from mos_cli.bundles.bundle import Bundle
from mos_cli.server.drawing import Plan, Result
from tests.helpers.running_server import RunningServer, running_server


@pytest.fixture
def server(editor: Bundle) -> Iterator[RunningServer]:
    """Draws and edits with the tiny model "editor"."""
    with running_server() as running:
        yield running


class Step(NamedTuple):
    index: int
    total: int
    t: float


class Gate:
    """Stands for a model: a picture of three steps is drawn when `open` is set.

    Attributes:
        drawn: the prompts of the pictures that were finished.
    """

    def __init__(self) -> None:
        self.open = threading.Event()
        self.drawn: list[str] = []
        self.begun = 0

    def __call__(self, plan: Plan, on_step) -> Result:
        self.begun += 1
        for index in range(3):
            on_step(Step(index, 3, 1 - index / 3))
            if index == 0:
                while not self.open.wait(0.01):
                    on_step(Step(index, 3, 1.0))
        self.drawn.append(plan.recipe.prompt)
        file = BytesIO()
        Image.new("RGB", (32, 32), "teal").save(file, format="PNG")
        return Result({"picture.png": file.getvalue()}, ())


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
