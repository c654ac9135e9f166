"""Training on edits with a vision-language tower, whose image tokens stand behind the words."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mos_cli.inference.prompt_encoding import PromptEncoder
from mos_cli.towers.autoencoder import Pixels
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.vision_language import VisionLanguageTower, load_understanding
from mos_cli.training.batches import Batch, Batches
from mos_cli.training.objective import Objective
from mos_cli.training.picks import Source
from mos_cli.training.recipe import TrainTable
from mos_cli.training.stages import Curriculum, Stage
from tests.helpers import tiny_training as tiny
from tests.helpers import vlm_towers

INSTRUCTION = "paint the red apple green"
WORDS = 30
"""Tokens of a caption that a batch has room for."""


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vlm_towers.qwen3_vl(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def understanding(qwen: Path) -> VisionLanguageTower:
    tower = load_understanding(qwen)
    assert isinstance(tower, VisionLanguageTower)
    return tower


def edit_batch(understanding: VisionLanguageTower, before_B3HW: Tensor) -> Batch:
    """A batch of edits of these pictures, all with the same instruction."""
    train = {**tiny.TABLE["train"], "context_tokens": WORDS, "batch": len(before_B3HW), "drop_caption": 0.0}
    size = before_B3HW.shape[-1]
    stage = Stage("edit", 0, 1, size, len(before_B3HW), 1e-2, 1e-2, 0.4, SimpleNamespace(edits=1.0))  # type: ignore[arg-type]
    source = Source(
        pick=lambda random, canvas: (None, INSTRUCTION),
        collate=lambda picked: None,
        draw=lambda picked, canvas: torch.stack([before_B3HW.flip(3), before_B3HW], dim=1),
        edits=True,
    )
    batches = Batches(
        Curriculum((stage,), 0, 1.0),
        TrainTable.model_validate(train),
        {("edit", True): source},
        understanding,
        Pixels(),
        torch.device("cpu"),
    )
    return batches.make(0)


def test_a_batch_has_the_states_that_drawing_has(understanding: VisionLanguageTower) -> None:
    tower, before = tiny_tower(), torch.rand(1, 3, 64, 64) * 2 - 1
    batch = edit_batch(understanding, before)
    rows, columns = batch.grid
    assert batch.states_BTMS.shape[1] == batch.mask_BT.shape[1] == WORDS + rows * columns
    encoder = PromptEncoder(understanding, None, tower, "tiny")
    encoded = encoder.encode_with_images({"positive": encoder.encode(INSTRUCTION)}, [before], [before])["positive"]
    trained = tower.project_states(batch.states_BTMS, batch.mask_BT).bank_BTMD[:, batch.mask_BT[0]]
    torch.testing.assert_close(trained, encoded.bank.bank_BTMD)
    assert encoded.bank.references is not None
    assert encoded.bank.references.grids == (batch.grid,)


def test_a_step_of_training_learns_from_every_image_token(understanding: VisionLanguageTower) -> None:
    """Whatever the route keeps of it, each image token has a part in the loss; padding has none."""
    batch = edit_batch(understanding, torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    tower, states = tiny_tower(), batch.states_BTMS.clone().requires_grad_()
    loss, _ = Objective(tower, 0.0)(replace(batch, states_BTMS=states))
    loss.backward()
    assert states.grad is not None
    learned_BT = states.grad.abs().sum(dim=(2, 3)) > 0
    assert learned_BT[:, WORDS:].all()
    assert torch.equal(learned_BT, batch.mask_BT.bool())


def test_the_picture_that_is_edited_is_under_the_noised_one(understanding: VisionLanguageTower) -> None:
    batch = edit_batch(understanding, torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    tower = tiny_tower()
    loss, _ = Objective(tower, 0.0)(batch)
    loss.backward()
    assert tower.reference_in is not None
    assert tower.reference_in.weight.grad is not None
    assert tower.reference_in.weight.grad.abs().sum() > 0


def tiny_tower() -> GenerationTower:
    torch.manual_seed(3)
    sizes = {"width": 32, "depth": 2, "heads": 2, "hidden": 48, "router_width": 32, "router_heads": 2}
    tower = GenerationTower(
        **sizes, states_layers=vlm_towers.LAYERS + 1, states_width=vlm_towers.WIDTH, has_vision=True
    )
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return tower
