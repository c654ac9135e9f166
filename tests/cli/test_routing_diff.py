"""`mos routing diff`: what it prints and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mos_cli.cli.app import app
from mos_cli.config.recipe import Recipe
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


@pytest.fixture
def saved_as(saved) -> Callable[..., Path]:
    """Saves a run with changes of its recipe."""

    def save(name: str, prompt: str = "a blue cat", **how: Any) -> Path:
        trace, routes = make_trace(prompt=prompt)
        recipe = Recipe.model_validate(trace.recipe.model_dump() | how)
        return saved(name, (trace.model_copy(update={"recipe": recipe}), routes))

    return save


def runs_of(a: Path, b: Path) -> tuple[str, str]:
    """The lines that tell the two runs, each on one line."""
    shown = mos(a, b)[1].split("\n\n")[1].replace("\nB ", "\n\nB ").split("\n\n")
    first, second = (" ".join(run.split())[2:] for run in shown)
    return first, second


def test_how_each_run_was_computed_is_told(saved_as):
    """Differences may come from quantised towers, or from steps at which no block read what was chosen."""
    a, b = saved_as("a", "a red apple", quant="nf4", feature_cache=3), saved_as("b", "a big apple")
    assert runs_of(a, b) == (
        f'"a red apple" (nano, seed 42, {STEPS} steps, fp32, nf4, feature cache 3)',
        f'"a big apple" (nano, seed 42, {STEPS} steps, fp32)',
    )
    facts = json.loads(mos(a, b, "--json")[1])
    assert (facts["a"]["quant"], facts["a"]["feature_cache"]) == ("nf4", 3)


def test_weights_of_the_prompt_and_loras_are_told(saved_as):
    weighted = {"weights": [{"start": 2, "end": 6, "weight": 0}]}
    loras = {"loras": [{"name": "zog", "sha256": "a" * 64, "scale": 0.7}, {"name": "flat", "sha256": "b" * 64}]}
    a, b = saved_as("a", **weighted, **loras), saved_as("b", "a red cat", **loras)
    told = f"nano, seed 42, {STEPS} steps, fp32, LoRA zog:0.7 (aaaaaaaaaa), LoRA flat:1 (bbbbbbbbbb)"
    assert runs_of(a, b) == (f'"a (blue:0) cat" ({told})', f'"a red cat" ({told})')


SOURCE = {"sha256": "c" * 64, "width": 64, "height": 64}
EDIT = {"sources": [SOURCE], "canvas": (64, 64), "image_cfg": 1.5, "strength": 1}


@pytest.mark.parametrize(
    ("one", "other", "told"),
    [
        ({"solver": "ab2"}, {}, ("ab2", "euler")),
        ({"cfg": 5}, {}, ("cfg 5", "cfg 3")),
        ({"cfg_interval": (0.0, 1.0)}, {}, ("cfg interval 0,1", "cfg interval 0.2,0.9")),
        ({"width": 96}, {}, ("96x64", "64x64")),
        ({"batch": {"size": 4, "place": 1}}, {}, ("2 of a batch of 4", "drawn alone")),
        ({"negative": "blurry  (x)"}, {}, ('negative "blurry (x)"', 'negative "blurry"')),
        (
            {"negative_weights": [{"start": 0, "end": 6, "weight": 2}]},
            {},
            ('negative "(blurry:2)"', 'negative "blurry"'),
        ),
        ({"edit": EDIT}, {"edit": EDIT | {"strength": 0.5}}, ("strength 1", "strength 0.5")),
        ({"edit": EDIT}, {"edit": EDIT | {"image_cfg": 2}}, ("image cfg 1.5", "image cfg 2")),
        (
            {"edit": EDIT},
            {"edit": EDIT | {"sources": [SOURCE | {"sha256": "d" * 64}]}},
            ("edited from cccccccccc", "edited from dddddddddd"),
        ),
        ({"edit": EDIT | {"mask": {"sha256": "e" * 64}}}, {"edit": EDIT}, ("mask eeeeeeeeee", None)),
    ],
)
def test_what_else_two_runs_differ_in_is_told(saved_as, one, other, told):
    a, b = saved_as("a", **one), saved_as("b", "a red cat", **other)
    whole = f"nano, seed 42, {STEPS} steps, fp32"
    facts = [whole if text is None else f"{whole}, {text}" for text in told]
    assert runs_of(a, b) == (f'"a blue cat" ({facts[0]})', f'"a red cat" ({facts[1]})')


def test_two_bundles_of_one_name_are_told_apart(saved):
    (trace, routes), other = make_trace(prompt="a blue cat"), make_trace(prompt="a red cat")
    made = trace.made.model_copy(update={"bundle_hash": "e" * 64})
    runs = runs_of(saved("a", (trace.model_copy(update={"made": made}), routes)), saved("b", other))
    assert ["bundle eeeeeeeeee" in runs[0], "bundle 0000000000" in runs[1]] == [True, True]


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
