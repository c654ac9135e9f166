"""An evaluation of editing from a bundle to a table, with random weights and random art."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from mos_cli.bundles.bundle import Bundle
from mos_cli.bundles.sources import fetch_tower
from mos_cli.datasets.art.file import Art
from mos_cli.datasets.scenes.edits import EDIT_KINDS
from mos_cli.errors import UsageError
from mos_cli.evaluation.edit_run import EditEvaluation, evaluate_edits
from mos_cli.evaluation.editbench import read_edit_bench
from mos_cli.evaluation.examine import TrueScenes
from mos_cli.evaluation.scenebench import bench_data
from mos_cli.inference.pipeline import MoSPipeline
from tests.helpers.tiny_judge import tiny_judge


def test_an_evaluation_of_edits_from_bundle_to_table(editor: Bundle, art: Art, tmp_path: Path) -> None:
    pipeline = MoSPipeline(
        editor, fetch_tower(editor.index.understanding), device=torch.device("cpu"), precision="fp32"
    )
    judge, entries = tiny_judge(tmp_path / "judge", tuple(bench_data().words)), read_edit_bench(1)
    common = {"model": "editor", "steps": 1, "cfg": 1.0, "cfg_interval": (0.0, 1.0), "precision": "fp32"}
    common |= {"negative": "", "width": 32, "height": 32}
    folder = tmp_path / "out"
    result = evaluate_edits(pipeline, entries, judge, TrueScenes(art), folder, common, 1.0, lambda *_: None)
    assert EditEvaluation.model_validate_json((folder / "edit.json").read_text()) == result
    assert [one.category for one in result.scores] == [*EDIT_KINDS, "all"]
    assert result.no_op_error > 0
    text = (folder / "edit.md").read_text()
    assert all(f"| {kind} | 1 |" in text for kind in EDIT_KINDS)
    Image.open(folder / "edits.png").verify()
    assert len(list((folder / "edits").iterdir())) == len(entries)
    with pytest.raises(UsageError, match="square"):
        evaluate_edits(pipeline, entries, judge, TrueScenes(art), folder, common | {"width": 48}, 1.0, lambda *_: None)


def test_only_what_edits_is_asked_to(mos, bundle: Bundle, editor: Bundle) -> None:
    for arguments, code, words in (
        (("--suite", "edit", "-m", "tiny"), 4, "tiny"),
        (("--image-cfg", "2"), 2, "--image-cfg"),
    ):
        refused = mos("eval", *arguments)
        assert (refused.exit_code, len(refused.stderr.splitlines())) == (code, 1), refused.stderr
        assert words in refused.stderr
    unknown = mos("eval", "--suite", "paint")
    assert unknown.exit_code == 2
    assert "'paint' is not one of" in unknown.stderr
