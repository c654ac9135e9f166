"""Identifiers that were replaced by standard terms do not come back."""

import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RETIRED = {
    "Asked": "AttentionBackend",
    "Course": "Curriculum",
    "FetchedBlocks": "StreamedBlocks",
    "Given": "SourceRoutes",
    "Laid": "EditConditioning",
    "Origin": "InitialLatent",
    "PromptReading": "PromptEncoding",
    "Ragged": "VariableLengths",
    "Reader": "PromptEncoder",
    "SIGHT": "IMAGE_GRID",
    "SeeingTower": "VisionLanguageTower",
    "UNSEEN": "WITHOUT_IMAGE",
    "VisitingTower": "OffloadedTower",
    "Wanted": "RecordOptions",
    "begin_anew": "reset_cache",
    "given_choices": "transfer_routes",
    "glimpsed": "briefly_onloaded",
    "runtime": "bundles, config, images, planning, utils",
}
"""The old identifier, and what is used now."""
SOURCES = [path for folder in ("mos_cli", "benchmarks", "tests", "docs") for path in (ROOT / folder).rglob("*.py")]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_retired_identifier_is_used(path: Path) -> None:
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    used = {token.string for token in tokens if token.type == tokenize.NAME}
    assert {name: RETIRED[name] for name in used & RETIRED.keys()} == {}
