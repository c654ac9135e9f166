"""What training needs is known before anything is built."""

import pytest
import torch

from mos_cli.bundles.shapes import GenerationShape
from mos_cli.errors import MemoryLimitError
from mos_cli.planning.memory import GIB
from mos_cli.planning.training import check_memory, state_bytes
from mos_cli.towers.generation import GenerationTower

SIZES = {"width": 64, "depth": 2, "heads": 2, "hidden": 96, "states_layers": 4, "states_width": 32}


def test_the_state_is_counted_in_full() -> None:
    """Weights, gradient, two moments and two averages of four bytes each."""
    tower = GenerationTower(**SIZES)
    count = sum(weight.numel() for weight in tower.parameters())
    assert state_bytes(GenerationShape(**SIZES), count) == 24 * count
    moments = torch.optim.AdamW(tower.parameters(), lr=0.1)
    assert len(moments.param_groups[0]["params"]) == len(list(tower.parameters()))


def test_what_does_not_fit_is_refused_with_the_batch_that_does() -> None:
    shape = GenerationShape(width=384, depth=12, heads=6, hidden=1024)
    check_memory(shape, shape.parameters, 8, 256, 40, 16, edits=True)
    with pytest.raises(MemoryLimitError, match=r"batch = \d+ fits") as raised:
        check_memory(shape, shape.parameters, 512, 256, 40, 16, edits=False)
    fits = int(str(raised.value).rpartition("batch = ")[2].split()[0])
    check_memory(shape, shape.parameters, fits, 256, 40, 16, edits=False)
    with pytest.raises(MemoryLimitError, match="smaller width or depth"):
        check_memory(GenerationShape(width=1280000), 10**14, 1, 16, 40, 64 / GIB, edits=False)
