"""EditBench: its edits, the checks of what is seen, likeness to rivals, and the plain measures."""

from collections import Counter
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Tensor

from mos_cli.datasets.art.file import Art, ArtCounts, ArtManifest, ArtPicture
from mos_cli.datasets.scenes.composition import Composition, Item
from mos_cli.datasets.scenes.description import held_out
from mos_cli.datasets.scenes.edits import EDIT_KINDS, EditKind
from mos_cli.evaluation.edit_checks import MOST_DB, may_change, no_op_error, psnr_outside, rivals, shows
from mos_cli.evaluation.edit_examine import EditExaminer
from mos_cli.evaluation.editbench import (
    PER_KIND,
    EditEntry,
    make_edit_bench,
    read_edit_bench,
)
from mos_cli.evaluation.examine import TrueScenes
from mos_cli.evaluation.judge import Detection, Judge, judge_folder
from mos_cli.evaluation.scenebench import bench_data, bench_words

BENCH = read_edit_bench()
CAT, DOG, CAKE = "cat face", "dog face", "shortcake"


def test_the_file_is_what_the_function_writes():
    assert read_edit_bench() == make_edit_bench(bench_words())


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


def at(word: str, x: float, y: float, colour: str | None = None, side: float = 0.4) -> Item:
    return Item(word, "noto", x, y, side, colour)


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
    background = next(e for e in BENCH if e.kind == "background")
    assert all(rival.items == background.after.items for rival in rivals(background))
    assert len(rivals(background)) >= 20
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
    degraded = after + 0.2 * region[:, None]
    assert psnr_outside(degraded, before, region) == [MOST_DB]
    # A tenth of the range everywhere is 20 dB.
    assert psnr_outside(before + 0.2, before, region) == pytest.approx([20], abs=1e-3)
    assert psnr_outside(before, before, torch.ones_like(region)) == [None]


def test_the_error_of_a_no_op_is_in_levels():
    before, _ = squares()
    assert no_op_error(before, before) == [0]
    assert no_op_error(before + 2 / 255, before) == pytest.approx([1])


@pytest.fixture(scope="module")
def art() -> Art:
    """Every word of the bench in every style, as random blots."""
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
