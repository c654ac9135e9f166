"""`mos inspect-routing`: what it prints, for people, pipes and programs, and what it refuses."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from rich.cells import cell_len
from rich.console import Console
from typer.testing import CliRunner

from mos_cli.cli.app import MosGroup
from mos_cli.cli.inspect_routing import inspect_routing
from mos_cli.routing.analysis import find_words, step_changes
from mos_cli.routing.export import decisions_table
from mos_cli.routing.section import cut
from mos_cli.routing.trace import AdapterTrace, Recording, Routes, Trace, load_recording, make_branch, trace_files
from mos_cli.routing.views.terminal import RoutesView
from mos_cli.utils.files import write_all
from tests.helpers.traces import BLOCKS, DEAD, LAYERS, STEPS, make_trace

app = typer.Typer(cls=MosGroup, pretty_exceptions_enable=False)
app.callback()(lambda: None)
app.command("inspect-routing")(inspect_routing)


@pytest.fixture
def trace_path(tmp_path) -> Path:
    trace, routes = make_trace()
    path = tmp_path / "apple.json"
    write_all(trace_files(trace, routes, path))
    return path


@pytest.fixture(autouse=True)
def _plain_console(monkeypatch):
    monkeypatch.setattr("mos_cli.cli.output.stdout", Console(width=80, color_system=None, highlight=False))


def view_of(trace: Trace, routes: dict[str, Routes] | None, asked: Sequence[str] = ()) -> RoutesView:
    section = cut(Recording(Path("x.json"), trace, routes, None, None), "positive")
    return RoutesView(section, find_words(section.words, asked) if asked else ())


def mos(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["inspect-routing", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


def as_json(*arguments: object) -> dict:
    code, out, _ = mos(*arguments, "--json")
    assert code == 0
    return json.loads(out)


def test_the_view_shows_words_layers_entropy_strongest_and_dead(trace_path):
    code, out, err = mos(trace_path)
    assert (code, err) == (0, "")
    facts = as_json(trace_path)
    lines = out.splitlines()
    for word in facts["words"]:
        row = next(line for line in lines if line.split()[:1] == [word["word"]])
        assert row.split()[1:] == [f"{layer:.1f}" for layer in word["mean_layer"]]
    assert ["entropy", *(f"{value:.2f}" for value in facts["entropy"])] in [line.split() for line in lines]
    for block, use in enumerate(facts["layer_use"]):
        assert [str(block), *(f"{100 * share:.0f}" if share else "-" for share in use)] in [
            line.split() for line in lines
        ]
    strongest = facts["strongest"][0]
    assert f"strongest {strongest['layer']} ({strongest['share']:.0%})" in " ".join(out.split())
    assert ["never", "used", str(DEAD)] in [line.split() for line in lines]
    shared = [f"{100 * share:.0f}" for share in facts["agreement"]["negative"]]
    assert ["negative", *shared] in [line.split() for line in lines]


def test_json_says_what_the_trace_says(trace_path):
    trace, routes = make_trace()
    facts = as_json(trace_path)
    assert facts["overview"] == {
        "prompt": "a red apple",
        "branch": "positive",
        "branches": ["positive", "negative"],
        "model": "nano",
        "seed": 42,
        "steps": STEPS,
        "feature_cache": None,
        "layers": list(trace.layers),
        "blocks": BLOCKS,
        "top_k": 2,
        "adapter": None,
    }
    assert facts["steps"] == list(range(STEPS))
    assert facts["times"] == list(trace.times)
    assert [word["word"] for word in facts["words"]] == ["a", "red", "apple", "[CLS]", "[SEP]"]
    mean_layer_ST = np.array(trace.branches["positive"].summary.mean_layer_ST)
    assert facts["words"][2]["mean_layer"] == mean_layer_ST[:, 3].tolist()
    assert np.shape(facts["layer_use"]) == (BLOCKS, LAYERS)
    assert facts["dead"] == [DEAD]
    positive = routes["positive"]
    assert facts["changes"] == list(step_changes(positive.ids_SJTK, positive.weights_SJTK))
    assert len(facts["agreement"]["negative"]) == BLOCKS


def test_the_other_branch_has_its_own_words_and_steps(trace_path):
    facts = as_json(trace_path, "--branch", "negative")
    assert [word["word"] for word in facts["words"]] == ["blurry", "[CLS]", "[SEP]"]
    assert facts["steps"] == list(range(1, STEPS - 1))
    assert len(facts["words"][0]["mean_layer"]) == len(facts["entropy"]) == STEPS - 2
    code, out, _ = mos(trace_path, "--branch", "negative")
    assert code == 0
    assert ["step", *map(str, range(1, STEPS - 1))] in [line.split() for line in out.splitlines()]


def test_the_picture_leads_to_its_trace(trace_path):
    assert mos(trace_path.with_suffix(".png")) == mos(trace_path)


def test_a_summary_is_enough(tmp_path):
    trace, _ = make_trace()
    write_all(trace_files(trace, None, tmp_path / "summary.json"))
    assert as_json(tmp_path / "summary.json")["changes"] is None
    code, out, _ = mos(tmp_path / "summary.json")
    assert code == 0
    assert "changes" not in out


def test_only_the_words_asked_for(trace_path):
    facts = as_json(trace_path, "-w", "Apple", "--word", "a")
    assert [word["word"] for word in facts["words"]] == ["a", "apple"]
    code, out, _ = mos(trace_path, "-w", "apple")
    assert code == 0
    assert not [line for line in out.splitlines() if line.startswith("red ")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-w", "pear"], "'pear' is not a word of this prompt: its words are a, red, apple, [CLS], [SEP]"),
        (["--branch", "middle"], "the trace has no 'middle' branch: it has positive, negative"),
    ],
)
def test_a_wrong_option_is_a_usage_error_in_one_line(trace_path, arguments, message):
    assert mos(trace_path, *arguments) == (2, "", f"error: {message}\n")


def test_an_occurrence_of_a_word_is_told_in_json(tmp_path):
    write_all(trace_files(*make_trace(prompt="a cat and a Cat"), tmp_path / "cats.json"))
    facts = as_json(tmp_path / "cats.json", "-w", "cat")
    assert [(word["word"], word["nth"]) for word in facts["words"]] == [("cat", 1), ("Cat", 2)]
    assert [(word["reader"], word["nth"]) for word in facts["readers"]] == [("cat", 1), ("Cat", 2)]


def test_the_slots_of_a_base_model_are_shown_apart(tmp_path):
    """Two slots; the last kept layer is padding, with weight 0."""
    trace, routes = make_trace()
    ids, weights = np.array([3, 1, 3, 3], np.uint8), np.array([0.5, 0.4, 0.1, 0], np.float16)
    slots = np.array([1, 0, 0, 1], np.uint8)
    routes = {
        name: Routes(*(np.broadcast_to(array, (*held.ids_SJTK.shape[:3], 4)) for array in (ids, weights)))
        for name, held in routes.items()
    }
    routes = {
        name: replace(held, slots_SJTK=np.broadcast_to(slots, held.ids_SJTK.shape)) for name, held in routes.items()
    }
    recipe = trace.recipe.model_copy(update={"routes": ("red=3 slots 0",)})
    branches = {
        name: make_branch(branch.prompt, branch.tokens, branch.steps, routes[name], LAYERS).model_copy(
            update={"changed": 3}
        )
        for name, branch in trace.branches.items()
    }
    adapter = AdapterTrace(own_layers=(1, 3), trained=False)
    made = {"recipe": recipe, "branches": branches, "adapter": adapter, "top_k": 4}
    path = tmp_path / "base.json"
    write_all(trace_files(trace.model_copy(update=made), routes, path))

    assert as_json(path)["slots"] == [
        {"own_layer": 1, "layer_use": [0, 0.8, 0, 0.2, 0]},
        {"own_layer": 3, "layer_use": [0, 0, 0, 1, 0]},
    ]
    shown = mos(path)[1]
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert "slot 0, own 1 - 80 - 20 -" in lines
    assert "slot 1, own 3 - - - 100 -" in lines
    facts = " ".join(shown.split())
    assert f"{LAYERS} layers x {BLOCKS} blocks, each slot of a block reads its own layer and up to 1 other" in facts
    assert "keep other layers than without rules" in facts
    trained = made | {"adapter": AdapterTrace(own_layers=(1, 3), trained=True)}
    write_all(trace_files(trace.model_copy(update=trained), routes, tmp_path / "trained.json"))
    assert "keep other layers than the router chose" in " ".join(mos(tmp_path / "trained.json")[1].split())
    section = cut(load_recording(path), "positive")
    row = decisions_table(section, section.words).slice(0, 1).to_pylist()[0]
    assert [(row[f"layer_{k}"], row[f"slot_{k}"]) for k in range(1, 5)] == [(3, 1), (1, 0), (3, 0), (3, 1)]
    assert list(row)[9:12] == ["layer_1", "slot_1", "weight_1"]


def test_bad_input_is_one_line_and_exit_3(trace_path):
    def refused(*arguments: object) -> str:
        code, out, err = mos(*arguments)
        assert (code, out, err.count("\n")) == (3, "", 1)
        return err

    assert "none.json: No such file" in refused(trace_path.with_name("none.json"))
    trace_path.with_suffix("").mkdir()
    for folder in (trace_path.with_suffix(""), Path(), Path("/")):
        assert f"cannot read {folder}: it is a folder" in refused(folder)
    assert "it is a folder" in refused(trace_path, "--html", trace_path.with_name("a.html"), "--compare", ".")
    sidecar = trace_path.with_name("apple.routing.safetensors")
    sidecar.write_bytes(sidecar.read_bytes()[:100])
    assert "apple.routing.safetensors is damaged" in refused(trace_path)
    trace_path.write_text(trace_path.read_text().replace("mos-trace/2", "mos-trace/9"))
    assert "'mos-trace/9'" in refused(trace_path)
    trace_path.write_text("{")
    assert "apple.json is not JSON" in refused(trace_path)


LONG = "an unbelievablyimpossiblylongword 日本語 x[bold]y[/bold]z and " + "many more words " * 4


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("width", [80, 60])
def test_it_fits_any_width_without_colour(width, encoding):
    """31 layers and 50 steps are cut to fit; where the terminal knows only ASCII, so does the view."""
    prompt = LONG if encoding == "utf-8" else "a red apple"
    trace, routes = make_trace(prompt=prompt, layers=31, blocks=40, steps=50)
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    view = view_of(trace, routes, asked=prompt.split())
    Console(file=stream, width=width).print(view)
    stream.flush()
    text = raw.getvalue().decode(encoding)
    lines = text.splitlines()
    assert "\x1b" not in text
    assert max(map(cell_len, lines)) <= width
    assert "…" not in text
    steps = [int(step) for step in next(line for line in lines if line.startswith("step ")).split()[1:]]
    assert (steps[0], steps[-1]) == (0, 49)
    assert set(np.diff(steps)) <= {49 // (len(steps) - 1), 49 // (len(steps) - 1) + 1}
    headers = [line.split() for line in lines]
    for heading, label, count in (
        ("words x layers", "layer", 31),
        ("blocks x", "block", 31),
        ("branches x", "block", 40),
    ):
        first = next(place for place, line in enumerate(lines) if line.startswith(heading))
        last = next((place for place in range(first, len(lines)) if not lines[place]), len(lines))
        shown = [int(number) for header in headers[first:last] if header[:1] == [label] for number in header[1:]]
        assert shown == list(range(count))
    if encoding == "utf-8":
        assert "x[bold]y[/bold]z" in text


def test_colour_changes_no_character(trace_path):
    view = view_of(*make_trace())
    texts = []
    for colour in (None, "truecolor"):
        target = Console(width=80, color_system=colour, force_terminal=True, legacy_windows=False, _environ={})
        with target.capture() as capture:
            target.print(view)
        texts.append(capture.get())
    assert "\x1b[" in texts[1]
    assert "\x1b[" not in texts[0]
    assert re.sub(r"\x1b\[[0-9;]*m", "", texts[1]) == texts[0]


def test_a_long_prompt_is_cut_and_says_so():
    trace, routes = make_trace(prompt=" ".join(f"word{number}" for number in range(70)))
    target = Console(width=80)
    with target.capture() as capture:
        target.print(view_of(trace, routes))
    text = capture.get()
    assert "word59 " in text
    assert "word60 " not in text
    assert "and 12 more words" in text


def test_nothing_heavy_is_imported(trace_path):
    """The command module alone imports no numpy; showing a trace imports no torch."""
    code = (
        "import sys, typer\n"
        "from mos_cli.cli.inspect_routing import inspect_routing\n"
        "assert not {'numpy', 'pydantic', 'torch'} & set(sys.modules)\n"
        "inspect_routing(__import__('pathlib').Path(sys.argv[1]))\n"
        "assert not {'torch', 'transformers', 'diffusers', 'huggingface_hub'} & set(sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(trace_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "blocks x layers" in run.stdout
