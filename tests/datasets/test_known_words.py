"""A word is known if captions or instructions can have it."""

import subprocess
import sys
import tomllib
from pathlib import Path
from random import Random

import pytest
import torch

from mos_cli.bundles.bundle import find_bundle
from mos_cli.bundles.taught import TaughtScenes, taught_scenes
from mos_cli.datasets.scenes.captions import caption
from mos_cli.datasets.scenes.edits import EditWriter
from mos_cli.datasets.scenes.known_words import KnownWords
from mos_cli.datasets.scenes.vocabulary import NO_PLURAL, STYLES, Vocabulary, VocabularyWord, plural
from mos_cli.datasets.scenes.writer import SceneWriter

SHIPPED = taught_scenes(find_bundle("emoji"))
assert SHIPPED is not None
EMOJI = KnownWords(SHIPPED)


def known_of(*names: str) -> KnownWords:
    """Those of a model of these objects."""
    return KnownWords(TaughtScenes({name: [name] for name in names}, ["noto"], alone=True))


def names_of(words: str) -> dict[str, list[str]]:
    return tomllib.loads((Path("presets/words") / f"{words}.toml").read_text())


@pytest.mark.parametrize("words", ["emoji", "emoji-more"])
def test_every_word_of_captions_and_instructions_is_known(words: str) -> None:
    names, styles = names_of(words), tuple(STYLES)
    pictures = {word: VocabularyWord(tuple(called), dict.fromkeys(styles, 0)) for word, called in names.items()}
    vocabulary, random = Vocabulary(pictures, styles, torch.empty(0)), Random(0)
    scenes, edits = SceneWriter(vocabulary), EditWriter(vocabulary)
    known = KnownWords(TaughtScenes(names, [*styles], alone=True))
    for _ in range(2000):
        drawn, edited = caption(scenes.describe(random), vocabulary, random), edits.write(random).instruction
        assert known.unknown(drawn, edit=False) == [], drawn
        assert known.names_object(drawn), drawn
        assert known.unknown(edited, edit=True) == [], edited


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("a dog, watercolor style", ["watercolor"]),
        ("A pixel-art dog", ["pixel", "art"]),
        ("five turquoise dogs", ["five", "turquoise"]),
        ("a soft gradient, fx drawing of a dog", ["soft", "fx"]),  # styles of other models
        ("the dog\u2019s house and a dog's bed", []),
        ("one dog without a bed", ["one", "without"]),  # words of instructions
        ("a birthday cake", []),
        ("an angry dog with eight birthdays", ["angry", "eight", "birthdays"]),  # parts of names
        ("two firetrucks and a fire-engine", []),
        ("a dog \N{DOG FACE}", []),
    ],
)
def test_words_of_a_prompt(prompt: str, unknown: list[str]) -> None:
    assert EMOJI.unknown(prompt, edit=False) == unknown


@pytest.mark.parametrize(
    ("instruction", "unknown"),
    [
        ("Make the leftmost animal bigger, please.", []),
        ("don\u2019t change anything", []),
        ("make the dog wear a top hat", ["wear"]),
        ("remove the mammal", ["mammal"]),
    ],
)
def test_words_of_an_instruction(instruction: str, unknown: list[str]) -> None:
    assert EMOJI.unknown(instruction, edit=True) == unknown


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("dgo", "dog"),
        ("unicorm", "unicorn"),
        ("bleu", "blue"),
        ("vintge", "vintage"),
        ("birthday", "birthday cake"),
        ("remvoe", "remove"),
        ("turquoise", None),
        ("sunny", None),
        ("five", None),
        ("art", None),
    ],
)
def test_what_an_unknown_word_may_stand_for(word: str, nearest: str | None) -> None:
    assert EMOJI.nearest(word, edit=True) == nearest


def test_a_word_of_instructions_is_not_proposed_for_a_drawing() -> None:
    assert EMOJI.nearest("remvoe", edit=False) is None


@pytest.mark.parametrize("prompt", ["a zebra crossing the road", "a starfish", "a boxer", "a keyboard", "a kite"])
def test_a_word_that_begins_as_a_name_is_no_name(prompt: str) -> None:
    assert not EMOJI.names_object(prompt)


@pytest.mark.parametrize("words", ["emoji", "emoji-more"])
def test_every_name_is_found_in_the_plural(words: str) -> None:
    for called in names_of(words).values():
        for name in called:
            many = name if name in NO_PLURAL else plural(name)
            assert known_of(name).names_object(f"three {many}"), many


def test_short_names_are_not_found_inside_of_other_words() -> None:
    words = known_of("ant", "rat", "ox", "pen")
    for prompt in ("a giant elephant", "a pirate with a box", "an open door"):
        assert not words.names_object(prompt), prompt
    for prompt in ("an ant", "two RATS", "oxen at night", "a (pen)"):
        assert words.names_object(prompt), prompt


def test_words_are_known_without_torch() -> None:
    code = (
        "import sys; import mos_cli.datasets.scenes.known_words; "
        "heavy = {'torch', 'numpy', 'inflect'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
