"""The understanding tower that the tests of training read with."""

from pathlib import Path

import pytest

from mos_cli.towers.understanding import UnderstandingTower


@pytest.fixture(scope="module")
def understanding(encoder_folder: Path) -> UnderstandingTower:
    """A tower of the small encoder, loaded once a module."""
    return UnderstandingTower(encoder_folder)
