"""The tower that the tests of quantisation read."""

from pathlib import Path

import pytest

from tests.helpers.quantized_towers import small_tower


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The folder of a small tower, in fp32."""
    small_tower(image_state_widths=(16, 64, 64, 64)).save_pretrained(tmp_path / "source")
    return tmp_path / "source"
