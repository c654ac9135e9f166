"""Editing with a vision-language tower: the same commands, the same trace."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from mos_cli.bundles.bundle import Bundle
from mos_cli.bundles.specs import EditDefaults
from mos_cli.routing.trace import load_recording
from tests.helpers import vlm_towers
from tests.helpers.tiny_bundle import write_bundle

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
