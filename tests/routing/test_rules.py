"""Routing rules as people write them: read, printed back, matched to tokens, and refused where the mistake is."""

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mos_cli.errors import UsageError
from mos_cli.routing.rules import BaselineRule, Rule, parse_rule, parse_rules, parse_target, tokens_of
from mos_cli.routing.trace import TraceToken

NUMBERS = st.lists(st.integers(0, 60), min_size=1, max_size=6, unique=True).map(lambda n: tuple(sorted(n)))
AMOUNTS = st.integers(-(10**9), 10**9).map(lambda n: n / 10**6)
TARGETS = st.one_of(
    st.sampled_from(
        [
            "*",
            "red",
            "t-shirt",
            "[CLS]",
            "red apple",
            "a=b",
            "picture 1",
            "naïve",
            "-",
            "last",
            "fixed:",
            "fixed:2",
            "Shuffle:7",
        ]
    ),
    st.from_regex(r"[^\s\"]([^\"\n\r]{0,10}[^\s\"])?", fullmatch=True).filter(lambda text: text == text.strip()),
)


@st.composite
def rules(draw) -> Rule:
    operator = draw(st.sampled_from(["=", "!=", "+="]))
    return Rule(
        target=draw(TARGETS),
        operator=operator,
        layers=draw(NUMBERS),
        nth=draw(st.none() | st.integers(1, 9999)),
        amount=draw(AMOUNTS) if operator == "+=" else 0.0,
        blocks=draw(st.none() | NUMBERS),
        steps=draw(st.none() | NUMBERS),
    )


@given(rules())
def test_a_rule_prints_itself_back(rule: Rule) -> None:
    assert parse_rule(str(rule)) == rule


@pytest.mark.parametrize("text", ["last", "uniform", "fixed:0,2-4", "shuffle:7"])
def test_a_baseline_prints_itself_back_whatever_its_case(text: str) -> None:
    for rule in map(parse_rule, (text, text.upper())):
        assert isinstance(rule, BaselineRule)
        assert str(rule) == text


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("red=5,6", Rule("red", "=", (5, 6))),
        ("cat!=0-2", Rule("cat", "!=", (0, 1, 2))),
        ("dog+=0.5@4", Rule("dog", "+=", (4,), amount=0.5)),
        ("dog -= .5 @ 4-5,1", Rule("dog", "+=", (1, 4, 5), amount=-0.5)),
        ('"red apple"#2=3 steps 0-2 blocks 7', Rule("red apple", "=", (3,), nth=2, steps=(0, 1, 2), blocks=(7,))),
        (" * = 1 ", Rule("*", "=", (1,))),
        ("LAST=1", Rule("LAST", "=", (1,))),
        ("red=5 Blocks 3 STEPS 1", Rule("red", "=", (5,), blocks=(3,), steps=(1,))),
        ("cat+=0.00001@4", Rule("cat", "+=", (4,), amount=0.00001)),
    ],
)
def test_what_rules_mean(text: str, rule: Rule) -> None:
    assert parse_rule(text) == rule


@pytest.mark.parametrize(
    ("text", "character", "wanted"),
    [
        ("red", 1, "=, !=, += or -="),
        ("red=", 5, "a layer"),
        ("red=5,x", 7, "a layer"),
        ("red=6-5", 8, "a range that rises"),
        ("red=5 block 3", 7, "'blocks', 'steps'"),
        ("red=5 blocks 1 blocks 2", 23, "only once"),
        ("red+=@3", 6, "a number to add"),
        ("red+=1", 7, "@ and a layer"),
        ("red#0=1", 5, "a number from 1"),
        ('"red=1', 2, "a word"),
        ("fixed:", 7, "a layer"),
        ("shuffle:x", 9, "a seed"),
        ("last steps 2", 1, "=, !=, += or -="),
        ("shuffle:7 steps 2", 11, "the rule ends"),
        ("", 1, "a word"),
    ],
)
def test_a_mistake_is_pointed_at(text: str, character: int, wanted: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_rule(text)
    assert f"at character {character}:" in str(caught.value)
    assert wanted in str(caught.value)


@given(st.text(max_size=30))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        rule = parse_rule(text)
    except UsageError:
        return
    assert parse_rule(str(rule)) == rule


def test_a_baseline_stands_alone() -> None:
    with pytest.raises(UsageError, match="every token"):
        parse_rules(["last", "cat=1"])


PROMPT = "A red  apple, a red-brown cat; Red."


def read(prompt: str) -> tuple[TraceToken, ...]:
    """Tokens of at most four characters, as word pieces are, between special ones; and one of a picture."""
    pieces = [
        (word.start() + at, min(word.start() + at + 4, word.end()))
        for word in re.finditer(r"\w+|[^\w\s]", prompt)
        for at in range(0, len(word[0]), 4)
    ]
    words = [TraceToken(text=prompt[a:b], start=a, end=b) for a, b in pieces]
    special = TraceToken(text="[CLS]", start=0, end=0)
    return (special, *words, TraceToken(text="picture 1", start=0, end=0, patch=(0, 0, 0)))


@pytest.mark.parametrize(
    ("rule", "texts"),
    [
        ("red=1", ["red", "red", "Red"]),
        ("red#2=1", ["red"]),
        ("red#4=1", []),
        ("apple=1", ["appl", "e"]),
        ("appl=1", []),
        ('"red apple"=1', ["red", "appl", "e"]),
        ("red-brown=1", ["red", "-", "brow", "n"]),
        ("[cls]=1", ["[CLS]"]),
        ('"picture 1"=1', ["picture 1"]),
        ("dog=1", []),
        (",=1", [","]),
        (".=1", ["."]),
    ],
)
def test_words_are_found_by_the_characters_they_stand_for(rule: str, texts: list[str]) -> None:
    tokens, parsed = read(PROMPT), parse_rule(rule)
    assert isinstance(parsed, Rule)
    assert [tokens[number].text for number in tokens_of(parsed, PROMPT, tokens)] == texts


def test_the_star_means_every_token() -> None:
    tokens, parsed = read(PROMPT), parse_rule("*=1")
    assert isinstance(parsed, Rule)
    assert tokens_of(parsed, PROMPT, tokens) == tuple(range(len(tokens)))


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_an_accent_is_found_however_it_is_written(form: str) -> None:
    prompt = unicodedata.normalize(form, "un café rouge")
    for other in ("NFC", "NFD"):
        parsed = parse_rule(unicodedata.normalize(other, "café=1"))
        assert isinstance(parsed, Rule)
        assert tokens_of(parsed, prompt, read(prompt))


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("cat", ("cat", None)),
        ("cat#2", ("cat", 2)),
        ('"red apple"', ("red apple", None)),
        ("red apple", ("red apple", None)),
        ('"a=b"#3', ("a=b", 3)),
        ("*", ("*", None)),
    ],
)
def test_a_target_is_read_as_in_rules(text: str, target: tuple[str, int | None]) -> None:
    assert parse_target(text) == target


@pytest.mark.parametrize("text", ["", " ", '""', "#2", "cat#0"])
def test_what_is_no_target_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="write cat"):
        parse_target(text)
