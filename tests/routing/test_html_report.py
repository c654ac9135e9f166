"""The report's data: one file that is whole, true to the trace, and safe."""

import base64
import json
import re
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mos_cli.errors import InputError
from mos_cli.routing.trace import Recording, TraceToken, make_branch, trace_files
from mos_cli.routing.views.html import PARTS, SCRIPTS, html_report, report_data
from mos_cli.utils.files import write_all
from tests.helpers.recordings import HOSTILE, record, routes_of


def unpacked(text: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=np.uint8)


def embedded(page: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert match
    return json.loads(match[1])


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    page = html_report(record(tmp_path, previews=True))
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'" in page
    assert not re.search(r"<link|<iframe|@import|src=[\"']?(?!data:)\w|fetch\(|XMLHttpRequest", page)
    assert set(re.findall(r"https?://[^\s\"'`]+", page)) == {"http://www.w3.org/2000/svg"}


def test_a_hostile_prompt_stays_text(tmp_path: Path) -> None:
    page = html_report(record(tmp_path, f"{HOSTILE} $data <!-- cat"))
    assert page.count("<script") == page.count("</script") == 2
    assert "<img src=x" not in page
    assert embedded(page)["traces"][0]["recipe"]["prompt"] == f"{HOSTILE} $data <!-- cat"


def test_no_script_of_the_page_makes_markup_of_text() -> None:
    for name in SCRIPTS:
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", (PARTS / name).read_text()
        )


def test_every_decision_is_in_the_page(tmp_path: Path) -> None:
    recording = record(tmp_path)
    assert recording.routes is not None
    branches = embedded(html_report(recording))["traces"][0]["branches"]
    for name, routes in recording.routes.items():
        steps, blocks, tokens, kept = routes.ids_SJTK.shape
        shape = (blocks, tokens, kept, steps)
        ids, weights = (
            unpacked(branches[name][key]).reshape(shape).transpose(3, 0, 1, 2) for key in ("ids", "weights")
        )
        np.testing.assert_array_equal(ids, routes.ids_SJTK)
        np.testing.assert_allclose(weights / 255, routes.weights_SJTK, atol=0.5 / 255 + 1e-6)


def test_regions_are_summed_over_a_words_tokens_and_averaged_over_blocks(tmp_path: Path) -> None:
    recording = record(tmp_path)
    assert recording.routes is not None
    data = report_data([recording])
    regions = data["traces"][0]["branches"]["positive"]["regions"]
    parts = unpacked(regions["parts"]).reshape(-1, 16)
    held = recording.routes["positive"].regions_JTN
    assert held is not None
    for row, part, peak in zip(data["rows"]["positive"], parts, regions["peaks"], strict=True):
        wanted = held.astype(np.float64).mean(axis=0)[list(row["tokens"][0])].sum(axis=0)
        np.testing.assert_allclose(peak * part / 255, wanted, atol=peak / 255)


def test_words_of_two_traces_are_paired_by_text_and_occurrence(tmp_path: Path) -> None:
    first, second = record(tmp_path, "a cat and a dog"), record(tmp_path, "a dog and a big cat", seed=1)
    rows = report_data([first, second])["rows"]["positive"]
    found = {(row["text"], row["nth"], row["kind"]): row["tokens"] for row in rows}
    assert found[("a", 2, "word")] == [(4,), (4,)]
    assert found[("cat", 1, "word")] == [(2,), (6,)]
    assert found[("big", 1, "word")] == [None, (5,)]
    assert found[("[SEP]", 1, "special")] == [(6,), (7,)]
    assert [row["kind"] for row in rows] == ["word"] * 6 + ["special"] * 2


def record_pieces(folder: Path, pieces: list[str], seed: int) -> Recording:
    """A recording of one branch, whose tokens are these pieces of its prompt."""
    prompt, ends = "".join(pieces), np.cumsum([len(piece) for piece in pieces]).tolist()
    tokens = [TraceToken(text=p, start=end - len(p), end=end) for p, end in zip(pieces, ends, strict=True)]
    recording, routes = record(folder, prompt, seed=seed), routes_of(6, 4, len(tokens), 5, seed)
    branch = make_branch(prompt, tokens, range(6), routes, 5)
    trace = recording.trace.model_copy(update={"branches": {"positive": branch}})
    return replace(recording, trace=trace, routes={"positive": routes})


def test_words_are_paired_as_the_headline_compares_them(tmp_path: Path) -> None:
    """Whatever their case and punctuation, by the tokens that both have; each prompt keeps its own spelling."""
    first = record_pieces(tmp_path, ["a", " cat", " on", " a", " red", " background"], 0)
    second = record_pieces(tmp_path, ["A", " cat", ",", " on", " a", " Red", " background"], 1)
    rows = report_data([first, second])["rows"]["positive"]
    assert [(row["text"], row["nth"]) for row in rows] == [
        ("a", 1),
        ("cat", 1),
        ("on", 1),
        ("a", 2),
        ("red", 1),
        ("background", 1),
        (",", 1),
    ]
    pairs = [[(n,), (m,)] for n, m in enumerate([0, 1, 3, 4, 5, 6])]
    assert [row["tokens"] for row in rows] == [*pairs, [None, (2,)]]
    assert [row["texts"][1] for row in rows] == ["A", "cat", "on", "a", "Red", "background", ","]


def test_words_without_a_token_in_common_are_no_pair(tmp_path: Path) -> None:
    first, second = (
        record_pieces(tmp_path, ["red", "cat", " dog"], 0),
        record_pieces(tmp_path, ["redc", "at", " dog"], 1),
    )
    found = [(row["text"], row["tokens"]) for row in report_data([first, second])["rows"]["positive"]]
    assert found == [("redcat", [(0, 1), None]), ("dog", [(2,), (2,)]), ("redcat", [None, (0, 1)])]


def test_previews_become_one_picture_with_a_frame_a_step(tmp_path: Path) -> None:
    film = report_data([record(tmp_path, previews=True)])["traces"][0]["previews"]
    assert (film["count"], film["columns"], film["rows"]) == (6, 3, 2)
    (tmp_path / "sheet.webp").write_bytes(base64.b64decode(film["sheet"].split(",")[1]))
    with Image.open(tmp_path / "sheet.webp") as sheet:
        assert sheet.size == (3 * 64, 2 * 32)
        reds = [sheet.convert("RGB").getpixel((32 + 64 * (n % 3), 16 + 32 * (n // 3))) for n in range(6)]
    assert all(abs(red[0] - 40 * step) < 12 for step, red in enumerate(reds) if isinstance(red, tuple))


@pytest.mark.parametrize(("every", "told"), [(None, 0), (3, 1)])
def test_choices_that_no_block_read_are_told_once(tmp_path: Path, mos, every: int | None, told: int) -> None:
    """With feature caching the trace has the choices of steps at which no block was computed."""
    recording = record(tmp_path, feature_cache=every)
    write_all(trace_files(recording.trace, recording.routes, recording.path))
    assert json.loads(mos("inspect-routing", recording.path, "--json").stdout)["overview"]["feature_cache"] == every
    text = " ".join(mos("inspect-routing", recording.path).stdout.split())
    assert text.count("feature cache 3: the blocks were computed at some of the steps only") == told
    assert text.count("feature cache") == text.count("made, not read") == told


def test_the_page_knows_which_picture_was_drawn_with_a_feature_cache(tmp_path: Path) -> None:
    data = embedded(html_report(record(tmp_path), record(tmp_path, seed=1, feature_cache=3)))
    assert [trace["feature_cache"] for trace in data["traces"]] == [None, 3]


def test_what_cannot_be_shown_is_refused(tmp_path: Path) -> None:
    whole = record(tmp_path)
    with pytest.raises(InputError, match="summary only: draw with --trace topk"):
        html_report(replace(whole, routes=None))
    with pytest.raises(InputError, match="cannot be compared"):
        html_report(whole, record(tmp_path, seed=1, layers=7))


def test_a_large_trace_makes_a_page_of_a_few_megabytes(tmp_path: Path) -> None:
    words = " ".join(f"word{n}" for n in range(510))
    page = html_report(record(tmp_path, words, layers=24, blocks=40, steps=28))
    assert len(page) < 5e6
