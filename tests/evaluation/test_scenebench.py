"""SceneBench: its prompts, the checks, and what becomes of them in a table."""

from collections import Counter
from random import Random

import pytest

from mos_cli.datasets.scenes.description import DEFAULT_STYLE, Description, Thing, held_out, held_out_style
from mos_cli.datasets.scenes.writer import SceneWriter
from mos_cli.evaluation.checks import passes
from mos_cli.evaluation.judge import Detection
from mos_cli.evaluation.results import overall, score
from mos_cli.evaluation.scenebench import (
    CATEGORIES,
    PER_CATEGORY,
    Entry,
    bench_words,
    make_bench,
    read_bench,
)


def see(word: str, x: float = 0.5, y: float = 0.5, colour: str = "green", style: str = DEFAULT_STYLE) -> Detection:
    return Detection(word=word, colour=colour, style=style, x=x, y=y, score=0.9)


def entry(category: str, *things: Thing, style: str = DEFAULT_STYLE, relation: str | None = None) -> Entry:
    description = Description.model_validate({"things": things, "style": style, "relation": relation})
    return Entry.model_validate({"id": "x", "category": category, "seed": 0, "prompt": "x", "description": description})


def test_the_file_is_what_the_function_writes():
    assert read_bench() == make_bench(bench_words())


def test_every_category_has_its_prompts_and_none_comes_twice():
    entries = read_bench()
    assert Counter(e.category for e in entries) == dict.fromkeys(CATEGORIES, PER_CATEGORY)
    assert PER_CATEGORY >= 100
    assert len({e.id for e in entries}) == len({(e.category, e.prompt) for e in entries}) == len(entries)
    assert [e.seed for e in entries] == list(range(len(entries)))


def test_a_limit_takes_the_first_of_each_category():
    assert [e.id for e in read_bench(1)] == [f"{category}-000" for category in CATEGORIES]


def test_no_composition_can_occur_in_training():
    for e in read_bench():
        words = [thing.word for thing in e.description.things]
        if e.category in ("two", "position", "binding"):
            assert held_out(*words), e.id
        elif e.category == "style":
            assert held_out_style(words[0], e.description.style), e.id


def test_the_writer_of_training_scenes_never_writes_one():
    composed = {
        (frozenset(thing.word for thing in e.description.things), e.description.style)
        for e in read_bench()
        if e.category in ("two", "position", "binding", "style")
    }
    writer, random = SceneWriter(bench_words()), Random(0)
    for _ in range(2000):
        description = writer.describe(random)
        words = [thing.word for thing in description.things]
        for i, word in enumerate(words):
            assert (frozenset([word]), description.style) not in composed or description.style == DEFAULT_STYLE
            assert all((frozenset([word, other]), DEFAULT_STYLE) not in composed for other in words[:i])


def test_descriptions_fit_their_categories():
    for e in read_bench():
        things, description = e.description.things, e.description
        assert len(things) == (2 if e.category in ("two", "position", "binding") else 1), e.id
        assert (description.relation is not None) == (e.category == "position")
        assert all((thing.colour is not None) == (e.category in ("colour", "binding")) for thing in things)
        assert (things[0].count > 1) == (e.category == "counting")
        assert description.style_named == (e.category == "style")
        if e.category == "binding":
            assert things[0].colour != things[1].colour


CAT, DOG = Thing(word="cat"), Thing(word="dog")
RED, BLUE = Thing(word="cat", colour="red"), Thing(word="dog", colour="blue")


@pytest.mark.parametrize(
    ("asked", "seen", "expected"),
    [
        (entry("single", CAT), [see("cat"), see("dog")], True),
        (entry("single", CAT), [see("dog")], False),
        (entry("single", CAT), [], False),
        (entry("two", CAT, DOG), [see("dog"), see("cat")], True),
        (entry("two", CAT, DOG), [see("cat"), see("cat")], False),
        (entry("counting", Thing(word="cat", count=3)), [see("cat")] * 3, True),
        (entry("counting", Thing(word="cat", count=3)), [see("cat")] * 2 + [see("dog")], False),
        (entry("counting", Thing(word="cat", count=3)), [see("cat")] * 4, False),
        (entry("colour", RED), [see("cat", colour="red")], True),
        (entry("colour", RED), [see("cat"), see("dog", colour="red")], False),
        (entry("binding", RED, BLUE), [see("cat", colour="red"), see("dog", colour="blue")], True),
        (entry("binding", RED, BLUE), [see("cat", colour="blue"), see("dog", colour="red")], False),
        (entry("binding", RED, BLUE), [see("cat", colour="red")], False),
        (entry("style", CAT, style="noto"), [see("cat", style="noto")], True),
        (entry("style", CAT, style="noto"), [see("cat"), see("dog", style="noto")], False),
        (entry("position", CAT, DOG, relation="left"), [see("cat", 0.2), see("dog", 0.8)], True),
        (entry("position", CAT, DOG, relation="left"), [see("cat", 0.8), see("dog", 0.2)], False),
        (entry("position", CAT, DOG, relation="right"), [see("cat", 0.8), see("dog", 0.2)], True),
        (entry("position", CAT, DOG, relation="above"), [see("cat", y=0.2), see("dog", y=0.8)], True),
        (entry("position", CAT, DOG, relation="below"), [see("cat", y=0.2), see("dog", y=0.8)], False),
        # Too near each other, and further down than to the left.
        (entry("position", CAT, DOG, relation="left"), [see("cat", 0.48), see("dog", 0.52)], False),
        (entry("position", CAT, DOG, relation="left"), [see("cat", 0.4, 0.9), see("dog", 0.6, 0.1)], False),
        (entry("position", CAT, DOG, relation="left"), [see("cat", 0.2)], False),
    ],
)
def test_checks(asked: Entry, seen: list[Detection], expected: bool):
    assert passes(asked, seen) is expected


def test_a_score_is_relative_to_its_ceiling():
    one = score("two", [True, False, False, True], [True] * 8 + [False] * 2)
    assert (one.raw, one.ceiling, one.error) == (0.5, 0.8, 0.25)
    assert one.relative == pytest.approx(0.625)
    blind = score("style", [False], [False, False])
    assert blind.relative is None
    both = overall([one, blind])
    assert (both.category, both.pictures, both.raw, both.ceiling, both.error) == ("all", 5, 0.25, 0.4, 0.125)
