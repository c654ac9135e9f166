"""A prompt that names nothing that the model was taught is told, and drawn all the same."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import inflect
import pytest

from mos_cli.bundles.bundle import Bundle, find_bundle, write_index
from mos_cli.bundles.taught import TaughtScenes, taught_scenes

WORDS = {"dog face": ["dog", "puppy"], "wolf": ["wolf"], "sheaf of rice": ["rice plant"]}


def with_data(bundle: Bundle, **data: Any) -> Bundle:
    """The model with a recipe of these data."""
    (bundle.folder / "recipe.json").write_text(json.dumps({"data": data}))
    fields = ("name", "description", "license", "understanding", "canvas", "defaults")
    return write_index(bundle.folder, **{name: getattr(bundle.index, name) for name in fields})


@pytest.fixture
def taught(bundle: Bundle) -> Bundle:
    """A model whose recipe names three objects."""
    return with_data(bundle, kind="scenes", words=WORDS, styles=["noto"])


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        (["a red dog"], None),
        (["Two WOLVES at night"], None),
        (["a puppy"], None),
        (["ein roter Hund"], "'ein roter Hund' names none of the 3 objects that tiny was taught: mos models show tiny"),
        (["a dinosaur", "a dog", "a robot"], "2 prompts, such as 'a dinosaur', name none of the 3 objects"),
    ],
)
def test_unknown_objects_are_told_once(
    mos, taught: Bundle, tmp_path: Path, prompts: list[str], said: str | None
) -> None:
    listed = tmp_path / "prompts.txt"
    listed.write_text("\n".join(prompts))
    result = mos("generate", f"@{listed}", "--steps", 1, "-n", 2, "-o", tmp_path / "out/")
    assert result.exit_code == 0, result.stderr
    assert len(list((tmp_path / "out").glob("*.png"))) == 2 * len(prompts)
    assert result.stderr.count("objects that tiny") == (said is not None)
    assert said is None or said in result.stderr


def test_the_objects_are_listed(mos, taught: Bundle) -> None:
    assert "objects: dog, rice plant, wolf" in mos("models", "show", "tiny").output


def test_nothing_is_said_of_what_cannot_be_known(mos, bundle: Bundle, tmp_path: Path) -> None:
    """Without a recipe, or where a user's own pictures were taught as well."""
    assert taught_scenes(bundle) is None
    both = with_data(bundle, kind="captioned", scenes={"words": WORDS, "styles": ["noto"], "share": 0.5})
    assert taught_scenes(both) == TaughtScenes(WORDS, ["noto"], alone=False)
    drawn = mos("generate", "a zog", "--steps", 1, "-o", tmp_path / "a.png")
    assert (drawn.exit_code, "objects" in drawn.stderr) == (0, False)


def test_the_shipped_model_knows_what_its_card_says() -> None:
    taught = taught_scenes(find_bundle("emoji"))
    assert taught is not None
    assert len(taught.objects) == 205
    assert all(taught.names_one(f"a {name}") for name in taught.objects)
    assert not taught.names_one("ein roter Hund")


@pytest.mark.parametrize("prompt", ["a zebra crossing the road", "a starfish", "a boxer", "a keyboard", "a kite"])
def test_a_word_that_begins_as_a_name_is_no_name(prompt: str) -> None:
    taught = taught_scenes(find_bundle("emoji"))
    assert taught is not None
    assert not taught.names_one(prompt)


@pytest.mark.parametrize("words", ["emoji", "emoji-more"])
def test_every_name_is_found_in_the_plural(words: str) -> None:
    english = inflect.engine()
    names = tomllib.loads((Path("presets/words") / f"{words}.toml").read_text())
    for word, called in names.items():
        taught = TaughtScenes({word: called}, ["noto"], alone=True)
        for name in called:
            head, *rest = re.split(r"( of | with )", name)
            many = "".join([head if head == "flying money" else english.plural_noun(head), *rest])
            assert taught.names_one(f"three {many}"), many
    taught = TaughtScenes({"fire engine": ["fire truck"]}, ["noto"], alone=True)
    assert all(taught.names_one(f"a red {name}") for name in ("firetruck", "fire-truck", "fire truck's wheel"))


def test_short_names_are_not_found_inside_of_other_words() -> None:
    taught = TaughtScenes({"ant": ["ant"], "rat": ["rat"], "ox": ["ox"], "pen": ["pen"]}, ["noto"], alone=True)
    for prompt in ("a giant elephant", "a pirate with a box", "an open door"):
        assert not taught.names_one(prompt), prompt
    for prompt in ("an ant", "two RATS", "oxen at night", "a (pen)"):
        assert taught.names_one(prompt), prompt
