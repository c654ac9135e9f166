"""A run may start from a bundle, also with larger patches: it begins by drawing that bundle's pictures enlarged."""

import pytest
import torch
import torch.nn.functional as F

from mos_cli.towers.generation import GenerationTower
from mos_cli.training.start import enlarged_weights
from tests.helpers.tiny_bundle import randomised

SIZES = {"width": 32, "depth": 2, "heads": 2, "hidden": 48, "states_layers": 4, "states_width": 32}
SIZES |= {"router_width": 32, "router_heads": 2}


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_larger_patches_start_as_the_same_picture_enlarged(factor: int) -> None:
    start, grown = randomised(GenerationTower(patch=4, **SIZES)), GenerationTower(patch=4 * factor, **SIZES).eval()
    grown.load_state_dict(enlarged_weights(start, 4 * factor))
    states, t = torch.randn(2, 5, 4, 32), torch.tensor([0.3, 0.8])
    small = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected, _ = start(small, t, start.project_states(states))
        drawn, _ = grown(F.interpolate(small, scale_factor=factor), t, grown.project_states(states))
    assert torch.allclose(drawn, F.interpolate(expected, scale_factor=factor), atol=1e-4)


def test_patches_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="no multiple"):
        enlarged_weights(randomised(GenerationTower(patch=4, **SIZES)), 6)
