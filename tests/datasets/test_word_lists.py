"""The lists of words: each name means one picture, and common words are drawn as often as a recipe says."""

from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from mos_cli.datasets.art.file import data_folder, load_manifest, manifest_path
from mos_cli.datasets.scenes.backgrounds import PAINTS, SCENERIES
from mos_cli.datasets.scenes.captions import SIZES
from mos_cli.datasets.scenes.description import held_out, held_out_style
from mos_cli.datasets.scenes.edits import EditWriter
from mos_cli.datasets.scenes.referring import groups
from mos_cli.datasets.scenes.vocabulary import (
    COLOURS,
    NO_PLURAL,
    NO_SINGULAR,
    STYLES,
    Vocabulary,
    VocabularyWord,
    plural,
    with_article,
)
from mos_cli.datasets.scenes.writer import SceneWriter
from mos_cli.datasets.tables import CommonWords, DataTable
from mos_cli.errors import InputError, UsageError
from mos_cli.evaluation.scenebench import bench_words
from mos_cli.training.recipe import TrainRecipe, load_recipe, recipe_path

RECIPE = load_recipe("train-emoji-more")
BENCH = bench_words()


def data_of(recipe: Any) -> DataTable:
    assert isinstance(recipe.data, DataTable)
    return recipe.data


DATA = data_of(RECIPE)
NEW = {word: names for word, names in DATA.words.items() if word not in BENCH.words}


def vocabulary(common: CommonWords | None) -> Vocabulary:
    words = {word: VocabularyWord(names, dict.fromkeys(DATA.styles, 0)) for word, names in DATA.words.items()}
    return Vocabulary(words, DATA.styles, torch.empty(0), common)


MORE = vocabulary(DATA.common)
EDITOR = EditWriter(MORE)


def scenes() -> Iterator[tuple[str, list[str]]]:
    """The styles and the words of random scenes."""
    writer, random = SceneWriter(MORE), Random(0)
    for _ in range(4000):
        description = writer.describe(random)
        yield description.style, [thing.word for thing in description.things]


def edits() -> Iterator[tuple[set[tuple[str, str]], list[str]]]:
    """The words with their styles, and the different words, of random edits."""
    random = Random(0)
    for _ in range(2000):
        edit = EDITOR.write(random)
        items = (*edit.was.items, *edit.now.items)
        yield {(item.word, item.style) for item in items}, list(dict.fromkeys(item.word for item in items))


def test_the_words_of_the_bench_come_first_with_their_names() -> None:
    bench = {word: known.names for word, known in BENCH.words.items()}
    assert list(DATA.words.items())[: len(bench)] == list(bench.items())
    assert DATA.common is not None
    assert DATA.common.words == tuple(bench)


def test_no_name_means_two_words_in_the_singular_or_plural() -> None:
    meanings: dict[str, set[str]] = {}
    for word, names in DATA.words.items():
        assert len(set(names)) == len(names)
        for name in names:
            for said in {name} if name in NO_SINGULAR | NO_PLURAL else {name, plural(name)}:
                meanings.setdefault(said, set()).add(word)
    # "Books" was a word of the bench before.
    assert {said: words for said, words in meanings.items() if len(words) > 1} == {"books": {"closed book", "books"}}


def test_no_new_name_has_a_word_that_captions_use_for_something_else() -> None:
    said = [*SIZES.values(), *STYLES.values(), *(names for _, names in COLOURS.values())]
    taken = {name for names in said for name in names} | {*PAINTS, *SCENERIES, "sky", "road", "picture"}
    taken |= {"one", "two", "three", "four", "pair", "on", "in", "inside", "behind", "above", "below", "under", "and"}
    for names in NEW.values():
        for name in names:
            assert name == " ".join(name.lower().split())
            assert not taken & set(name.split()), name


@pytest.mark.parametrize(
    ("name", "one", "several"),
    [
        ("knife", "a knife", "knives"),
        ("ox", "an ox", "oxen"),
        ("suv", "an suv", "suvs"),
        ("burrito", "a burrito", "burritos"),
        ("cup of tea", "a cup of tea", "cups of tea"),
        ("heart with an arrow", "a heart with an arrow", "hearts with an arrow"),
        ("urn", "an urn", "urns"),
    ],
)
def test_new_names_are_in_good_english(name: str, one: str, several: str) -> None:
    assert any(name in names for names in NEW.values())
    assert (with_article(name), plural(name)) == (one, several)


def test_a_medal_is_not_painted_where_its_name_has_a_metal() -> None:
    assert MORE.words["1st place medal"].names_for(counted=False, painted=True) == []


def test_groups_are_of_known_words() -> None:
    for kind, (members, arguable) in groups().items():
        assert members | arguable <= set(DATA.words), kind
        assert not members & arguable, kind


def test_groups_say_of_the_words_of_the_bench_what_they_said() -> None:
    """Kinds that are names of words concern new words only: the edits of the bench are as they were."""
    names = {name for names in DATA.words.values() for name in names}
    for kind, (members, arguable) in groups().items():
        if not members:
            assert kind in names
            assert not any(kind in known.names for known in BENCH.words.values()) or not arguable & set(BENCH.words)


def test_a_word_stands_beside_none_that_its_name_could_mean() -> None:
    pairs = {frozenset(("bird", "owl")), frozenset(("dog face", "poodle")), frozenset(("train", "bullet train"))}
    assert pairs <= EDITOR._composer._confusable
    met = {frozenset(pair) for _, words in edits() for pair in combinations(words, 2)}
    assert not met & EDITOR._composer._confusable


def test_what_is_held_out_is_never_drawn() -> None:
    for style, words in scenes():
        assert not any(held_out(*pair) for pair in combinations(words, 2))
        assert not any(held_out_style(word, style) for word in words)
    for styled, words in edits():
        assert not any(held_out(*pair) for pair in combinations(words, 2))
        assert not any(held_out_style(word, style) for word, style in styled)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_common_words_are_drawn_as_often_as_the_recipe_says(share: float) -> None:
    common = CommonWords(words=tuple(BENCH.words), share=share)
    words, random = vocabulary(common), Random(0)
    for count in (1, 4):
        drawn = [word for _ in range(4000 // count) for word in words.sample(count, random, "noto")]
        assert sum(word in BENCH.words for word in drawn) / len(drawn) == pytest.approx(share, abs=0.03)


def test_scenes_and_edits_are_of_common_words_by_half_and_of_every_word() -> None:
    for drawn in ([word for _, words in scenes() for word in words], [word for _, words in edits() for word in words]):
        counts = Counter(drawn)
        assert sum(counts[word] for word in BENCH.words) / counts.total() == pytest.approx(0.5, abs=0.03)
        assert len(counts) > 0.97 * len(DATA.words)


def test_a_common_word_is_as_often_the_first_of_a_pair_as_the_second() -> None:
    pairs = [words for _, words in scenes() if len(words) == 2]
    first, second = (sum(words[at] in BENCH.words for words in pairs) / len(pairs) for at in (0, 1))
    assert first == pytest.approx(second, abs=0.06)


def test_without_common_words_draws_are_those_of_before() -> None:
    learned = [word for word in BENCH.words if not held_out_style(word, "noto")]
    for seed in range(50):
        assert BENCH.sample(3, Random(seed), "noto") == Random(seed).sample(learned, 3)
        assert BENCH.sample(3, Random(seed)) == Random(seed).sample(list(BENCH.words), 3)


@pytest.mark.parametrize(
    ("common", "said"),
    [
        ('{ words = ["dog face", "dinosaur"], share = 0.5 }', "common has 'dinosaur', which is none of the words"),
        ('{ words = ["dog face", "cat face"], share = 0.5 }', "common words and the others are 8 each at least"),
        ('{ words = "words/emoji-more.toml", share = 0.5 }', "common words and the others are 8 each at least"),
        ('{ words = "words/emoji.toml", share = 1.0 }', "data.common.share: Input should be less than 1"),
        ('{ words = "words/emoji.toml", shares = 0.5 }', "data.common.shares: unknown setting"),
        ('{ words = "words/emoji.toml" }', "data.common.share: Field required"),
        ('"words/emoji.toml"', "data.common: "),
    ],
)
def test_common_words_that_cannot_be_are_refused_in_one_line(tmp_path: Path, common: str, said: str) -> None:
    text = recipe_path("train-emoji-more").read_text(encoding="utf-8")
    path = tmp_path / "mine.toml"
    path.write_text(text.replace('{ words = "words/emoji.toml", share = 0.5 }', common), encoding="utf-8")
    with pytest.raises(UsageError) as refused:
        load_recipe(str(path))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_list_of_common_words_that_is_not_there_is_told(tmp_path: Path) -> None:
    text = recipe_path("train-emoji-more").read_text(encoding="utf-8")
    (tmp_path / "mine.toml").write_text(text.replace('"words/emoji.toml"', '"words/mine.toml"'), encoding="utf-8")
    with pytest.raises(InputError, match=r"mine\.toml is not there"):
        load_recipe(str(tmp_path / "mine.toml"))


def test_a_run_keeps_its_common_words_in_its_recipe() -> None:
    assert TrainRecipe.model_validate_json(RECIPE.model_dump_json()) == RECIPE


@pytest.mark.slow
def test_every_word_has_a_picture_in_every_style() -> None:
    """In those of the five sets that the art file here has."""
    try:
        pictures = load_manifest(manifest_path(data_folder())).pictures
    except InputError:
        pytest.skip("no art here: `mos data build --size 64` makes it")
    found = {(picture.name, picture.style) for picture in pictures}
    for style in {style for _, style in found} & set(DATA.styles):
        assert not [word for word in DATA.words if (word, style) not in found]
