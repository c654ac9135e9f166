"""The judge and its training, with random weights and random art."""

import os
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

from mos_cli.datasets.art.file import Art
from mos_cli.errors import ModelError
from mos_cli.evaluation.augment import degraded, turned, turned_point
from mos_cli.evaluation.judge import CELLS, SIDE, Judge, JudgeNet, judge_folder
from mos_cli.evaluation.judge_training import (
    IGNORED,
    JudgeBatches,
    Sprites,
    judge_loss,
    load_sprites,
    random_scene,
    train_judge,
)
from mos_cli.evaluation.scenebench import bench_data
from tests.helpers.random_art import EXTRA_STYLE
from tests.helpers.tiny_judge import tiny_judge


@pytest.fixture(scope="session")
def sprites(art: Art) -> Sprites:
    return load_sprites(art, bench_data())


def test_the_judge_that_comes_with_mos_knows_the_bench():
    judge = Judge(judge_folder())
    data = bench_data()
    assert set(data.words) <= set(judge.config.words)
    assert set(data.styles) <= set(judge.config.styles)
    assert sum(file.stat().st_size for file in judge_folder().iterdir()) < 5e6


SMALL = {"widths": (8, 16, 16, 16), "hidden": 32}


def test_the_judge_learns_to_see(sprites: Sprites):
    """A small one learns one batch by heart, all four answers of it."""
    batch = JudgeBatches(sprites, batch=4, steps=1, seed=0)[0]
    torch.manual_seed(0)
    net = JudgeNet(sprites.config.model_copy(update=SMALL))
    optimiser = torch.optim.AdamW(net.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        losses.append(judge_loss(net, batch, bfloat16=False))
        losses[-1].backward()
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < 0.4 * losses[0]


def test_training_leaves_a_judge(sprites: Sprites, tmp_path: Path):
    few = replace(sprites, config=sprites.config.model_copy(update=SMALL))
    told = []
    train_judge(few, tmp_path, steps=3, batch=2, log=lambda step, loss: told.append(step))
    assert told == [1, 2, 3]
    assert Judge(tmp_path).config == few.config


def test_a_changed_judge_is_refused(tmp_path: Path):
    tiny_judge(tmp_path, ("cat",))
    with (tmp_path / "judge.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    with pytest.raises(ModelError, match=r"sha256.*mos train-judge"):
        Judge(tmp_path)


def test_every_art_set_teaches_the_judge(sprites: Sprites):
    assert EXTRA_STYLE not in sprites.config.styles
    random, rows = Random(0), set()
    for _ in range(500):
        one = random_scene(sprites, random)
        assert len(one.scene.objects) == len(one.labels)
        for placed, (word, colour, style) in zip(one.scene.objects, one.labels, strict=True):
            known = [number for number in sprites.pictures[word] if sprites.pictures[word][number] == placed.picture]
            assert known == ([style] if style != IGNORED else [len(sprites.config.styles)])
            assert (placed.tint is None) == (colour == IGNORED)
            rows.add(placed.picture)
    assert rows & {styles[len(sprites.config.styles)] for styles in sprites.pictures[:3]}


def test_a_batch_marks_what_it_shows(sprites: Sprites):
    batches = JudgeBatches(sprites, batch=8, steps=2, seed=0)
    batch, again = batches[1], batches[1]
    assert torch.equal(batch.pictures, again.pictures)
    assert not torch.equal(batch.pictures, batches[0].pictures)
    assert batch.pictures.shape == (8, 3, SIDE, SIDE)
    for row in range(8):
        named = set(batch.cells[row][batch.words[row] != IGNORED].tolist())
        centres = (batch.centres[row] == 1).nonzero().tolist()
        assert 1 <= len(centres) <= 5
        assert {y * CELLS + x for y, x in centres} <= named


def test_what_is_turned_lies_where_it_is_said_to_lie():
    picture = torch.full((1, 3, SIDE, SIDE), -1.0)
    picture[:, :, 24:32, 88:96] = 1
    angle = 0.2
    y, x = (turned(picture, torch.tensor([angle]))[0, 0] > 0).nonzero().float().mean(dim=0)
    expected = turned_point(92 / SIDE, 28 / SIDE, angle)
    assert ((x + 0.5) / SIDE, (y + 0.5) / SIDE) == pytest.approx(expected, abs=0.01)


def test_spoiling_keeps_the_picture():
    pictures = torch.linspace(-1, 1, SIDE).expand(12, 3, SIDE, SIDE)
    spoiled = degraded(pictures, torch.Generator().manual_seed(0))
    assert spoiled.shape == pictures.shape
    assert spoiled.abs().max() <= 1
    assert torch.corrcoef(torch.stack([pictures.flatten(), spoiled.flatten()]))[0, 1] > 0.9
    assert not any(torch.equal(one, other) for one, other in zip(pictures, spoiled, strict=True))
