"""Scenes are what their captions say, are drawn as Pillow would, and keep their hands off what is held out."""

from random import Random
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paired_steps import Operations
from PIL import Image
from pydantic import ValidationError

from mos_cli.datasets.scenes import compositor
from mos_cli.datasets.scenes.backgrounds import PAINTS, SCENERIES, WHITE, Background, named_background
from mos_cli.datasets.scenes.captions import caption
from mos_cli.datasets.scenes.compositor import Compositor
from mos_cli.datasets.scenes.description import (
    DEFAULT_STYLE,
    MOST_OBJECTS,
    Arrangement,
    Description,
    Relation,
    Thing,
    held_out,
    held_out_style,
)
from mos_cli.datasets.scenes.layout import JITTER, Placed, Scene, lay_out
from mos_cli.datasets.scenes.packed import pack_scenes
from mos_cli.datasets.scenes.vocabulary import COLOURS, STYLES, Vocabulary, VocabularyWord, plural, with_article
from mos_cli.datasets.scenes.writer import OPEN_ARRANGEMENTS, OPEN_PAIRS, SceneWriter
from mos_cli.errors import InputError

NAMES = ("dog", "apple", "cat", "owl", "unicorn", "bus", "key", "cheese")
HANDS = (DEFAULT_STYLE, "noto")
NUMBERS = {"a": 1, "an": 1, "two": 2, "2": 2, "pair": 2, "three": 3, "3": 3, "four": 4, "4": 4}


def sprites() -> torch.Tensor:
    """A disc for every word and hand, of its own colour and lightness, premultiplied RGBA, [V, 32, 32, 4]."""
    y, x = np.mgrid[:32, :32] - 15.5
    alpha = (np.clip(14 - np.hypot(x, y), 0, 1) * 255)[..., None]
    colours = np.random.default_rng(0).integers(60, 255, (len(NAMES) * len(HANDS), 3))
    discs = [np.concatenate([alpha * colour / 255, alpha], axis=-1) for colour in colours]
    return torch.from_numpy(np.stack(discs).round().astype(np.uint8))


VOCABULARY = Vocabulary(
    {
        name: VocabularyWord((name,), {style: 2 * row + offset for offset, style in enumerate(HANDS)})
        for row, name in enumerate(NAMES)
    },
    HANDS,
    sprites(),
)
seeds = st.integers(0, 2**32)


def as_thing(word: str) -> Thing:
    return Thing(word=word)


def described(seed: int) -> tuple[Description, Scene, str]:
    random = Random(seed)
    description = SceneWriter(VOCABULARY).describe(random)
    return description, lay_out(description, VOCABULARY, random), caption(description, VOCABULARY, random)


@given(seeds)
def test_a_scene_holds_the_things_described_and_no_others(seed: int) -> None:
    description, scene, _ = described(seed)
    shown = sorted((NAMES[placed.picture // 2], placed.tint) for placed in scene.objects)
    said = [(t.word, COLOURS[t.colour][0] if t.colour else None) for t in description.things for _ in range(t.count)]
    assert shown == sorted(said)
    assert {HANDS[placed.picture % 2] for placed in scene.objects} == {description.style}
    assert scene.background == named_background(description.background)


@given(seeds)
def test_a_caption_names_every_thing_with_its_number_and_colour(seed: int) -> None:
    description, _, text = described(seed)
    words = text.replace(",", " ").split()
    for thing in description.things:
        noun = plural(thing.word) if thing.count > 1 else thing.word
        assert words.count(noun) == 1
        before = words[: words.index(noun)]
        if thing.colour:
            assert before.pop() in COLOURS[thing.colour][1]
        if thing.size:
            before.pop()
        if thing.count > 1:
            number = before[-2] if before[-1] == "of" else before[-1]
            assert NUMBERS[number] == thing.count
    unsaid = set(NAMES) - {thing.word for thing in description.things}
    assert not unsaid & set(words)


@given(seeds)
def test_a_caption_tells_the_style_and_the_ground_only_if_the_description_does(seed: int) -> None:
    description, _, text = described(seed)
    text = f" {text} ".replace(",", " ")
    told = {style for style in HANDS if any(f" {name} " in text for name in STYLES[style])}
    assert told == ({description.style} if description.style_named else set())
    if description.background in SCENERIES:
        assert any(phrase in text for phrase in (description.background, *SCENERIES[description.background][1]))
    elif description.background is not None:
        assert description.background in text
    else:
        assert not any(f" {word} " in text for word in ("background", "gradient", "wall", "ground", *SCENERIES))


@given(seeds)
def test_objects_stand_as_the_relation_says(seed: int) -> None:
    random = Random(seed)
    relation = random.choice(get_args(Relation))
    things = (Thing(word="dog"), Thing(word="key"))
    description = Description(things=things, relation=relation, style="noto")
    objects = {
        NAMES[placed.picture // 2]: (depth, placed)
        for depth, placed in enumerate(lay_out(description, VOCABULARY, random).objects)
    }
    (dog_depth, dog), (key_depth, key) = objects["dog"], objects["key"]
    assert {
        "left": key.x - dog.x > 0.3,
        "right": dog.x - key.x > 0.3,
        "above": key.y - dog.y > 0.3,
        "below": dog.y - key.y > 0.3,
        "on": dog.y < key.y and dog_depth > key_depth and key.y - key.side / 2 < dog.y + dog.side / 2,
        "inside": dog.side < key.side / 2 and dog_depth > key_depth,
        "behind": dog_depth < key_depth and abs(dog.y - key.y) < (dog.side + key.side) / 2,
    }[relation]


@given(seeds)
def test_objects_stay_on_the_canvas_and_are_large_enough_to_be_seen(seed: int) -> None:
    _, scene, _ = described(seed)
    for placed in scene.objects:
        assert placed.x - placed.side / 2 > -0.1
        assert placed.x + placed.side / 2 < 1.1
        assert placed.y - placed.side / 2 > -0.1
        assert placed.y + placed.side / 2 < 1.1
        assert placed.side > 0.14


@pytest.mark.parametrize("arrangement", get_args(Arrangement))
def test_arrangements_have_their_shape(arrangement: str) -> None:
    description = Description(things=(Thing(word="dog", count=4),), arrangement=arrangement, style="noto")
    objects = lay_out(description, VOCABULARY, Random(0)).objects
    xs, ys = (np.array([getattr(placed, axis) for placed in objects]) for axis in ("x", "y"))
    if arrangement == "row":
        assert np.ptp(ys) < 0.05
        assert np.diff(xs).min() > 0.15
    elif arrangement == "ring":
        distances = np.hypot(xs - 0.5, ys - 0.5)
        assert np.allclose(distances, 0.3, atol=0.04)
    else:
        assert sorted(ys.round(1))[0] < 0.5 < sorted(ys)[1]


@given(seeds, seeds)
def test_a_description_has_one_layout(seed: int, other: int) -> None:
    """Taught several layouts for one caption, a small network draws their average."""
    description, scene, _ = described(seed)
    again = lay_out(description, VOCABULARY, Random(other))
    for one, two in zip(scene.objects, again.objects, strict=True):
        assert (one.picture, one.tint) == (two.picture, two.tint)
        assert max(abs(one.x - two.x), abs(one.y - two.y)) <= 2 * JITTER
        assert 0.88 < one.side / two.side < 1.13


def test_where_no_relation_is_named_things_stand_left_to_right_as_they_are_named() -> None:
    for words in (("dog", "key"), ("key", "dog")):
        scene = lay_out(Description(things=tuple(map(as_thing, words)), style="noto"), VOCABULARY, Random(0))
        first, second = scene.objects
        assert NAMES[first.picture // 2] == words[0]
        assert second.x - first.x > 0.3
        assert abs(second.y - first.y) <= 2 * JITTER


@pytest.mark.parametrize(
    ("words", "spots"),
    [
        (("dog",) * 2, [(0.25, 0.5), (0.75, 0.5)]),
        (("dog",) * 3, [(0.31, 0.7), (0.69, 0.7), (0.5, 0.36)]),
        (("dog", "cat", "key"), [(0.31, 0.7), (0.69, 0.7), (0.5, 0.36)]),
        (("dog",) * 4, [(0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)]),
        (("dog", "cat", "key", "bus"), [(0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value[0], str) else "",
)
def test_where_no_arrangement_is_named_two_are_a_row_three_a_pile_four_the_corners(
    words: tuple[str, ...], spots: list[tuple[float, float]]
) -> None:
    counts = {word: words.count(word) for word in words}
    things = tuple(Thing(word=word, count=count) for word, count in counts.items())
    objects = lay_out(Description(things=things, style="noto"), VOCABULARY, Random(0)).objects
    assert [NAMES[placed.picture // 2] for placed in objects] == list(words)
    for placed, (x, y) in zip(objects, spots, strict=True):
        assert (placed.x, placed.y) == pytest.approx((x, y), abs=1.5 * JITTER)


def test_open_captions_are_written_as_often_as_they_should_be() -> None:
    random, open_or_not = Random(0), {"pair": [], "arranged": []}
    for _ in range(4000):
        description = SceneWriter(VOCABULARY).describe(random)
        several = description.objects - len(description.things)
        if len(description.things) == 2 and not several:
            open_or_not["pair"].append(description.relation is None)
        elif description.objects > 1:
            open_or_not["arranged"].append(description.relation is None and description.arrangement is None)
    assert np.mean(open_or_not["pair"]) == pytest.approx(OPEN_PAIRS, abs=0.05)
    assert np.mean(open_or_not["arranged"]) == pytest.approx(OPEN_ARRANGEMENTS, abs=0.05)


@given(seeds)
def test_what_is_held_out_is_never_drawn(seed: int) -> None:
    description, _, _ = described(seed)
    words = [thing.word for thing in description.things]
    assert not any(held_out(a, b) for a in words for b in words if a != b)
    assert not any(held_out_style(word, description.style) for word in words)


def test_something_is_held_out_whatever_the_order_but_never_the_default_style() -> None:
    words = [f"word {index}" for index in range(100)]
    pairs = [(a, b) for a in words for b in words if a < b]
    assert 0.04 < np.mean([held_out(a, b) for a, b in pairs]) < 0.09
    assert all(held_out(a, b) == held_out(b, a) for a, b in pairs)
    assert 0.01 < np.mean([held_out_style(word, "noto") for word in words]) < 0.12
    assert not any(held_out_style(word, DEFAULT_STYLE) for word in words)


@pytest.mark.parametrize(
    "wrong",
    [
        {"things": [{"word": "dog", "count": 3}, {"word": "cat", "count": 2}]},
        {"things": [{"word": "dog"}], "relation": "left"},
        {"things": [{"word": "dog", "count": 2}], "place": "left"},
        {"things": [{"word": "dog"}], "arrangement": "row"},
    ],
)
def test_what_cannot_be_drawn_is_no_description(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        Description(**wrong, style="noto")


def test_english_is_good() -> None:
    assert [with_article(noun) for noun in ("owl", "unicorn", "hourglass")] == ["an owl", "a unicorn", "an hourglass"]
    assert [plural(noun) for noun in ("slice of cake", "mouse", "bus")] == ["slices of cake", "mice", "buses"]


def pillow_reference(scene: Scene, canvas: int) -> np.ndarray:
    """The same scene by Pillow: its antialiased resize and its alpha composite; objects on whole pixels."""
    picture = Image.new("RGBA", (canvas, canvas), (*(round(value * 255) for value in scene.background.top), 255))
    for placed in scene.objects:
        side = round(placed.side * canvas)
        sprite = Image.fromarray(VOCABULARY.sprites_VHW4[placed.picture].numpy(), "RGBa")
        layer = Image.new("RGBa", picture.size)
        layer.paste(
            sprite.resize((side, side), Image.Resampling.BILINEAR),
            (round(placed.x * canvas - side / 2), round(placed.y * canvas - side / 2)),
        )
        picture.alpha_composite(layer.convert("RGBA"))
    return np.asarray(picture.convert("RGB")).astype(int)


@pytest.mark.parametrize("side", [12, 20, 32, 48])
def test_the_compositor_agrees_with_pillow(side: int) -> None:
    """Two overlapping objects, shrunk, as they are and enlarged. What is left is Pillow's rounding of each step and the
    outermost pixel, where it stretches the border and we let it fade."""
    objects = tuple(
        Placed(picture, (side / 2 + at) / 64, (side / 2 + at) / 64, side / 64) for picture, at in ((0, 4), (5, 9))
    )
    scene = Scene(objects, Background(PAINTS["teal"], PAINTS["teal"]))
    drawn = Compositor(VOCABULARY.sprites_VHW4).draw([scene], 64)
    ours = ((drawn[0].permute(1, 2, 0).numpy() + 1) * 127.5).round()
    difference = np.abs(ours - pillow_reference(scene, 64))
    assert difference.max() <= 6
    assert difference.mean() < 0.3


def test_a_scene_is_drawn_alike_alone_and_in_a_batch() -> None:
    scenes = [described(seed)[1] for seed in range(12)]
    drawer = Compositor(VOCABULARY.sprites_VHW4)
    batched = drawer.draw(scenes, 48)
    alone = torch.cat([drawer.draw([scene], 48) for scene in scenes])
    assert torch.allclose(batched, alone, atol=1e-5)


def test_a_gpu_which_draws_absent_objects_too_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shapes are static: objects that are absent or not painted are computed and left out by their weights."""
    scenes = [described(seed)[1] for seed in range(24)]
    assert len({len(scene.objects) for scene in scenes}) > 1
    assert {placed.tint is None for scene in scenes for placed in scene.objects} == {True, False}
    drawer = Compositor(VOCABULARY.sprites_VHW4)
    expected = drawer.draw(scenes, 48)
    monkeypatch.setattr(compositor, "_rows", lambda _: slice(None))
    assert torch.allclose(drawer.draw(scenes, 48), expected, atol=1e-6)
    assert torch.allclose(drawer.draw_packed(pack_scenes(scenes, MOST_OBJECTS), 48), expected, atol=1e-6)


def test_a_gpu_starts_the_same_operations_for_any_batch_and_waits_for_no_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compositor, "_rows", lambda _: slice(None))
    drawer, counts = Compositor(VOCABULARY.sprites_VHW4), []
    for batch in (2, 9):
        packed = pack_scenes([described(seed)[1] for seed in range(batch)], MOST_OBJECTS)
        with Operations() as operations:
            drawer.draw_packed(packed, 48)
        counts.append(operations.computing.total())
        # What a number of Python's becomes on its way to the device, and what one of the device becomes.
        assert not {"aten.lift_fresh.default", "aten._local_scalar_dense.default"} & operations.counts.keys()
    assert counts[0] == counts[1] <= 93


@pytest.mark.slow
def test_compiled_layers_are_the_same_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For batches of any size: mixed sources have other numbers of scenes in every step."""
    monkeypatch.setattr(compositor, "_rows", lambda _: slice(None))
    eager, compiled = (Compositor(VOCABULARY.sprites_VHW4, compiled=compiled) for compiled in (False, True))
    for batch in (5, 7):
        packed = pack_scenes([described(seed)[1] for seed in range(batch)], MOST_OBJECTS)
        assert torch.allclose(compiled.draw_packed(packed, 48), eager.draw_packed(packed, 48), atol=1e-6)


def test_grounds_fade_or_part_at_the_horizon() -> None:
    red, blue = (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)
    nothing = Placed(0, 0.5, 0.5, 0.01)
    scenes = [
        Scene((nothing,), Background(red, blue)),
        Scene((nothing,), Background(red, blue, 0.25)),
        Scene((nothing,), WHITE),
    ]
    fading, parted, white = ((picture + 1) / 2 for picture in Compositor(VOCABULARY.sprites_VHW4).draw(scenes, 16))
    assert torch.all(fading[2, 1:, 0] > fading[2, :-1, 0])
    assert torch.equal(parted[0, :, 0], torch.tensor([1.0] * 4 + [0.0] * 12))
    assert white[:, 0, 0].tolist() == pytest.approx(list(PAINTS["white"]))


def test_paint_gives_every_sprite_its_colour() -> None:
    paint, _ = COLOURS["green"]
    for picture in range(len(VOCABULARY.sprites_VHW4)):
        drawn = Compositor(VOCABULARY.sprites_VHW4).draw([Scene((Placed(picture, 0.5, 0.5, 0.8, paint),), WHITE)], 32)
        middle = (drawn[0, :, 16, 16] + 1) / 2
        assert middle.tolist() == pytest.approx(list(paint), abs=0.05)


def few(*names: str) -> Vocabulary:
    rows = dict.fromkeys(HANDS, 0)
    return Vocabulary({name: VocabularyWord((name,), rows) for name in names}, HANDS, sprites()[:1])


@pytest.mark.parametrize(
    ("names", "takes"),
    [
        (("dog", "apple", "cat"), "takes 4 words"),
        (("milk", "bread", "fire", "coffee", "dog"), "takes 2 words with a plural"),
    ],
)
def test_words_that_are_too_few_are_refused(names: tuple[str, ...], takes: str) -> None:
    with pytest.raises(InputError, match=takes):
        SceneWriter(few(*names))


def test_words_that_never_meet_are_too_few() -> None:
    """Without the check, words would be drawn for ever."""
    first = "dog"
    strangers = [name for name in map("{}-thing".format, range(400)) if held_out(first, name)][:3]
    assert len(strangers) == 3
    with pytest.raises(InputError, match="beside another"):
        SceneWriter(few(first, *strangers))
