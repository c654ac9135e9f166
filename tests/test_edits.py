"""Edits do what they say and nothing else, say it so that only one thing can be meant, and are checked for both."""

import re
from collections import Counter
from dataclasses import replace
from itertools import combinations
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mos_cli.training.art.file import Art, ArtCounts, ArtManifest, ArtPicture
from mos_cli.training.evaluation.bench import bench_data, bench_words
from mos_cli.training.evaluation.edit_bench import (
    FILE,
    PER_KIND,
    EditEntry,
    edit_bench_text,
    make_edit_bench,
    read_edit_bench,
)
from mos_cli.training.evaluation.edit_checks import MOST_DB, may_change, no_op_error, psnr_outside, rivals, shows
from mos_cli.training.evaluation.edit_examine import EditExaminer
from mos_cli.training.evaluation.examine import TrueScenes
from mos_cli.training.evaluation.judge import Detection, Judge, judge_folder
from mos_cli.training.scenes.composition import Composition, Item
from mos_cli.training.scenes.compositor import Compositor
from mos_cli.training.scenes.description import DEFAULT_STYLE, held_out, held_out_style
from mos_cli.training.scenes.edits import EDIT_KINDS, Edit, EditKind, EditWriter
from mos_cli.training.scenes.referring import confusable, groups, refer
from mos_cli.training.scenes.vocabulary import COLOURS, load_vocabulary

WORDS = bench_words()
WRITER, UNSEEN = EditWriter(WORDS), EditWriter(WORDS, unseen=True)
BENCH = read_edit_bench()
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
    assert (edit.was.ground == edit.now.ground) == (kind != "background")
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


@pytest.fixture(scope="module")
def art() -> Art:
    """Every word of the bench in every style, as random blots that are not their own mirror images."""
    data, size = bench_data(), 16
    keys = [(word, style) for word in data.words for style in data.styles]
    generator = torch.Generator().manual_seed(0)
    blots = torch.randint(0, 256, (len(keys), 4, 4, 4), generator=generator, dtype=torch.uint8)
    blots[..., 3] = 255
    pixels = blots.repeat_interleave(size // 4, 1).repeat_interleave(size // 4, 2).contiguous()
    pictures = tuple(
        ArtPicture(index=i, concept=str(i), name=word, keywords=(), group="g", subgroup="s", style=style)
        for i, (word, style) in enumerate(keys)
    )
    counts = ArtCounts(pictures=len(keys), concepts=len(data.words), dropped={})
    head = {"schema": "mos-art/1", "size": size, "sha256": "0" * 64, "sets": (), "annotations": ()}
    return Art(ArtManifest.model_validate({**head, "counts": counts, "pictures": pictures}), pixels)


def test_a_mirror_image_is_the_mirror_image(art: Art):
    compositor = Compositor(load_vocabulary(art, bench_data()).sprites_VHW4)
    mirrored = edits("mirror", 12)
    before, after = (compositor.draw([getattr(edit, name) for edit in mirrored], 48) for name in ("before", "after"))
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
    met = {frozenset(pair) for edit in random_edits() for pair in combinations(words_of(edit), 2)}
    assert not met & confusable([(word, known.names) for word, known in WORDS.words.items()])


def test_groups_are_of_known_words():
    for members, arguable in groups().values():
        assert members | arguable <= set(WORDS.words)
        assert not members & arguable


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
    for edit in (UNSEEN.write(random, kind) for _ in range(20)):
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


def test_the_file_is_what_the_function_writes():
    assert FILE.read_text(encoding="utf-8") == edit_bench_text(make_edit_bench(WORDS))


def test_every_kind_has_its_edits_and_none_comes_twice():
    assert Counter(entry.kind for entry in BENCH) == dict.fromkeys(EDIT_KINDS, PER_KIND)
    assert PER_KIND >= 40
    assert len({entry.id for entry in BENCH}) == len({entry.before for entry in BENCH}) == len(BENCH)
    assert [entry.seed for entry in BENCH] == list(range(len(BENCH)))
    assert [entry.id for entry in read_edit_bench(1)] == [f"{kind.replace(' ', '-')}-000" for kind in EDIT_KINDS]


def test_no_edit_of_the_bench_can_occur_in_training():
    for entry in BENCH:
        meetings = [
            pair for side in (entry.before, entry.after) for pair in combinations({i.word for i in side.items}, 2)
        ]
        assert any(held_out(*pair) for pair in meetings), entry.id


def seen_in(composition: Composition) -> tuple[Detection, ...]:
    """What a judge would see that never errs."""
    return tuple(Detection(item.word, item.colour or "brown", item.x, item.y, 0.9) for item in composition.items)


def test_the_picture_after_passes_and_the_one_before_does_not():
    for entry in BENCH:
        before, after = seen_in(entry.before), seen_in(entry.after)
        # A mirror image is looked at flipped back.
        assert shows(entry, before if entry.kind == "mirror" else after, before), entry.id
        if entry.kind in ("add", "remove", "replace", "move", "count", "swap"):
            assert not shows(entry, before, before), entry.id
        elif entry.kind != "nothing":
            assert entry.before in rivals(entry) or entry.kind in ("style", "style all")
        assert entry.after not in rivals(entry)


def entry(kind: EditKind, before: tuple[Item, ...], after: tuple[Item, ...]) -> EditEntry:
    sides = {"before": Composition(before), "after": Composition(after)}
    return EditEntry.model_validate({"id": "x", "kind": kind, "seed": 0, "instruction": "x", **sides})


def see(word: str, x: float, y: float, colour: str = "green") -> Detection:
    return Detection(word, colour, x, y, 0.9)


A, B, C = at(CAT, 0.25, 0.5), at(DOG, 0.75, 0.5), at(CAKE, 0.75, 0.5, "red")
SEE_A, SEE_B = see(CAT, 0.25, 0.5), see(DOG, 0.75, 0.5)


@pytest.mark.parametrize(
    ("asked", "seen", "expected"),
    [
        (entry("add", (A,), (A, B)), [SEE_A, see(DOG, 0.7, 0.58)], True),
        (entry("add", (A,), (A, B)), [SEE_A], False),
        (entry("add", (A,), (A, B)), [SEE_B], False),
        (entry("add", (A,), (A, B)), [SEE_A, see(DOG, 0.5, 0.5)], False),
        (entry("add", (A,), (A, B)), [SEE_A, SEE_B, see(DOG, 0.5, 0.9)], False),
        (entry("add", (A,), (A, C)), [SEE_A, see(CAKE, 0.75, 0.5, "red")], True),
        (entry("add", (A,), (A, C)), [SEE_A, see(CAKE, 0.75, 0.5, "blue")], False),
        (entry("remove", (A, B), (A,)), [SEE_A], True),
        (entry("remove", (A, B), (A,)), [SEE_B], False),
        # Something else has come where it was.
        (entry("remove", (A, B), (A,)), [SEE_A, see("key", 0.75, 0.5)], False),
        # A thing of neither word elsewhere is the judge's mistake, or none of this edit.
        (entry("remove", (A, B), (A,)), [SEE_A, see("key", 0.5, 0.1)], True),
        (entry("replace", (A, B), (A, C)), [SEE_A, see(CAKE, 0.75, 0.5, "red")], True),
        (entry("replace", (A, B), (A, C)), [SEE_A, SEE_B], False),
        (entry("move", (A,), (B.at(0.75, 0.5),)), [SEE_A, SEE_B], False),
        (entry("move", (A,), (A.at(0.75, 0.5),)), [see(CAT, 0.75, 0.5)], True),
        (entry("move", (A,), (A.at(0.75, 0.5),)), [SEE_A, see(CAT, 0.75, 0.5)], False),
        (entry("swap", (A, B), (A.at(0.75, 0.5), B.at(0.25, 0.5))), [see(CAT, 0.75, 0.5), see(DOG, 0.25, 0.5)], True),
        (entry("count", (A,), (A, A.at(0.75, 0.5))), [SEE_A, see(CAT, 0.75, 0.5)], True),
        (entry("count", (A,), (A, A.at(0.75, 0.5))), [SEE_A, see(CAT, 0.75, 0.5), see(CAT, 0.5, 0.9)], False),
        (entry("nothing", (A, B), (A, B)), [SEE_A, SEE_B], True),
        (entry("nothing", (A, B), (A, B)), [SEE_A], False),
        (entry("recolour", (A,), (replace(A, colour="red"),)), [see(CAT, 0.25, 0.5, "red")], True),
        (entry("recolour", (A,), (replace(A, colour="red"),)), [SEE_A], False),
        # A mirror image, flipped back.
        (entry("mirror", (A, B), Composition((A, B)).mirrored().items), [SEE_A, SEE_B], True),
    ],
)
def test_checks(asked: EditEntry, seen: list[Detection], expected: bool):
    assert shows(asked, seen, seen_in(asked.before)) is expected


def test_what_was_misnamed_before_may_be_misnamed_the_same_way():
    asked, misnamed = entry("remove", (A, B), (A,)), see("fox", 0.25, 0.5)
    assert shows(asked, [misnamed], [misnamed, SEE_B])
    assert shows(asked, [SEE_A], [misnamed, SEE_B])
    assert not shows(asked, [see("key", 0.25, 0.5)], [misnamed, SEE_B])
    assert shows(asked, [], [SEE_B])


def test_rivals_are_the_other_styles_and_grounds():
    styled = next(e for e in BENCH if e.kind == "style all")
    assert {rival.items[0].style for rival in rivals(styled)} == set(bench_data().styles) - {
        styled.after.items[0].style
    }
    ground = next(e for e in BENCH if e.kind == "background")
    assert all(rival.items == ground.after.items for rival in rivals(ground))
    assert len(rivals(ground)) >= 20
    flipped = next(e for e in BENCH if e.kind == "mirror")
    assert not any(item.mirrored for rival in rivals(flipped) for item in rival.items)


def squares(side: int = 64) -> tuple[Tensor, Tensor]:
    """A grey picture, and the same with a white square of 16 x 16."""
    before = torch.zeros(1, 3, side, side)
    after = before.clone()
    after[..., 8:24, 8:24] = 1
    return before, after


def test_the_region_that_may_change_is_what_differs_and_a_margin():
    before, after = squares()
    (region,) = may_change(before, after)
    assert region[6:26, 6:26].all()
    assert region.sum() == 20 * 20
    assert not may_change(before, before).any()


def test_psnr_outside_sees_what_is_outside_only():
    before, after = squares()
    region = may_change(before, after)
    assert psnr_outside(after, before, region) == [MOST_DB]
    spoilt = after + 0.2 * region[:, None]
    assert psnr_outside(spoilt, before, region) == [MOST_DB]
    # A tenth of the range everywhere is 20 dB.
    assert psnr_outside(before + 0.2, before, region) == pytest.approx([20], abs=1e-3)
    assert psnr_outside(before, before, torch.ones_like(region)) == [None]


def test_the_error_of_a_no_op_is_in_levels():
    before, _ = squares()
    assert no_op_error(before, before) == [0]
    assert no_op_error(before + 2 / 255, before) == pytest.approx([1])


def test_true_pictures_pass_the_examination_and_wrong_ones_fail(art: Art):
    """With random art only what stays can be recognised: as what it looked like before."""
    entries = [entry for entry in read_edit_bench(6) if entry.kind in ("remove", "background", "mirror", "nothing")]
    examiner = EditExaminer(Judge(judge_folder()), TrueScenes(art), entries, canvas=64)
    after = examiner.examine(examiner.after_B3HW)
    assert sum(one.passed for one in after) > 0.7 * len(entries)
    assert examiner.ceiling() == [one.passed for one in after]
    assert all(one.outside in (None, MOST_DB) for one in after)
    assert [one.error for one in after] == [0.0 if entry.kind == "nothing" else None for entry in entries]
    before = examiner.examine(examiner.before_B3HW)
    unlike = ("background", "mirror")
    assert not any(one.passed for one, entry in zip(before, entries, strict=True) if entry.kind in unlike)
    empty = examiner.examine(torch.zeros_like(examiner.after_B3HW))
    assert not any(one.passed for one, entry in zip(empty, entries, strict=True) if entry.kind in unlike)
    assert max(one.outside for one in empty if one.outside is not None) < 20


def test_the_default_style_and_others_are_edited():
    styles = Counter(item.style for edit in random_edits() for item in edit.was.items)
    assert set(styles) == set(WORDS.styles)
    assert DEFAULT_STYLE in styles
