"""Edits do what they say and nothing else, and say it so that only one thing can be meant."""

import re
from collections import Counter
from dataclasses import replace
from itertools import combinations
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mos_cli.datasets.scenes.composition import Item, free_spots
from mos_cli.datasets.scenes.compositor import Compositor
from mos_cli.datasets.scenes.description import DEFAULT_STYLE, held_out, held_out_style
from mos_cli.datasets.scenes.edits import EDIT_KINDS, SMALLER, Edit, EditKind, EditWriter
from mos_cli.datasets.scenes.referring import confusable, refer
from mos_cli.datasets.scenes.vocabulary import COLOURS
from mos_cli.evaluation.scenebench import bench_words

WORDS = bench_words()
WRITER, HELD_OUT = EditWriter(WORDS), EditWriter(WORDS, held_out_pairs=True)
seeds, kinds = st.integers(0, 2**32), st.sampled_from(EDIT_KINDS)
by_kind = pytest.mark.parametrize("kind", EDIT_KINDS)
ONE_CHANGES = {
    "replace": {"word", "colour"},
    "move": {"x", "y"},
    "resize": {"side"},
    "recolour": {"colour"},
    "style": {"style"},
}
"""What may differ of the one object that these kinds change; a replaced word always does."""


def edits(kind: EditKind, count: int = 60) -> list[Edit]:
    random = Random(kind)
    return [WRITER.write(random, kind) for _ in range(count)]


def differing(one: Item, other: Item) -> set[str]:
    return {name for name in Item.__dataclass_fields__ if getattr(one, name) != getattr(other, name)}


@given(seeds, kinds)
def test_what_is_not_named_is_the_same_before_and_after(seed: int, kind: EditKind):
    edit = WRITER.write(Random(seed), kind)
    was, now = edit.was.items, edit.now.items
    assert (edit.was.background == edit.now.background) == (kind != "background")
    if kind in ONE_CHANGES:
        changed = [differing(a, b) for a, b in zip(was, now, strict=True) if a != b]
        assert len(changed) == 1
        assert changed[0] <= ONE_CHANGES[kind]
        assert kind != "replace" or "word" in changed[0]
    elif kind == "add":
        assert now[:-1] == was
    elif kind == "remove":
        assert len(now) in (len(was) - 1, 1)
        assert set(now) < set(was)
    elif kind == "count":
        fewer, more = sorted((set(was), set(now)), key=len)
        assert fewer < more
        assert len({(item.word, item.style, item.colour) for item in more - fewer}) == 1
    elif kind == "swap":
        changed = [(a, b) for a, b in zip(was, now, strict=True) if a != b]
        assert all(differing(a, b) <= {"x", "y"} for a, b in changed)
        assert [(a.x, a.y) for a, _ in changed] == [(b.x, b.y) for _, b in reversed(changed)]
        assert len(changed) == 2
    elif kind == "style all":
        assert [differing(a, b) for a, b in zip(was, now, strict=True)] == [{"style"}] * len(was)
        assert len({item.style for item in now}) == 1
    elif kind != "mirror":
        assert was == now
    assert (edit.was == edit.now) == (kind == "nothing")


def alike_in(edit: Edit) -> tuple[list[Item], list[Item]]:
    """What a count counts, before and after."""
    (key,) = {(item.word, item.colour) for item in set(edit.was.items) ^ set(edit.now.items)}
    return tuple([item for item in side.items if (item.word, item.colour) == key] for side in (edit.was, edit.now))  # type: ignore[return-value]


def reading_order(items: list[Item]) -> list[Item]:
    return sorted(items, key=lambda item: (round(item.y, 1), item.x))


def test_fewer_of_a_thing_are_those_that_come_first_in_reading_order():
    fewer = [(was, now) for was, now in map(alike_in, edits("count")) if len(now) < len(was)]
    assert len(fewer) > 10
    for was, now in fewer:
        assert reading_order(was)[: len(now)] == reading_order(now)


CORNERS = [(0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)]


@pytest.mark.parametrize(
    ("stand", "more", "come"),
    [
        ([(0.27, 0.5)], 1, [(0.73, 0.5)]),
        ([(0.28, 0.49)], 1, [(0.73, 0.5)]),
        ([(0.5, 0.5)], 2, [(0.18, 0.5), (0.82, 0.5)]),
        ([(0.27, 0.27)], 1, [(0.73, 0.73)]),
        ([(0.27, 0.27)], 3, CORNERS[1:]),
        ([(0.73, 0.27), (0.27, 0.73)], 2, [CORNERS[0], CORNERS[3]]),
        (CORNERS[:3], 1, CORNERS[3:]),
    ],
)
def test_more_of_a_thing_come_to_spots_that_follow_from_the_picture(
    stand: list[tuple[float, float]], more: int, come: list[tuple[float, float]]
):
    items = [at("cat face", x, y) for x, y in stand]
    assert [(x, y) for x, y, _ in free_spots(items, more)] == come


def test_more_of_a_thing_are_as_large_and_as_the_others():
    more = [(was, now) for was, now in map(alike_in, edits("count")) if len(now) > len(was)]
    assert len(more) > 10
    for was, now in more:
        for new in set(now) - set(was):
            assert new == was[0].at(new.x, new.y)


def test_smaller_and_bigger_are_always_by_the_same_factor():
    for edit in edits("resize"):
        ((old, new),) = [(a, b) for a, b in zip(edit.was.items, edit.now.items, strict=True) if a != b]
        assert min(old.side, new.side) / max(old.side, new.side) == pytest.approx(SMALLER, abs=1e-3)


def test_a_caption_of_the_result_says_which_of_several_alike_changed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mos_cli.datasets.scenes.edits.result", lambda *_, **__: "CAPTION")
    told = [edit for edit in random_edits() if edit.instruction == "CAPTION" and edit.kind != "count"]
    assert {"remove", "replace", "recolour"} <= {edit.kind for edit in told}
    for edit in told:
        stay, change = (
            {(item.word, item.colour) for item in edit.was.items if (item in edit.now.items) == stays}
            for stays in (True, False)
        )
        assert not stay & change


def test_a_composition_is_drawn_as_it_says():
    edit = WRITER.write(Random(0), "add")
    for item, placed in zip(edit.now.items, edit.after.objects, strict=True):
        assert placed.picture == WORDS.words[item.word].pictures[item.style]
        assert (placed.x, placed.y, placed.side, placed.mirrored) == (item.x, item.y, item.side, item.mirrored)
        assert placed.tint == (COLOURS[item.colour][0] if item.colour else None)


@given(seeds, kinds)
def test_objects_stay_on_the_canvas_apart_and_no_smaller_than_can_be_seen(seed: int, kind: EditKind):
    edit = WRITER.write(Random(seed), kind)
    for composition in (edit.was, edit.now):
        assert len(composition.items) <= 4
        for item in composition.items:
            assert 0.13 < item.side < 0.8
            for centre in (item.x, item.y):
                assert centre - item.side / 2 > -0.07
                assert centre + item.side / 2 < 1.07
        for a, b in combinations(composition.items, 2):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) > 0.27


def test_a_mirror_image_is_the_mirror_image():
    styles = {style: row for row, style in enumerate(WORDS.styles)}
    blots = torch.randint(0, 256, (len(styles), 16, 16, 4), generator=torch.Generator().manual_seed(0))
    blots[..., 3] = 255
    drawn = replace(WORDS, words={name: replace(word, pictures=styles) for name, word in WORDS.words.items()})
    mirrored, compositor = edits("mirror", 12), Compositor(blots.to(torch.uint8))
    before, after = (
        compositor.draw([side.scene(drawn) for side in sides], 48)
        for sides in zip(*((edit.was, edit.now) for edit in mirrored), strict=True)
    )
    assert torch.allclose(before.flip(-1), after, atol=2e-3)
    assert not torch.allclose(before, after, atol=0.5)


@given(seeds)
def test_no_phrase_can_mean_two_objects(seed: int):
    random = Random(seed)
    composition = WRITER.write(random).was
    said: dict[str, int] = {}
    for index in range(len(composition.items)):
        for _ in range(30):
            phrase = refer(index, composition.items, WORDS, random)
            assert phrase is None or said.setdefault(phrase, index) == index


def at(word: str, x: float, y: float, colour: str | None = None, side: float = 0.4) -> Item:
    return Item(word, "noto", x, y, side, colour)


CAT, DOG, APPLE, CAKE = "cat face", "dog face", "red apple", "shortcake"


@pytest.mark.parametrize(
    ("items", "said", "never"),
    [
        ((at(CAT, 0.3, 0.5), at(DOG, 0.7, 0.5)), {"the left one", "the cat"}, {"the animal", "the top one", "it"}),
        ((at(CAT, 0.3, 0.5), at(APPLE, 0.7, 0.5)), {"the animal"}, {"the food", "the leftmost one"}),
        ((at(CAT, 0.3, 0.5), at(CAT, 0.7, 0.5)), {"the left cat"}, {"the cat", "the red one"}),
        # A diagonal has no left one: it is the one in the corner.
        ((at(CAT, 0.3, 0.3), at(DOG, 0.7, 0.7)), {"the one in the top left corner"}, {"the left one", "the top one"}),
        ((at(CAT, 0.3, 0.3, "red"), at(CAT, 0.7, 0.7, "blue")), {"the red one", "the red cat"}, {"the cat"}),
        # An apple may be red without paint.
        ((at(CAT, 0.3, 0.3, "red"), at(APPLE, 0.7, 0.7)), {"the red cat"}, {"the red one"}),
        ((at(CAT, 0.5, 0.5), at(DOG, 0.2, 0.5), at(CAKE, 0.8, 0.5)), {"the middle one"}, {"the left one"}),
        ((at(CAT, 0.2, 0.5), at(DOG, 0.5, 0.5), at(CAKE, 0.8, 0.5)), {"the leftmost one"}, {"the left one"}),
        ((at(CAT, 0.3, 0.3, side=0.2), at(DOG, 0.7, 0.7)), {"the smaller one"}, {"the big one", "the smallest one"}),
        ((at(CAT, 0.3, 0.3),), {"it", "the cat", "the object"}, {"the one in the top left corner"}),
        # The two cats cannot be told apart, nor is either on a side of all others.
        ((at(CAT, 0.5, 0.5), at(CAT, 0.5, 0.6)), {None}, {"the cat"}),
    ],
)
def test_references(items: tuple[Item, ...], said: set[str | None], never: set[str]):
    phrases = {refer(0, items, WORDS, Random(seed)) for seed in range(1000)}
    assert said <= phrases
    assert not never & phrases


def test_names_that_end_alike_never_stand_together():
    pairs = confusable([("fish", ("fish",)), ("tropical fish", ("tropical fish",)), ("cat", ("cat", "kitten"))])
    assert pairs == {frozenset(("fish", "tropical fish"))}
    kinds = confusable([("bird", ("bird",)), ("owl", ("owl",)), ("fox", ("fox",))])
    assert kinds == {frozenset(("bird", "owl"))}
    met = {frozenset(pair) for edit in random_edits() for pair in combinations(words_of(edit), 2)}
    assert not met & confusable([(word, known.names) for word, known in WORDS.words.items()])


def words_of(edit: Edit) -> set[str]:
    return {item.word for item in (*edit.was.items, *edit.now.items)}


def random_edits() -> list[Edit]:
    random = Random(0)
    return [WRITER.write(random) for _ in range(1500)]


def test_what_is_held_out_is_never_drawn_in_training():
    for edit in random_edits():
        assert not any(held_out(*pair) for pair in combinations(words_of(edit), 2))
        for item in (*edit.was.items, *edit.now.items):
            assert not held_out_style(item.word, item.style)


@by_kind
def test_measuring_is_on_things_that_never_met(kind: EditKind):
    random = Random(0)
    for edit in (HELD_OUT.write(random, kind) for _ in range(20)):
        meetings = [pair for side in (edit.was, edit.now) for pair in combinations({i.word for i in side.items}, 2)]
        assert any(held_out(*pair) for pair in meetings)


def test_instructions_are_short_lower_case_and_without_gaps():
    for edit in random_edits():
        pieces = re.findall(r"\w+|[^\w\s]", edit.instruction)
        # Word pieces of the text encoder: at most 29 in 24,000 instructions of at most 27 words and signs.
        assert 1 <= len(pieces) <= 28
        assert edit.instruction == edit.instruction.lower().strip()
        assert not re.search(r"[{}]|  |None", edit.instruction)


def test_every_kind_is_written_in_many_ways():
    written = Counter(edit.kind for edit in random_edits())
    assert set(written) == set(EDIT_KINDS)
    assert min(written.values()) > 30
    assert len({edit.instruction for edit in random_edits()}) > 1200


@by_kind
def test_an_instruction_names_what_is_new(kind: EditKind):
    for edit in edits(kind):
        new = [item for item in edit.now.items if item.word not in {old.word for old in edit.was.items}]
        for item in new:
            assert any(name in edit.instruction for name in WORDS.words[item.word].names)
        if kind == "recolour":
            (item,) = set(edit.now.items) - set(edit.was.items)
            assert item.colour
            assert any(name in edit.instruction for name in COLOURS[item.colour][1])


def test_the_default_style_and_others_are_edited():
    styles = Counter(item.style for edit in random_edits() for item in edit.was.items)
    assert set(styles) == set(WORDS.styles)
    assert DEFAULT_STYLE in styles
