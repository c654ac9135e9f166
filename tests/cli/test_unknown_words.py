"""Words that the model was not taught are told, and the picture is drawn all the same."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mos_cli.bundles.bundle import Bundle, find_bundle, write_index
from mos_cli.bundles.taught import TaughtScenes, taught_scenes

WORDS = {"dog face": ["dog", "puppy"], "wolf": ["wolf"], "tangerine": ["tangerine", "orange fruit"]}
NONE = "none of the 3 objects that tiny was taught (did you mean orange fruit?): mos models show tiny lists them"


def with_data(bundle: Bundle, **data: Any) -> Bundle:
    """The model with a recipe of these data."""
    (bundle.folder / "recipe.json").write_text(json.dumps({"data": data}))
    fields = ("name", "description", "license", "understanding", "canvas", "defaults", "edits")
    return write_index(bundle.folder, **{name: getattr(bundle.index, name) for name in fields})


@pytest.fixture
def taught(bundle: Bundle) -> Bundle:
    """A model whose recipe names three objects."""
    return with_data(bundle, kind="scenes", words=WORDS, styles=["noto"])


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        (["a red dog"], None),
        (["Two WOLVES at night, noto style!"], None),
        (["a (dog:1.2) and {a wolf|a puppy}"], None),
        (["a dog, watercolor style"], "tiny was not taught: watercolor"),
        (
            ["a (dgo:1.2) on a {blu|blu} background"],
            "tiny was not taught: dgo (did you mean dog?), blu (did you mean blue?)",
        ),
        (["five dogs", "a {robot|robot}", "five robots"], "tiny was not taught: five, robot, robots"),
        (["a b c d e f g h i j k l dog"], "tiny was not taught: b, c, d, e, f, g, h, i, j, k and 1 more"),
        (["an orange"], f"'an orange' names {NONE}"),
        (["an orange", "a red", "a dog"], f"2 prompts, such as 'an orange', name {NONE}"),
    ],
)
def test_unknown_words_are_told_once(mos, taught: Bundle, tmp_path: Path, prompts: list[str], said: str | None) -> None:
    listed = tmp_path / "prompts.txt"
    listed.write_text("\n".join(prompts))
    result = mos("generate", f"@{listed}", "-n", 2, "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert [line for line in result.stderr.splitlines() if "taught" in line] == ([said] if said else [])


def test_the_picture_is_drawn_all_the_same(mos, taught: Bundle, tmp_path: Path) -> None:
    result = mos("generate", "ein roter Hund", "--steps", 1, "-o", tmp_path / "a.png")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "a.png").exists()
    assert "tiny was not taught: ein, roter, hund" in result.stderr


@pytest.mark.parametrize(
    ("instruction", "said"),
    [
        ("please paint it red, and leave the rest alone", None),
        ("paint it like van gogh", "editor was not taught: van, gogh"),
        (
            "remvoe teh wofl",
            "editor was not taught: remvoe (did you mean remove?), teh (did you mean the?), wofl (did you mean wolf?)",
        ),
    ],
)
def test_instructions_are_checked(mos, editor: Bundle, tmp_path: Path, instruction: str, said: str | None) -> None:
    with_data(editor, kind="scenes", words=WORDS, styles=["noto"])
    Image.new("RGB", (32, 32), "white").save(tmp_path / "a.png")
    result = mos("edit", tmp_path / "a.png", instruction, "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert [line for line in result.stderr.splitlines() if "taught" in line] == ([said] if said else [])


def test_the_objects_are_listed(mos, taught: Bundle) -> None:
    assert "objects: dog, tangerine, wolf" in mos("models", "show", "tiny").output


def test_nothing_is_said_of_what_cannot_be_known(mos, bundle: Bundle, tmp_path: Path) -> None:
    """Without a recipe, or where a user's own pictures were taught as well."""
    assert taught_scenes(bundle) is None
    both = with_data(bundle, kind="captioned", scenes={"words": WORDS, "styles": ["noto"], "share": 0.5})
    assert taught_scenes(both) == TaughtScenes(WORDS, ["noto"], alone=False)
    drawn = mos("generate", "a zog", "--steps", 1, "-o", tmp_path / "a.png")
    assert (drawn.exit_code, "taught" in drawn.stderr) == (0, False)


def test_the_shipped_model_has_as_many_objects_as_its_card_says() -> None:
    taught = taught_scenes(find_bundle("emoji"))
    assert taught is not None
    assert len(taught.objects) == 205
