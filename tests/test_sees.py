"""Editing with an understanding tower that sees by itself: the same commands, the same trace, training that fits."""

from pathlib import Path

import pytest
import torch
import vlm_towers
from conftest import write_bundle
from PIL import Image

from mos_cli.bundles.bundle import Bundle
from mos_cli.bundles.specs import EditDefaults
from mos_cli.inference.prompt_encoding import PromptEncoder
from mos_cli.routing.trace import load_recording
from mos_cli.towers.autoencoder import Pixels
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.vision_language import load_understanding
from mos_cli.training.batches import Batches
from mos_cli.training.objective import Objective
from mos_cli.training.recipe import TrainTable

EDITS = EditDefaults(steps=3, cfg=2.0, cfg_interval=(0.0, 1.0), image_cfg=1.5)
INSTRUCTION = "paint the red apple green"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vlm_towers.qwen3_vl(tmp_path_factory.mktemp("qwen"))


@pytest.fixture
def seeing(tmp_path: Path, qwen: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A bundle named "seeing" whose understanding tower sees; the default."""
    monkeypatch.setenv("MOS_MODEL", "seeing")
    states = (vlm_towers.LAYERS + 1, vlm_towers.WIDTH)
    return write_bundle(tmp_path / "models" / "seeing", qwen, edits=EDITS, states=states)


def test_a_tower_that_sees_edits_and_its_image_tokens_are_routed(mos, seeing, tmp_path) -> None:
    noise = torch.randint(0, 256, (32, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(tmp_path / "in.png")
    edited = mos("edit", tmp_path / "in.png", INSTRUCTION, "-s", 1, "-o", tmp_path / "out.png", "--size", "64x32")
    assert edited.exit_code == 0, edited.output
    recording = load_recording(tmp_path / "out.png")
    assert set(recording.trace.branches) == {"positive", "negative", "unseen"}
    tokens = recording.trace.branches["positive"].tokens
    patches = [token.patch for token in tokens if token.patch is not None]
    rows, columns = (1 + max(patch[axis] for patch in patches) for axis in (1, 2))
    assert columns > rows
    assert patches == [(0, row, column) for row in range(rows) for column in range(columns)]
    assert all(token.patch is not None for token in tokens[-len(patches) :])
    words = [INSTRUCTION[token.start : token.end].strip() for token in tokens if token.end]
    assert "".join(words) == INSTRUCTION.replace(" ", "")
    assert all(token.patch is None for token in recording.trace.branches["unseen"].tokens)
    replayed = mos("replay", tmp_path / "out.png", "--verify", "--input", tmp_path / "in.png")
    assert replayed.stdout.strip() == "exact"
    drawn = mos("generate", "a red apple", "-o", tmp_path / "drawn.png")
    assert drawn.exit_code == 0, drawn.output


def test_a_tower_that_only_reads_is_refused(mos, seeing, encoder_folder, tmp_path) -> None:
    write_bundle(tmp_path / "models" / "blind", encoder_folder, edits=EDITS)
    refused = mos("generate", "a dog", "-m", "blind", "-o", tmp_path / "x.png")
    assert refused.exit_code == 4
    assert "needs an understanding tower with vision" in refused.stderr


def test_training_sees_what_drawing_sees(qwen: Path) -> None:
    tower, understanding = tiny_tower(), load_understanding(qwen)
    batches = Batches.__new__(Batches)
    batches.understanding, batches.autoencoder, batches.image_encoder = understanding, Pixels(), None
    batches.train = TrainTable.model_construct(context_tokens=30)
    before = torch.rand(1, 3, 64, 64) * 2 - 1
    states, mask, grid = batches._read_with_images([INSTRUCTION], before)
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
    (span,) = reading.image_spans[0]
    seen = range(span.first, span.first + span.rows * span.columns)
    order = [n for n in range(reading.mask_BT.shape[1]) if n not in seen] + list(seen)
    loss, _ = Objective(tower, 0.0)._uncompiled(
        torch.rand(2, 3, 64, 64), torch.randn(2, 3, 64, 64), torch.tensor([0.5, 0.9]),
        reading.states_BTMS[:, order], reading.mask_BT[:, order], pictures, None, (span.rows, span.columns),
    )  # fmt: skip
    loss.backward()
    assert tower.reference_in is not None
    for weight in (tower.reference_in.weight, tower.states_in.weight):
        assert weight.grad is not None
        assert weight.grad.abs().sum() > 0


def test_eyes_apart_and_a_tower_that_sees_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="image_state_widths are for"):
        GenerationTower(states_layers=2, image_state_widths=(8, 8), has_vision=True)


def tiny_tower() -> GenerationTower:
    torch.manual_seed(3)
    sizes = {"width": 32, "depth": 2, "heads": 2, "hidden": 48, "router_width": 32, "router_heads": 2}
    tower = GenerationTower(
        **sizes, states_layers=vlm_towers.LAYERS + 1, states_width=vlm_towers.WIDTH, has_vision=True
    )
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return tower
