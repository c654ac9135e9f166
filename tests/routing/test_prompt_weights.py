"""Weights in prompts: how they are written, what they scale, and where they are shown."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mos_cli.config.recipe import MAX_WEIGHT, PromptWeight, make_recipe, with_weights
from mos_cli.errors import UsageError
from mos_cli.images.outputs import read_drawing
from mos_cli.routing.prompt_weights import check_weights, parse_weights, token_weights
from mos_cli.routing.trace import TraceToken, load_recording, trace_files
from mos_cli.routing.views.html import html_report
from mos_cli.sampling.guidance import Branches
from mos_cli.towers.bank import StateBank, join
from mos_cli.utils.files import write_all
from tests.helpers.generation_towers import FIXED, ROUTED, inputs, name_of, small_tower
from tests.helpers.recordings import record
from tests.helpers.terminals import in_terminal


def weights_of(text: str) -> dict[str, float]:
    prompt, weights = parse_weights(text)
    return {prompt[one.start : one.end]: one.weight for one in weights or ()}


def test_a_parenthesis_with_a_colon_is_a_weight() -> None:
    assert parse_weights("a (cat:1.3) and a (big dog : .5)")[0] == "a cat and a big dog "
    assert weights_of("a (cat:1.3) and a (big dog : .5)") == {"cat": 1.3, "big dog": 0.5}
    assert weights_of("(a cat (small):2)") == {"a cat (small)": 2}
    assert weights_of("((cat:0))") == {"cat": 0}
    assert weights_of("(10:30:1.5)") == {"10:30": 1.5}
    assert parse_weights("(cat:1)") == ("cat", None), "a weight of 1 changes nothing"


def test_other_parentheses_are_text() -> None:
    for text in ("a cat (small)", "a :) face", "((cat))", "a cat )", "( a cat", "10:30", "a\\b"):
        assert parse_weights(text) == (text, None)
    assert parse_weights(r"a \(cat:1.3\)") == ("a (cat:1.3)", None)
    assert parse_weights(r"(\(a\):2)") == ("(a)", (PromptWeight(start=0, end=3, weight=2),))


MISTAKES = {
    "(cat:)": "is no weight",
    "(cat:x)": "is no weight",
    "(cat:1,3)": "is no weight",
    "(cat:-1)": "is no weight",
    "(cat:nan)": "is no weight",
    "(cat:1e1)": "is no weight",
    "(cat:10.1)": "from 0 to 10",
    "a clock at (10:30)": "is no weight",
    "(left: red)": r"or \( for the character",
    "a (cat:1.3": "is not closed",
    "(:1.3)": "has no words",
    "(  :1.3)": "has no words",
    "((a:2) and b:2)": "a weight in a weight",
    "(((a:2)) and b:2)": "a weight in a weight",
    "(a: (b:2))": "a weight in a weight",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_what_is_malformed_is_refused_in_one_line(mos, bundle, tmp_path, text: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_weights(text)
    assert MISTAKES[text] in str(raised.value)
    for line in (["generate", text], ["generate", "a cat", "--negative", text]):
        refused = mos(*line, "-o", tmp_path / "a.png")
        assert (refused.exit_code, len(refused.stderr.splitlines())) == (2, 1), refused.stderr


@given(st.text(r"ab (:.12)\ ", max_size=30))
def test_any_text_is_read_or_refused_and_comes_out_as_it_was_typed(text: str) -> None:
    try:
        prompt, weights = parse_weights(text)
    except UsageError:
        return
    if weights is not None:
        assert all(0 <= one.weight <= MAX_WEIGHT and prompt[one.start : one.end].strip() for one in weights)
        assert parse_weights(with_weights(prompt, weights)) == (prompt, weights)


def test_the_time_of_reading_grows_with_the_length_alone() -> None:
    """With its square, these would take an hour."""
    assert len(parse_weights("(a:2)" * 40_000)[1] or ()) == 40_000
    for text in ("(" * 200_000, ")" * 200_000):
        assert parse_weights(text) == (text, None)
    with pytest.raises(UsageError):
        parse_weights("(a:" * 60_000)


def test_the_tokens_of_the_characters_have_the_weight() -> None:
    spans = {"[CLS]": (0, 0), "a": (0, 1), "ap": (2, 4), "##ple": (4, 7), " dog": (7, 11), "": (0, 0)}
    tokens = [TraceToken(text=text, start=start, end=end) for text, (start, end) in spans.items()]
    first, second = PromptWeight(start=2, end=7, weight=2), PromptWeight(start=8, end=11, weight=0.5)
    assert token_weights([first, second], tokens) == [1, 1, 2, 2, 0.5, 1]
    halves = [PromptWeight(start=4, end=5, weight=2), PromptWeight(start=5, end=7, weight=3)]
    assert token_weights(halves, tokens)[3] == 6, "a token of two weights has their product"


@pytest.mark.parametrize("forged", [{"start": 0, "end": 40}, {"start": 3, "end": 3}, {"weight": -1}, {"weight": 11}])
def test_weights_outside_of_the_prompt_or_the_range_are_refused(forged: dict) -> None:
    sizes = {"width": 64, "height": 64, "steps": 1, "cfg": 1, "cfg_interval": "0,1", "precision": "fp32"}
    with pytest.raises(UsageError):
        make_recipe(prompt="a cat", model="m", seed=1, weights=[{"start": 2, "end": 5, "weight": 2} | forged], **sizes)


@pytest.mark.parametrize("variant", [*ROUTED, *FIXED], ids=name_of)
@torch.no_grad()
def test_the_context_of_a_token_is_scaled_and_nothing_else(variant: dict) -> None:
    """What a block is given for a token, seen from outside, is that of the unweighted tower times the weight."""
    tower = small_tower(**variant)
    z, t, states = inputs(1)
    bank = tower.project_states(states)
    seen: list[list[torch.Tensor]] = []
    for block in tower.blocks:
        block.register_forward_pre_hook(lambda block, given: seen[-1].append(given[2]))

    def passed(scale: list[float] | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        scale_BT = None if scale is None else torch.tensor([scale])
        seen.append([])
        x_hat, route = tower(z, t, StateBank(bank.bank_BTMD, bank.router_BTR, scale_BT=scale_BT))
        return x_hat, [route.ids_BTJK, route.weights_BTJK]

    plain, route = passed(None)
    ones, _ = passed([1.0] * 5)
    scaled, routed = passed([1, 1.5, 1, 1, 0])
    assert torch.equal(plain, ones)
    assert not torch.equal(plain, scaled)
    assert all(torch.equal(a, b) for a, b in zip(route, routed, strict=True)), "the routes of a step are the same"
    for kept, weighed in zip(seen[0], seen[2], strict=True):
        assert torch.equal(kept[0, :, 0] * torch.tensor([1, 1.5, 1, 1, 0]), weighed[0, :, 0])


@torch.no_grad()
def test_branches_of_one_batch_have_their_own_weights() -> None:
    tower, z = small_tower(), inputs(1)[0]
    long, short = (tower.project_states(inputs(1, tokens)[2]) for tokens in (6, 2))
    banks = {
        "positive": StateBank(long.bank_BTMD, long.router_BTR, scale_BT=torch.tensor([[1, 2, 1, 0.5, 1, 1]])),
        "negative": short,
    }
    assert join([short, short]).scale_BT is None
    alone, joined = (
        Branches(tower, [banks], batched_guidance=batched)(tuple(banks), z, 0.6, lambda picture, name: None)[0]
        for batched in (False, True)
    )
    for name in banks:
        torch.testing.assert_close(alone[name], joined[name], atol=2e-5, rtol=1e-4)


def test_weights_are_recorded_and_replayed(mos, bundle, tmp_path) -> None:
    line = ["-s", 1, "--cfg", 3, "-o"]
    assert mos("generate", "a red apple", *line, tmp_path / "plain.png").exit_code == 0
    assert mos("generate", "a (red:1) apple", *line, tmp_path / "one.png").exit_code == 0
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "one.png").read_bytes()
    typed = ["a (red:2.5) apple", "--negative", "(dog:0.5)", *line, tmp_path / "a.png"]
    assert mos("generate", *typed).exit_code == 0
    recipe = read_drawing(tmp_path / "a.png")[1].recipe
    assert (recipe.prompt, recipe.weights) == ("a red apple", (PromptWeight(start=2, end=5, weight=2.5),))
    assert (recipe.negative, recipe.negative_weights) == ("dog", (PromptWeight(start=0, end=3, weight=0.5),))
    assert recipe.weighted_prompt == "a (red:2.5) apple"
    plain = read_drawing(tmp_path / "plain.png")[1]
    assert read_drawing(tmp_path / "a.png")[1].sha256 != plain.sha256
    assert mos("replay", tmp_path / "a.png", "--verify").stdout == "exact\n"
    changed = ["replay", tmp_path / "a.png", "--set", "prompt=a red apple", "--set", "negative=", "-o"]
    assert mos(*changed, tmp_path / "without.png").exit_code == 0
    assert read_drawing(tmp_path / "without.png")[1].sha256 == plain.sha256
    weighed = ["replay", tmp_path / "plain.png", "--set", "prompt=a (red:2.5) apple", "--set", "negative=(dog:.5)"]
    assert mos(*weighed, "-o", tmp_path / "with.png").exit_code == 0
    assert read_drawing(tmp_path / "with.png")[1].recipe == recipe


def test_alternatives_can_have_weights(mos, bundle, tmp_path) -> None:
    assert (
        mos("generate", "a {(red:2)|(green:3)} apple", "-n", 4, "-s", 1, "-o", tmp_path / "{seed}.png").exit_code == 0
    )
    found = [read_drawing(tmp_path / f"{seed}.png")[1].recipe for seed in range(1, 5)]
    assert {recipe.weighted_prompt for recipe in found} == {"a (red:2) apple", "a (green:3) apple"}
    shown = in_terminal(["generate", "a (red:2) apple", "-n", 2, "-s", 1, "--negative", "(dog:2)", "--dry-run"])
    assert "a (red:2) apple" in shown.text
    assert "(dog:2)" in shown.text


def test_words_that_are_not_read_cannot_have_a_weight() -> None:
    """A tokenizer may drop characters, for example those that are not seen."""
    tokens = [TraceToken(text="cat", start=4, end=7)]
    check_weights([PromptWeight(start=4, end=7, weight=2)], "a \u200b cat", tokens)
    with pytest.raises(UsageError, match="reads no token"):
        check_weights([PromptWeight(start=2, end=3, weight=2)], "a \u200b cat", tokens)


def test_weights_are_shown_beside_the_routes(mos, bundle, tmp_path) -> None:
    picture = tmp_path / "a.png"
    assert mos("generate", "a (red:2.5) apple", "-s", 1, "-o", picture).exit_code == 0
    shown = mos("inspect-routing", picture, "--word", "red").stdout
    assert "weights in the prompt" in shown
    assert "red x2.5" in shown
    facts = json.loads(mos("inspect-routing", picture, "--json").stdout)
    assert {word["word"]: word["weights"] for word in facts["words"] if not word["special"]} == {
        "a": [1.0],
        "red": [2.5],
        "apple": [1.0],
    }
    assert "x2.5" not in mos("inspect-routing", picture, "--branch", "negative").stdout
    recording = load_recording(picture)
    assert recording.trace.recipe.weights is not None
    report = html_report(recording)
    assert '"scales":[1.0,1.0,2.5,1.0,1.0]' in report


def test_a_trace_of_weights_is_read_again(tmp_path: Path) -> None:
    recording = record(tmp_path, weights=[{"start": 2, "end": 5, "weight": 0.5}])
    write_all(trace_files(recording.trace, recording.routes, recording.path))
    assert load_recording(recording.path).trace == recording.trace.model_copy(
        update={"arrays": load_recording(recording.path).trace.arrays}
    )
