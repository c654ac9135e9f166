"""`mos routing diff`: what it prints and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mos_cli.cli.app import app
from mos_cli.routing.diff import NEAR
from mos_cli.routing.trace import Routes, Trace, trace_files
from mos_cli.utils.files import write_all
from tests.helpers.traces import STEPS, make_trace

Run = tuple[Trace, dict[str, Routes]]


@pytest.fixture
def saved(tmp_path) -> Callable[..., Path]:
    def save(name: str, run: Run, *, arrays: bool = True) -> Path:
        path = tmp_path / f"{name}.json"
        write_all(trace_files(run[0], run[1] if arrays else None, path))
        return path

    return save


def mos(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["routing", "diff", *map(str, arguments)], env={"COLUMNS": "80"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_identical_traces_say_so_in_one_line(saved):
    path = saved("a", make_trace())
    code, out, err = mos(path, path.with_suffix(".png"))
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert out.startswith("the routes are identical")


def test_the_table_says_what_json_says_within_80_columns(saved):
    a = saved("a", make_trace(prompt="a red apple and a dog"))
    b = saved("b", make_trace(prompt="an unbelievablyimpossiblylong apple and [bold]a[/bold] dog", steps=STEPS - 2))
    code, out, err = mos(a, b)
    assert (code, err) == (0, "")
    code, facts, _ = mos(a, b, "--json")
    assert code == 0
    facts = json.loads(facts)
    lines = out.splitlines()
    assert max(map(len, lines[1:])) <= 80
    assert lines[0].startswith(f"{facts['overlap']:.1%} of the choices agree; at least ")
    assert lines[0].endswith(f"first difference at step {facts['first']}")
    assert facts["near_tie"] == NEAR
    assert [word["word"] for word in facts["branches"]["positive"]["words"]] == [
        "apple",
        "and",
        "dog",
        "[CLS]",
        "[SEP]",
    ]
    assert facts["branches"]["positive"]["only_b"] == ["an", "unbelievablyimpossiblylong", "bold]a[/bold"]
    assert "only in B: an, unbelievablyimpossiblylong, bold]a[/bold" in lines
    for word in facts["branches"]["positive"]["words"]:
        assert any(line.split()[:2] == [word["word"], f"{word['overlap']:.1%}"] for line in lines)
    assert f"{STEPS - 2} of {STEPS} and {STEPS - 2} steps compared" in out


def test_how_each_run_was_computed_is_told(saved):
    """Differences may come from quantised towers, or from steps at which no block read what was chosen."""

    def run(name: str, prompt: str, **how: object) -> Path:
        trace, routes = make_trace(prompt=prompt)
        recipe = trace.recipe.model_copy(update=how)
        return saved(name, (trace.model_copy(update={"recipe": recipe}), routes))

    a, b = run("a", "a red apple", quant="nf4", feature_cache=3), run("b", "a big apple")
    out, facts = " ".join(mos(a, b)[1].split()), json.loads(mos(a, b, "--json")[1])
    assert f'"a red apple" (nano, seed 42, {STEPS} steps, fp32, nf4, feature cache 3)' in out
    assert f'"a big apple" (nano, seed 42, {STEPS} steps, fp32)' in out
    assert (facts["a"]["quant"], facts["a"]["feature_cache"]) == ("nf4", 3)


def test_a_folder_is_refused_in_one_line(saved):
    path = saved("a", make_trace())
    for pair in ((path, path.parent), (".", path)):
        code, out, err = mos(*pair)
        assert (code, out, err.count("\n")) == (3, "", 1)
        assert "it is a folder" in err


def test_a_summary_is_refused_in_one_line(saved):
    whole, summary = saved("whole", make_trace()), saved("summary", make_trace(), arrays=False)
    code, out, err = mos(whole, summary)
    assert (code, out, err.count("\n")) == (3, "", 1)
    assert "summary only" in err
