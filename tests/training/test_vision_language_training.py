"""Training on edits with a vision-language tower, whose image tokens stand behind the words."""

from pathlib import Path

import pytest
import torch

from mos_cli.inference.prompt_encoding import PromptEncoder
from mos_cli.towers.autoencoder import Pixels
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.vision_language import load_understanding
from mos_cli.training.batches import Batches
from mos_cli.training.objective import Objective
from mos_cli.training.recipe import TrainTable
from tests.helpers import vlm_towers

INSTRUCTION = "paint the red apple green"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vlm_towers.qwen3_vl(tmp_path_factory.mktemp("qwen"))


def test_training_sees_what_drawing_sees(qwen: Path) -> None:
    tower, understanding = tiny_tower(), load_understanding(qwen)
    batches = Batches.__new__(Batches)
    batches.understanding, batches.autoencoder, batches.eyes = understanding, Pixels(), None
    batches.train = TrainTable.model_construct(context_tokens=30)
    before = torch.rand(1, 3, 64, 64) * 2 - 1
    states, mask, grid = batches._read_in_sight([INSTRUCTION], before)
    assert states.shape[1] == mask.shape[1] == 30 + grid[0] * grid[1]
    reading = PromptEncoder(understanding, None, tower, "tiny").encode_with_images(
        {"positive": PromptEncoder(understanding, None, tower, "tiny").encode(INSTRUCTION)}, [before], [before]
    )["positive"]
    trained = tower.project_states(states, mask).bank_BTMD[:, mask[0]]
    torch.testing.assert_close(trained, reading.bank.bank_BTMD)
    assert reading.bank.references is not None
    assert reading.bank.references.grids == (grid,)


def test_a_step_of_training_learns_from_what_is_seen(qwen: Path) -> None:
    torch.manual_seed(0)
    tower, understanding = tiny_tower(), load_understanding(qwen)
    pictures = torch.rand(2, 3, 64, 64) * 2 - 1
    reading = understanding.encode([INSTRUCTION, INSTRUCTION], [[picture] for picture in pictures])
    (sight,) = reading.image_spans[0]
    seen = range(sight.first, sight.first + sight.rows * sight.columns)
    order = [n for n in range(reading.mask_BT.shape[1]) if n not in seen] + list(seen)
    loss, _ = Objective(tower, 0.0)._plain(
        torch.rand(2, 3, 64, 64), torch.randn(2, 3, 64, 64), torch.tensor([0.5, 0.9]),
        reading.states_BTMS[:, order], reading.mask_BT[:, order], pictures, None, (sight.rows, sight.columns),
    )  # fmt: skip
    loss.backward()
    assert tower.under_in is not None
    for weight in (tower.under_in.weight, tower.states_in.weight):
        assert weight.grad is not None
        assert weight.grad.abs().sum() > 0


def tiny_tower() -> GenerationTower:
    torch.manual_seed(3)
    sizes = {"width": 32, "depth": 2, "heads": 2, "hidden": 48, "router_width": 32, "router_heads": 2}
    tower = GenerationTower(**sizes, states_layers=vlm_towers.LAYERS + 1, states_width=vlm_towers.WIDTH, sees=True)
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return tower
