"""`mos inspect-routing` with ranges, rules and edits: every figure is that of the decisions asked for."""

import json
from dataclasses import replace
from math import log
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mos_cli.config.recipe import RouteSource
from mos_cli.errors import InputError, UsageError
from mos_cli.routing.analysis import Word
from mos_cli.routing.section import cut, cut_all, layer_use, parse_range, readers
from mos_cli.routing.trace import Recording, Steered, TraceToken, make_branch, trace_files
from mos_cli.utils.files import write_all
from tests.helpers.traces import BLOCKS, LAYERS, STEPS, make_trace


def recording_of(**sizes: int) -> Recording:
    trace, routes = make_trace(**sizes)
    return Recording(Path("apple.json"), trace, routes, None, None)


def save(recording: Recording, folder: Path) -> Path:
    path = folder / "apple.json"
    write_all(trace_files(recording.trace, recording.routes, path))
    return path


@given(st.integers(1, 30), st.data())
def test_ranges_include_both_ends_and_may_leave_one_out(count, data):
    first = data.draw(st.integers(0, count - 1))
    last = data.draw(st.integers(first, count - 1))
    assert list(parse_range("--step", f"{first}:{last}", count)) == list(range(first, last + 1))
    assert list(parse_range("--step", f"{first}:", count)) == list(range(first, count))
    assert list(parse_range("--step", f":{last}", count)) == list(range(last + 1))
    assert list(parse_range("--step", str(first), count)) == [first]
    assert list(parse_range("--step", None, count)) == list(range(count))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("6", "--block 6 is out of range: there are blocks 0 to 5"),
        ("2:9", "--block 2:9 is out of range: there are blocks 0 to 5"),
        ("7:", "--block 7: is out of range: there are blocks 0 to 5"),
        ("3:1", "--block 3:1 ends before it begins"),
        *((text, f"--block {text!r} is no range") for text in ("", ":", "a", "1-2", "-1", "1:2:3")),
    ],
)
def test_a_wrong_range_says_what_there_is(text, message):
    with pytest.raises(UsageError) as raised:
        parse_range("--block", text, 6)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(("steps", "blocks"), [("2:4", None), (None, "1:2"), ("3", "0"), (":1", "2:")])
def test_figures_of_a_range_are_those_of_its_decisions(steps, blocks):
    recording = recording_of()
    section = cut(recording, "positive", steps, blocks)
    assert recording.routes is not None
    routes, weight = recording.routes["positive"], np.zeros((STEPS, BLOCKS, LAYERS))
    for place in np.ndindex(routes.ids_SJTK.shape):
        weight[place[0], place[1], routes.ids_SJTK[place]] += float(routes.weights_SJTK[place])
    weight = weight[list(section.steps)][:, list(section.blocks)]
    per_block = weight.sum(axis=0)
    assert np.allclose(section.summary.layer_use_JM, per_block / per_block.sum(axis=1, keepdims=True), atol=1e-4)
    for step, entropy in zip(weight.sum(axis=1), section.summary.entropy_S, strict=True):
        shares = [share for share in step / step.sum() if share]
        assert entropy == pytest.approx(-sum(share * log(share) for share in shares) / log(LAYERS), abs=1e-4)
    assert section.changes is not None
    assert len(section.changes) == len(section.steps) - 1


def test_the_whole_range_is_the_whole():
    recording = recording_of()
    whole = cut(recording, "negative")
    ranged = cut(recording, "negative", "0:", f":{BLOCKS - 1}")
    assert (ranged.steps, ranged.blocks, ranged.changes) == (whole.steps, whole.blocks, whole.changes)
    assert (ranged.summary, ranged.agreement) == (whole.summary, whole.agreement)


def test_a_branch_that_was_not_computed_there_is_left_out_or_refused():
    recording = recording_of()
    assert [section.name for section in cut_all(recording, "positive", "0", None)] == ["positive"]
    assert [section.name for section in cut_all(recording, "positive", "0:1", None)] == ["positive", "negative"]
    with pytest.raises(UsageError, match=f"negative branch was not computed at step 0: it has 1 to {STEPS - 2}"):
        cut(recording, "negative", "0", None)


def test_a_summary_has_no_ranges():
    with pytest.raises(InputError, match="holds a summary only: draw with --trace topk"):
        cut(replace(recording_of(), routes=None), "positive", "0", None)


def test_the_command_shows_the_range(mos, tmp_path):
    path = save(recording_of(), tmp_path)
    result = mos("inspect-routing", path, "--step", "1:3", "--block", "2:", "--json")
    facts = json.loads(result.stdout)
    assert (facts["steps"], facts["blocks"]) == ([1, 2, 3], list(range(2, BLOCKS)))
    assert np.shape(facts["layer_use"]) == (BLOCKS - 2, LAYERS)
    assert len(facts["words"][0]["mean_layer"]) == len(facts["entropy"]) == 3
    shown = mos("inspect-routing", path, "--step", "1:3", "--block", "2:").stdout
    lines = [line.split() for line in shown.splitlines()]
    assert ["step", "1", "2", "3"] in lines
    first = lines.index(["block", *map(str, range(LAYERS))]) + 1
    assert [line[0] for line in lines[first : first + BLOCKS - 2]] == list(map(str, range(2, BLOCKS)))
    refused = mos("inspect-routing", path, "--step", "9")
    assert (refused.exit_code, refused.stderr) == (
        2,
        f"error: --step 9 is out of range: there are steps 0 to {STEPS - 1}\n",
    )


def test_the_words_asked_for_have_their_layers(mos, tmp_path):
    recording = recording_of()
    assert recording.routes is not None
    use = layer_use(recording.routes["positive"], [3], LAYERS)
    path = save(recording, tmp_path)
    facts = json.loads(mos("inspect-routing", path, "-w", "apple", "--json").stdout)
    assert facts["readers"] == [{"reader": "apple", "nth": 1, "layer_use": use.round(4).tolist()}]
    shown = mos("inspect-routing", path, "-w", "apple").stdout.split("words x layers")[1].splitlines()
    assert shown[2].split() == ["apple", *(f"{100 * share:.0f}" if share else "-" for share in use)]


def test_rules_are_shown_as_asked_and_done(mos, tmp_path):
    recording = recording_of()
    trace = recording.trace
    recipe = trace.recipe.model_copy(
        update={"routes": ("red=1", "pear!=2"), "route_from": RouteSource(sha256="a" * 64, until=0.4)}
    )
    done = (Steered(rule="red=1", tokens=(2,), decisions=24), Steered(rule="pear!=2", tokens=(), decisions=0))
    branch = trace.branches["positive"].model_copy(update={"steered": done, "changed": 6})
    trace = trace.model_copy(update={"recipe": recipe, "branches": {**trace.branches, "positive": branch}})
    path = save(replace(recording, trace=trace), tmp_path)
    shown = " ".join(mos("inspect-routing", path).stdout.split())
    assert "red=1 24 decisions: red" in shown
    assert "pear!=2 has no tokens in this branch" in shown
    assert f"another run its choices at steps 0 to 2 (40% of 6 steps, rounded up; sha256 {'a' * 12})" in shown
    assert "all rules 6 of 120 decisions (5.0%) keep other layers than the router chose" in shown
    rules = json.loads(mos("inspect-routing", path, "--json").stdout)["rules"]
    assert (rules["asked"], rules["changed"], rules["done"][0]["decisions"]) == (["red=1", "pear!=2"], 6, 24)
    assert "rules" not in mos("inspect-routing", save(recording_of(), tmp_path / "plain")).stdout


def test_rules_of_a_section_have_the_decisions_of_the_section(mos, tmp_path):
    recording, rules = recording_of(), ("red=1 steps 2-5", "a!=2 blocks 0-2", "red+=1@3 steps 0")
    branch = recording.trace.branches["positive"]
    tokens = [(2,), (1,), (2,)]
    effects = tuple(Steered(rule=rule, tokens=held, decisions=9) for rule, held in zip(rules, tokens, strict=True))
    trace = recording.trace.model_copy(
        update={
            "recipe": recording.trace.recipe.model_copy(update={"routes": rules}),
            "branches": recording.trace.branches
            | {"positive": branch.model_copy(update={"steered": effects, "changed": 6})},
        }
    )
    path = save(replace(recording, trace=trace), tmp_path)
    part = ["inspect-routing", path, "--step", "1:3", "--block", "2:"]
    found = json.loads(mos(*part, "--json").stdout)["rules"]
    # Steps 2 and 3 in the blocks 2 and 3; block 2 at the steps 1 to 3; no step.
    assert [rule["decisions"] for rule in found["done"]] == [4, 3, 0]
    assert found["changed"] is None
    shown = " ".join(mos(*part).stdout.split())
    assert "red=1 steps 2-5 4 decisions: red a!=2 blocks 0-2 3 decisions: a red+=1@3 steps 0 0 decisions: red" in shown
    assert "all rules" not in shown


def test_an_edit_tells_instruction_and_picture_apart(mos, tmp_path):
    recording = recording_of()
    assert recording.routes is not None
    trace, old = recording.trace, recording.trace.branches["positive"]
    cells = [TraceToken(text="picture 1", start=0, end=0, patch=(0, 0, column)) for column in range(2)]
    # [CLS] a red apple [SEP]: the last two now stand for the picture.
    tokens = [*old.tokens[:3], *cells]
    branch = make_branch(old.prompt, tokens, old.steps, recording.routes["positive"], LAYERS)
    edited = replace(recording, trace=trace.model_copy(update={"branches": {**trace.branches, "positive": branch}}))
    section = cut(edited, "positive")
    instruction, picture = Word("instruction", (1, 2)), Word("picture 1", (3, 4))
    red = section.words[1]
    assert readers(section, []) == (instruction, picture)
    assert readers(section, [red, picture]) == (instruction, picture, red)
    facts = json.loads(mos("inspect-routing", save(edited, tmp_path), "--json").stdout)
    for word, reader in zip((instruction, picture), facts["readers"], strict=True):
        use = layer_use(recording.routes["positive"], word.tokens, LAYERS)
        assert (reader["reader"], reader["layer_use"]) == (word.text, use.round(4).tolist())
        assert sum(use) == pytest.approx(1)
