"""The judge, KID, and a whole evaluation, all with random weights and random art."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
import torch.nn.functional as F
from conftest import EXTRA_STYLE
from PIL import Image
from torch import Tensor, nn
from typer.testing import Result

from mos_cli.bundles.bundle import Bundle
from mos_cli.bundles.sources import fetch_tower
from mos_cli.datasets.art.file import Art
from mos_cli.errors import InputError, ModelError, UsageError
from mos_cli.evaluation.augment import degraded, turned, turned_point
from mos_cli.evaluation.examine import Examiner, TrueScenes
from mos_cli.evaluation.features import FEATURES, EfficientNetLite0, features_of
from mos_cli.evaluation.judge import CELLS, SIDE, Judge, JudgeConfig, JudgeNet, judge_folder, save_judge
from mos_cli.evaluation.judge_training import (
    IGNORED,
    JudgeBatches,
    Sprites,
    judge_loss,
    load_sprites,
    random_scene,
    train_judge,
)
from mos_cli.evaluation.kid import kid
from mos_cli.evaluation.results import Evaluation
from mos_cli.evaluation.run import Bench, evaluate
from mos_cli.evaluation.scenebench import CATEGORIES, bench_data, read_bench
from mos_cli.inference.pipeline import MoSPipeline
from mos_cli.towers.efficientnet import features_spec


@pytest.fixture(scope="session")
def sprites(art: Art) -> Sprites:
    return load_sprites(art, bench_data())


def tiny_judge(folder: Path, words: tuple[str, ...]) -> Judge:
    config = JudgeConfig(words=words, colours=("red",), styles=("noto",), widths=(8, 8, 8, 8), hidden=8)
    torch.manual_seed(0)
    save_judge(JudgeNet(config), config, folder)
    return Judge(folder)


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


class RandomFeatures(nn.Module):
    """What an untrained convolution sees: enough to tell sharp from blurred."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 32, 5, 2)

    def forward(self, pictures: Tensor) -> Tensor:
        return F.relu(self.convolution(pictures)).mean(dim=(2, 3))


def test_kid_grows_with_blur(art: Art):
    true, entries, net = TrueScenes(art), read_bench(), RandomFeatures()
    entries = tuple(e for e in entries if e.category in ("single", "style"))

    def blurred(pictures: Tensor, side: int) -> Tensor:
        return F.interpolate(F.interpolate(pictures, (side, side), mode="area"), (32, 32), mode="bilinear")

    pictures, others = true.draw(entries, 32, take=0), true.draw(entries, 32, take=1)
    reference = features_of(net, pictures)
    same, little, much = (
        kid(features_of(net, one), reference) for one in (others, blurred(others, 16), blurred(others, 4))
    )
    assert same.subset == 100
    assert abs(same.mean) < 0.1 * little.mean
    assert little.mean < 0.8 * much.mean
    assert kid(reference[:10], reference[:10]).subset == 5


def test_the_features_are_those_of_the_paper():
    net = EfficientNetLite0()
    # 4.65 million less the classifier, which is not used.
    assert sum(parameter.numel() for parameter in net.parameters()) == 4_652_008 - 1000 * 1281
    assert features_of(net, torch.zeros(1, 3, 32, 32)).shape == (1, FEATURES)


def test_the_features_file_is_pinned():
    spec = features_spec()
    assert (spec.format, len(spec.files)) == ("pth", 1)


@pytest.fixture
def pipeline(bundle: Bundle) -> MoSPipeline:
    return MoSPipeline(bundle, fetch_tower(bundle.index.understanding), device=torch.device("cpu"), precision="fp32")


def settings(**changed: object) -> dict:
    common = {"model": "tiny", "steps": 1, "cfg": 1.0, "cfg_interval": (0.0, 1.0), "precision": "fp32"}
    return {**common, "negative": "", "width": 32, "height": 32, **changed}


def test_an_evaluation_from_bundle_to_table(pipeline: MoSPipeline, art: Art, tmp_path: Path):
    entries = read_bench(1)
    judge = tiny_judge(tmp_path / "judge", tuple(bench_data().words))
    bench = Bench(entries, judge, RandomFeatures(), TrueScenes(art))
    folder, told = tmp_path / "out", []
    result = evaluate(pipeline, bench, folder, settings(), lambda *what: told.append(what))
    assert Evaluation.model_validate_json((folder / "eval.json").read_text()) == result
    assert [one.category for one in result.scores] == [*CATEGORIES, "all"]
    assert result.judge_hash == judge.hash
    assert result.bundle_hash == pipeline.bundle_hash
    text = (folder / "eval.md").read_text()
    assert text.splitlines()[1] == "| --- | ---: | ---: | ---: | ---: |"
    assert all(f"| {category} | 1 |" in text for category in CATEGORIES)
    for name in ("sheet.png", "check.png"):
        Image.open(folder / name).verify()
    assert told[-1] == ("judging", 2, 2)

    # What is there is taken, one that is missing is drawn again, and nothing else is.
    drawn = sorted((folder / "pictures").iterdir())
    assert [path.stem for path in drawn] == sorted(e.id for e in entries)
    drawn[0].unlink()
    before = {path: path.stat().st_mtime_ns for path in drawn[1:]}
    assert evaluate(pipeline, bench, folder, settings(), lambda *what: None) == result
    assert {path: path.stat().st_mtime_ns for path in drawn[1:]} == before
    with pytest.raises(InputError, match="other settings"):
        evaluate(pipeline, bench, folder, settings(steps=2), lambda *what: None)


def test_a_style_is_told_by_comparison_with_true_scenes(art: Art, tmp_path: Path):
    true, entries = TrueScenes(art), [entry for entry in read_bench(20) if entry.category == "style"]
    examiner = Examiner(tiny_judge(tmp_path, tuple(bench_data().words)), true, entries, canvas=32)
    right = [entry.description.style for entry in entries]
    likest = examiner.nearest_style(true.draw(entries, 32, take=0))
    assert sum(a == b for a, b in zip(likest, right, strict=True)) >= 15
    likest = examiner.nearest_style(true.draw(entries, 32, take=0, style="fluent-3d"))
    assert likest.count("fluent-3d") >= 15


def test_what_cannot_be_judged_is_refused(pipeline: MoSPipeline, art: Art, tmp_path: Path):
    true = TrueScenes(art)
    ignorant = Bench(read_bench(1), tiny_judge(tmp_path, ("cat face",)), RandomFeatures(), true)
    with pytest.raises(ModelError, match="has not learned"):
        evaluate(pipeline, ignorant, tmp_path, settings(), lambda *what: None)
    with pytest.raises(UsageError, match="square"):
        evaluate(pipeline, ignorant, tmp_path, settings(width=48), lambda *what: None)


def test_mistakes_on_the_command_line(mos: Callable[..., Result], bundle: Bundle, tmp_path: Path, art_folder: Path):
    no_art = mos("eval", "--art", tmp_path)
    assert no_art.exit_code == 3
    assert "mos data build" in no_art.stderr
    no_judge = mos("eval", "--art", art_folder, "--judge", tmp_path)
    assert no_judge.exit_code == 4
    assert "mos train-judge" in no_judge.stderr
    assert mos("eval", "--size", "33").exit_code == 2
    assert mos("eval", "--limit", "0").exit_code == 2
