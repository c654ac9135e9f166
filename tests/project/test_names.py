"""Names that were replaced by standard terms do not come back, and imports run downward."""

import io
import re
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RETIRED = {
    "Asked": "AttentionBackend",
    "edits_of": "edit_defaults, edit_source",
    "whither": "direction_phrase",
    "Cells": "TokenGrid",
    "Course": "Curriculum",
    "FetchedBlocks": "StreamedBlocks",
    "Given": "SourceRoutes",
    "Ground": "Background",
    "Laid": "EditConditioning",
    "Origin": "InitialLatent",
    "Places": "TokenLayout",
    "PromptReading": "PromptEncoding",
    "Ragged": "VariableLengths",
    "Reader": "PromptEncoder",
    "Words": "TokenSequence",
    "eyes": "image_encoder",
    "ground": "background",
    "grounds": "backgrounds",
    "hands": "styles",
    "reads_in_fp32": "computes_in_fp32",
    "remember": "record_location, cache_references",
    "runtime": "bundles, config, images, planning, utils",
    "sees": "has_vision",
    "sight": "image_states, span",
    "strew": "random_scene",
    "together": "batched_guidance",
}
"""Python identifiers and what is used now; the words themselves may be used in text."""
RETIRED_ANYWHERE = {
    "CARDS": "GPU_SIZES",
    "SIGHT": "IMAGE_GRID",
    "SeeingTower": "VisionLanguageTower",
    "Strewn": "LabelledScene",
    "UNSEEN": "WITHOUT_IMAGE",
    "VisitingTower": "OffloadedTower",
    "Wanted": "RecordOptions",
    "begin_anew": "reset_cache",
    "choose_ground": "choose_background",
    "even_route": "uniform_route",
    "given_choices": "transfer_routes",
    "glimpsed": "briefly_onloaded",
    "ground_for": "background_for",
    "ground_phrase": "background_phrase",
    "hands_BV": "styles_BV",
    "sight_BVMZ": "image_states_BVMZ",
    "sight_in": "image_states_in",
    "sight_width": "image_state_width",
    "sight_widths": "image_state_widths",
    "under_BND": "reference_BND",
    "under_in": "reference_in",
    "write_together": "write_all",
    "xformers_takes": "xformers_supports",
}
"""Names that are not words, and so may be in no text either."""
EXEMPT = ("models/emoji/", "models/judge/", "models/enlarger/", "tests/fixtures/", "docs/LOG.md")
EXEMPT += ("tests/project/test_names.py", "mos_cli/utils/migration.py")
SUFFIXES = {".css", ".html", ".js", ".json", ".md", ".py", ".toml", ".yml"}
FOLDERS = ("mos_cli", "benchmarks", "tests", "docs", "presets", "models", ".github")
FILES = [
    path
    for path in (*ROOT.glob("*.*"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*")))
    if path.suffix in SUFFIXES and not path.relative_to(ROOT).as_posix().startswith(EXEMPT)
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_retired_name_is_used(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    words = set(re.findall(r"\w+", text))
    assert {name: RETIRED_ANYWHERE[name] for name in words & RETIRED_ANYWHERE.keys()} == {}
    if path.suffix == ".py":
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        names = {token.string for token in tokens if token.type == tokenize.NAME}
        assert {name: RETIRED[name] for name in names & RETIRED.keys()} == {}


def test_an_upward_import_is_found(tmp_path: Path) -> None:
    """The contracts of pyproject.toml hold for a copy of the package, and not once an upward import is added to it."""
    shutil.copytree(ROOT / "mos_cli", tmp_path / "mos_cli", ignore=shutil.ignore_patterns("__pycache__", "_data"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)

    def lint() -> subprocess.CompletedProcess[str]:
        lint_imports = "import sys; from importlinter.cli import lint_imports_command; lint_imports_command()"
        command = [sys.executable, "-c", lint_imports, "--no-cache"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    kept = lint()
    assert kept.returncode == 0, kept.stdout + kept.stderr
    with (tmp_path / "mos_cli" / "utils" / "files.py").open("a", encoding="utf-8") as file:
        file.write("\n\ndef _upward() -> None:\n    import mos_cli.towers.layers  # noqa: F401\n")
    broken = lint()
    assert broken.returncode == 1
    assert "mos_cli.utils.files -> mos_cli.towers.layers" in broken.stdout
