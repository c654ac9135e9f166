"""An evaluation from a bundle to a table, with random weights and random art."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import Result

from mos_cli.bundles.bundle import Bundle
from mos_cli.bundles.sources import fetch_tower
from mos_cli.config.recipe import LoraRecipe
from mos_cli.datasets.art.file import Art
from mos_cli.errors import InputError, ModelError, UsageError
from mos_cli.evaluation.examine import Examiner, TrueScenes
from mos_cli.evaluation.results import Evaluation
from mos_cli.evaluation.run import Bench, evaluate
from mos_cli.evaluation.scenebench import CATEGORIES, bench_data, read_bench
from mos_cli.inference.pipeline import MoSPipeline
from tests.helpers.tiny_judge import RandomFeatures, tiny_judge


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


def test_a_lora_is_named_in_the_settings(pipeline: MoSPipeline, art: Art, tmp_path: Path) -> None:
    judge = tiny_judge(tmp_path / "judge", tuple(bench_data().words))
    bench = Bench(read_bench(1), judge, RandomFeatures(), TrueScenes(art))
    lora = LoraRecipe(name="a.safetensors", sha256="0123456789abcdef" * 4, scale=0.5)
    result = evaluate(pipeline, bench, tmp_path / "out", settings(loras=(lora,)), lambda *what: None)
    assert result.settings["loras"] == "a.safetensors:0.5 (0123456789ab)"
    assert "a.safetensors:0.5" in (tmp_path / "out" / "eval.md").read_text()


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
