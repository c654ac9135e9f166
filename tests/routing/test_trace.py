"""Traces: what the summaries promise, reading back what was written, and refusing what is damaged."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import BaseModel

from mos_cli.config.recipe import EditRecipe, MaskRecipe, Provenance, Recipe, RouteSource, SourcePicture
from mos_cli.errors import InputError
from mos_cli.images.companions import TRACE_SCHEMA
from mos_cli.routing.trace import (
    BranchSummary,
    RegionGrid,
    Routes,
    Steered,
    Trace,
    TraceArrays,
    TraceBranch,
    TraceToken,
    load_routes,
    load_trace,
    trace_files,
)
from mos_cli.utils.files import write_all
from tests.helpers.traces import BLOCKS, LAYERS, STEPS, make_trace

DOC = Path(__file__).parents[2] / "docs" / "trace.md"


@pytest.fixture
def saved(tmp_path) -> tuple[Path, Trace, dict[str, Routes]]:
    trace, routes = make_trace()
    path = tmp_path / "apple.json"
    write_all(trace_files(trace, routes, path))
    return path, trace, routes


def test_a_trace_is_read_back_as_it_was_written(saved):
    path, trace, routes = saved
    loaded = load_trace(path)
    assert loaded.model_copy(update={"arrays": None}) == trace
    assert load_trace(path.with_suffix(".png")) == loaded
    for name, branch in load_routes(loaded, path).items():
        np.testing.assert_array_equal(branch.ids_SJTK, routes[name].ids_SJTK)
        np.testing.assert_array_equal(branch.weights_SJTK, routes[name].weights_SJTK)
        assert (branch.ids_SJTK.dtype, branch.weights_SJTK.dtype) == (np.uint8, np.float16)


def test_traces_are_not_overwritten_and_leave_nothing_behind(saved):
    path, trace, routes = saved
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    assert len(before) == 2
    with pytest.raises(InputError, match="--overwrite"):
        write_all(trace_files(trace, routes, path))
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == before


def test_a_summary_has_no_decisions(tmp_path):
    trace, _ = make_trace()
    path = tmp_path / "summary.json"
    files = trace_files(trace, None, path)
    assert list(files) == [path]
    write_all(files)
    with pytest.raises(InputError, match="holds a summary only"):
        load_routes(load_trace(path), path)


def _edited(change: Callable[[dict], object]) -> Callable[[bytes], bytes]:
    def edit(data: bytes) -> bytes:
        trace = json.loads(data)
        change(trace)
        return json.dumps(trace).encode()

    return edit


DAMAGE = {
    "empty": (lambda data: b"", "is not JSON"),
    "truncated": (lambda data: data[: len(data) // 2], "is not JSON"),
    "picture": (lambda data: b"\x89PNG\r\n\x1a\n" + data, "is not JSON"),
    "foreign": (lambda data: b'{"name": "x"}', "schema None"),
    "list": (lambda data: b"[]", "schema None"),
    "newer": (
        _edited(lambda trace: trace.update(schema="mos-trace/3")),
        "'mos-trace/3', expected 'mos-trace/2'",
    ),
    "no recipe": (_edited(lambda trace: trace.pop("recipe")), "damaged: recipe"),
    "no picture": (_edited(lambda trace: trace.pop("picture")), "mos-trace/2 needs it"),
    "picture in an old trace": (_edited(lambda trace: trace.update(schema="mos-trace/1")), "mos-trace/1 has none"),
    "extra field": (_edited(lambda trace: trace.update(more=1)), "damaged: more"),
    "bad tokens": (_edited(lambda trace: trace["branches"]["positive"].update(tokens=3)), "positive.tokens"),
    "short summary": (
        _edited(lambda trace: trace["branches"]["positive"]["summary"].update(mean_layer_ST=[[1.0]])),
        "branch positive does not fit",
    ),
    "short times": (_edited(lambda trace: trace.update(times=[1.0])), "branch positive does not fit"),
    "no layers": (_edited(lambda trace: trace.update(layers=[])), "damaged: layers"),
    "not a number": (_edited(lambda trace: trace.update(times=[float("nan")])), "damaged: times"),
    "no file": (_edited(lambda trace: trace["arrays"].update(file=".")), "damaged: arrays.file"),
    "outside": (_edited(lambda trace: trace["arrays"].update(file="../a")), "damaged: arrays.file"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_head_is_refused_in_one_line(saved, damage):
    path, *_ = saved
    change, message = DAMAGE[damage]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match=re.escape(message)) as raised:
        load_trace(path)
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)


def test_a_missing_trace_is_said_so(tmp_path):
    with pytest.raises(InputError, match=r"cannot read the trace .*none\.json: No such file"):
        load_trace(tmp_path / "none.png")


@pytest.mark.parametrize(
    "change", [lambda data: b"", lambda data: data[:-1], lambda data: data[:-1] + bytes([data[-1] ^ 1])]
)
def test_damaged_arrays_are_refused(saved, change):
    path, *_ = saved
    trace = load_trace(path)
    assert trace.arrays
    arrays_path = path.with_name(trace.arrays.file)
    arrays_path.write_bytes(change(arrays_path.read_bytes()))
    with pytest.raises(InputError, match=r"apple\.routing\.safetensors (is damaged|does not belong to apple\.json)"):
        load_routes(trace, path)
    arrays_path.unlink()
    with pytest.raises(InputError, match=r"cannot read .*apple\.routing\.safetensors"):
        load_routes(trace, path)


def _with(array: np.ndarray, value: float) -> np.ndarray:
    changed = array.copy()
    changed[0, 0, 0, 0] = value
    return changed


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ids_SJTK", LAYERS),
        ("weights_SJTK", np.nan),
        ("weights_SJTK", np.inf),
        ("weights_SJTK", -1),
        ("weights_SJTK", 0),
    ],
)
def test_arrays_that_cannot_be_true_are_refused_though_their_hash_is_right(tmp_path, field, value):
    trace, routes = make_trace()
    routes["positive"] = replace(routes["positive"], **{field: _with(getattr(routes["positive"], field), value)})
    path = tmp_path / "made.json"
    write_all(trace_files(trace, routes, path))
    with pytest.raises(InputError, match=r"made\.routing\.safetensors is damaged: it holds"):
        load_routes(load_trace(path), path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (f'"blocks": {BLOCKS}', f'"blocks": {10**30}'),
        (f'"blocks": {BLOCKS}', f'"blocks": {10**9}'),
        ('"end": 1', '"end": 99'),
    ],
)
def test_a_head_that_cannot_be_true_is_refused_at_once(saved, old, new):
    path, *_ = saved
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(InputError, match="is damaged"):
        load_trace(path)


def test_the_documented_example_reads_the_decisions(saved, monkeypatch, capsys):
    path, trace, routes = saved
    monkeypatch.chdir(path.parent)
    (example,) = re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
    exec(example, {})
    token = [token.text for token in trace.branches["positive"].tokens].index("apple")
    ids, weights = routes["positive"].ids_SJTK[:, 3, token], routes["positive"].weights_SJTK[:, 3, token]
    assert capsys.readouterr().out.splitlines() == [
        " ".join(
            [
                str(step),
                *(f"{trace.layers[m]}: {w:.0%}" for m, w in zip(ids[step], weights[step], strict=True)),
            ]
        )
        for step in range(STEPS)
    ]


@pytest.mark.parametrize(
    "model",
    [
        Trace,
        TraceBranch,
        TraceToken,
        BranchSummary,
        TraceArrays,
        Steered,
        RegionGrid,
        Recipe,
        RouteSource,
        EditRecipe,
        MaskRecipe,
        SourcePicture,
        Provenance,
    ],
)
def test_every_field_is_documented(model: type[BaseModel]):
    text = DOC.read_text(encoding="utf-8")
    names = [field.alias or name for name, field in model.model_fields.items()]
    assert [name for name in names if f"`{name}`" not in text] == []
    assert f'`"{TRACE_SCHEMA}"`' in text
