"""The understanding tower that the tests of training read with, and what their runs leave out."""

from pathlib import Path

import pytest

from mos_cli.towers.understanding import UnderstandingTower
from mos_cli.training.metrics import Journal


@pytest.fixture(scope="module")
def understanding(encoder_folder: Path) -> UnderstandingTower:
    """A tower of the small encoder, loaded once a module."""
    return UnderstandingTower(encoder_folder)


@pytest.fixture
def plots() -> None:
    """For tests that look at the plot of the losses."""


@pytest.fixture(autouse=True)
def no_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other runs in the process of the test draw no plot, which would be a third of their time."""
    if "plots" not in request.fixturenames:
        monkeypatch.setattr(Journal, "plot", lambda _: None)
