"""`mos inspect-routing --export`: the table and the trace agree in every cell, in both formats."""

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv, parquet

from mos_cli.routing.export import decisions_table
from mos_cli.routing.section import cut
from mos_cli.routing.trace import Recording, Routes, make_branch, trace_files
from mos_cli.utils.files import write_all
from tests.helpers.traces import BLOCKS, LAYERS, STEPS, TOP_K, make_trace, tokens_of

PROMPT = 'a "red", apple; naïve 日本, a RED'


def with_probabilities(routes: Routes, seed: int) -> Routes:
    shape = (*routes.ids_SJTK.shape[:-1], LAYERS)
    return replace(routes, probabilities_SJTM=np.random.default_rng(seed).random(shape).astype(np.float16))


@pytest.fixture
def recording(tmp_path: Path) -> Recording:
    """A trace with all probabilities, whose words have marks that mean something in csv, on the disk."""
    trace, routes = make_trace(prompt=PROMPT)
    routes = {name: with_probabilities(held, seed) for seed, (name, held) in enumerate(routes.items())}
    trace = trace.model_copy(update={"probabilities": True})
    write_all(trace_files(trace, routes, tmp_path / "apple.json"))
    return Recording(tmp_path / "apple.json", trace, routes, None, None)


def read(path: Path) -> list[dict]:
    table = parquet.read_table(path) if path.suffix == ".parquet" else csv.read_csv(path)
    return table.to_pylist()


def expected(recording: Recording, name: str, tokens: list[int], steps: list[int], blocks: list[int]) -> list[dict]:
    """The rows of a branch, decision by decision."""
    assert recording.routes is not None
    trace, branch, routes = recording.trace, recording.trace.branches[name], recording.routes[name]
    rows = []
    for place, step in enumerate(branch.steps):
        for block in range(trace.blocks):
            for token in tokens:
                if step not in steps or block not in blocks:
                    continue
                text = branch.tokens[token].text
                row = {"branch": name, "step": step, "t": trace.times[step], "block": block}
                row |= {"token": token, "token_text": text, "word": text.strip('",;')}
                earlier = [other.text.strip('",;').casefold() for other in branch.tokens[: token + 1]]
                row["nth"] = earlier.count(text.strip('",;').casefold())
                row["kind"] = "special" if text in ("[CLS]", "[SEP]") else "word"
                for k in range(trace.top_k):
                    row[f"layer_{k + 1}"] = int(routes.ids_SJTK[place, block, token, k])
                    row[f"weight_{k + 1}"] = float(routes.weights_SJTK[place, block, token, k])
                assert routes.probabilities_SJTM is not None
                for layer, layer_name in enumerate(trace.layers):
                    name_of = f"probability_{layer_name.replace(' ', '_')}"
                    row[name_of] = float(routes.probabilities_SJTM[place, block, token, layer])
                rows.append(row)
    return rows


def agree(rows: list[dict], wanted: list[dict], digits: float) -> None:
    assert len(rows) == len(wanted)
    for row, want in zip(rows, wanted, strict=True):
        assert list(row) == list(want)
        for name, value in want.items():
            assert row[name] == (pytest.approx(value, abs=digits) if isinstance(value, float) else value)


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_export_and_trace_agree_cell_by_cell(mos, recording, tmp_path, suffix):
    file = tmp_path / f"routes{suffix}"
    result = mos("inspect-routing", recording.path, "--export", file)
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{file}\n", "")
    everything = [
        row
        for name, branch in recording.trace.branches.items()
        for row in expected(recording, name, list(range(len(branch.tokens))), list(range(STEPS)), list(range(BLOCKS)))
    ]
    # Printed as the shortest text that tells one fp32 from all others, so that csv is exact in fp16 as well.
    agree(read(file), everything, digits=0 if suffix == ".parquet" else 1e-7)
    weights = np.array([row["weight_1"] for row in read(file)], np.float16)
    assert weights.tolist() == [row["weight_1"] for row in everything]


def test_export_follows_branch_words_and_ranges(mos, recording, tmp_path):
    def exported(*arguments: str) -> list[dict]:
        file = tmp_path / "routes.parquet"
        assert mos("inspect-routing", recording.path, "--export", file, "--overwrite", *arguments).exit_code == 0
        return read(file)

    steps, blocks = list(range(STEPS)), list(range(BLOCKS))
    agree(exported("--branch", "negative"), expected(recording, "negative", [0, 1, 2], steps, blocks), 0)
    # [CLS] is in both branches, apple in one.
    words = exported("-w", "apple", "-w", "[CLS]")
    agree(
        words,
        expected(recording, "positive", [0, 3], steps, blocks) + expected(recording, "negative", [0], steps, blocks),
        0,
    )
    first = exported("--step", "0", "--block", "1:2", "-w", "red#1")
    agree(first, expected(recording, "positive", [2], [0], [1, 2]), 0)


def test_pictures_are_a_kind_of_their_own():
    trace, routes = make_trace()
    old = trace.branches["positive"]
    tokens = [*old.tokens[:4], old.tokens[4].model_copy(update={"text": "picture 1", "patch": (0, 0, 0)})]
    branch = make_branch(old.prompt, tokens, old.steps, routes["positive"], LAYERS)
    recording = Recording(
        Path("x"),
        trace.model_copy(update={"branches": {"positive": branch}}),
        {"positive": routes["positive"]},
        None,
        None,
    )
    section = cut(recording, "positive")
    table = decisions_table(section, section.words)
    assert table["kind"].to_pylist()[:5] == ["special", "word", "word", "word", "picture"]
    assert not [name for name in table.column_names if name.startswith("probability")]


def test_bad_exports_are_one_line(mos, recording, tmp_path, monkeypatch):
    def refused(*arguments: object) -> tuple[int, str]:
        result = mos("inspect-routing", *arguments)
        assert result.stdout == ""
        assert result.stderr.count("\n") == 1
        return result.exit_code, result.stderr

    assert refused(recording.path, "--export", tmp_path / "a.xls")[0] == 2
    taken = tmp_path / "taken.csv"
    taken.write_text("mine")
    code, message = refused(recording.path, "--export", taken)
    assert (code, taken.read_text()) == (3, "mine")
    assert "--overwrite" in message
    summary = tmp_path / "summary.json"
    write_all(trace_files(recording.trace.model_copy(update={"probabilities": None}), None, summary))
    code, message = refused(summary, "--export", tmp_path / "b.csv")
    assert (code, "--trace topk" in message, (tmp_path / "b.csv").exists()) == (3, True, False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, message = refused(recording.path, "--export", tmp_path / "c.csv")
    assert (code, "pip install 'mos-cli[inspect]'" in message) == (2, True)


def test_a_large_trace_is_exported_without_a_loop_over_decisions():
    """287 thousand decisions take a fraction of a second of the processor; a loop would take tens."""
    steps, blocks, words = 14, 40, 510
    shape = (steps, blocks, words + 2, TOP_K)
    ids = np.random.default_rng(0).integers(0, LAYERS, shape).astype(np.uint8)
    routes = {"positive": Routes(ids, np.full(shape, 0.5, np.float16))}
    trace, _ = make_trace(blocks=blocks, steps=steps)
    prompt = "word " * words
    branch = make_branch(prompt, tokens_of(prompt), range(steps), routes["positive"], LAYERS)
    recording = Recording(Path("x"), trace.model_copy(update={"branches": {"positive": branch}}), routes, None, None)
    section = cut(recording, "positive")
    started = time.process_time()
    table = decisions_table(section, section.words)
    assert time.process_time() - started < 2
    assert table.num_rows == steps * blocks * (words + 2)
    assert pa.types.is_unsigned_integer(table.schema.field("layer_1").type)
