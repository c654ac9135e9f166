"""Alternatives in prompts: which, is decided by the seed; what is not understood is refused."""

import tomllib
from pathlib import Path

import pytest

from mos_cli.errors import InputError, MosError, UsageError
from mos_cli.inference.wildcards import expand_prompt, word_files
from mos_cli.utils.folders import presets_folder


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the user's word files."""
    monkeypatch.setenv("MOS_DATA", str(tmp_path))
    (tmp_path / "words").mkdir()
    return tmp_path / "words"


def prompts(text: str, seeds: int = 60) -> set[str]:
    return {expand_prompt(text, seed)[0] for seed in range(seeds)}


def test_every_alternative_is_chosen_by_some_seed_and_always_by_that() -> None:
    assert prompts("a {red|blue} cat") == {"a red cat", "a blue cat"}
    assert expand_prompt("a {red|blue} cat", 7) == expand_prompt("a {red|blue} cat", 7)
    assert prompts("{a|b} {a|b}") == {"a a", "a b", "b a", "b b"}, "choices are independent"


def test_several_alternatives_are_never_the_same_twice() -> None:
    assert prompts("{2$$a|b|c}") == {"a, b", "a, c", "b, a", "b, c", "c, a", "c, b"}
    assert prompts("{2$$ and $$a|b}") == {"a and b", "b and a"}


def test_alternatives_lie_in_one_another_and_may_be_empty() -> None:
    assert prompts("a {{dark |}red|blue} cat") == {"a dark red cat", "a red cat", "a blue cat"}
    prompt, template = expand_prompt("a {x {1|2}|x {1|2}} cat", 3)
    assert template is not None
    assert template.text == "a {x {1|2}|x {1|2}} cat"
    assert template.choices == (prompt[2:5], prompt[4])


def test_text_without_alternatives_is_left_as_it_is() -> None:
    for text in ("a red cat", "a  cat | dog }", "snake_case and __", "2$$", "C:\\cats"):
        assert expand_prompt(text, 1) == (text, None)
    assert expand_prompt(r"\{a\|b\} \__x__", 1) == ("{a|b} __x__", None)


def test_word_files_of_the_user_come_before_those_of_the_package(words: Path) -> None:
    assert expand_prompt("__animals__", 1)[0] in word_files()["animals"].read_text().splitlines()
    (words / "animals.txt").write_text("# mine\n\n a {tame|wild} gnu \n", encoding="utf-8")
    assert prompts("__animals__") == {"a tame gnu", "a wild gnu"}


REFUSED = {
    "not closed": ("a {red|blue cat", UsageError, "not closed"),
    "one alternative": ("a {red} cat", UsageError, "no choice of 1 of 1"),
    "too many": ("{3$$a|b}", UsageError, "no choice of 3 of 2"),
    "none": ("{0$$a|b}", UsageError, "no choice of 0"),
    "unknown word file": ("__nothing__", UsageError, "nothing.txt"),
    "path": ("__../../etc__", None, ""),
    "nothing left": ("{|}", InputError, "nothing is left"),
    "word files that name one another": ("__loop__", UsageError, "deep"),
    "more than there is time for": ("__wide__", UsageError, "choices"),
    "empty word file": ("__empty__", InputError, "no words"),
    "word file that is no text": ("__bytes__", InputError, "UTF-8"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_is_not_understood_is_refused(words: Path, mistake: str) -> None:
    (words / "loop.txt").write_text("__loop__")
    (words / "wide.txt").write_text("__deeper__ " * 60)
    (words / "deeper.txt").write_text("__deepest__ " * 60)
    (words / "deepest.txt").write_text("a\nb")
    (words / "empty.txt").write_text("# nothing\n")
    (words / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    text, error, message = REFUSED[mistake]
    if error is None:
        assert expand_prompt(text, 1) == (text, None)
        return
    with pytest.raises(error, match=message):
        expand_prompt(text, 1)


def test_a_megabyte_of_braces_is_refused_at_once() -> None:
    for text in ("{" * 10**6, "{a|b}" * 200_000, "{" + "|" * 10**6 + "}"):
        with pytest.raises(MosError):
            expand_prompt(text, 1)


def test_shipped_words_are_those_the_shipped_model_was_taught() -> None:
    taught = [names[0] for names in tomllib.loads((presets_folder() / "words" / "emoji.toml").read_text()).values()]
    lists = {name: path.read_text().splitlines()[1:] for name, path in word_files().items()}
    assert lists["objects"] == taught
    for name in lists.keys() - {"objects", "colours", "styles", "backgrounds"}:
        assert set(lists[name]) <= set(taught), name
