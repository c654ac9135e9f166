"""Words of a prompt and the tokens that they are made of."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mos_cli.errors import UsageError
from mos_cli.routing.analysis import Word, find_words, split_words, word_layers
from mos_cli.routing.rules import Rule
from mos_cli.routing.rules import tokens_of as tokens_of_rule
from mos_cli.routing.trace import TraceToken
from tests.helpers.traces import tokens_of


def test_word_pieces_make_words():
    prompt = "a  red-apple, naïve 🦊"
    pieces = [("[CLS]", 0, 0), ("a", 0, 1), ("red", 3, 6), ("-", 6, 7), ("app", 7, 10), ("##le", 10, 12)]
    pieces += [(",", 12, 13), ("naive", 14, 19), ("[UNK]", 20, 21), ("[SEP]", 0, 0)]
    assert words_of(prompt, pieces) == [
        Word("a", (1,)),
        Word("red-apple", (2, 3, 4, 5)),
        Word(",", (6,)),
        Word("naïve", (7,)),
        Word("🦊", (8,)),
        Word("[CLS]", (0,), special=True),
        Word("[SEP]", (9,), special=True),
    ]


def test_pieces_that_begin_with_a_space_make_words():
    prompt = "a  red dog\t🦊 "
    pieces = [("a", 0, 1), ("Ġ", 1, 2), ("Ġred", 2, 6), ("Ġdo", 6, 9), ("g", 9, 10), ("ĉ", 10, 11)]
    pieces += [("ðŁ", 11, 12), ("¦", 11, 12), ("Ġ", 12, 13)]
    assert words_of(prompt, pieces) == [
        Word("a", (0,)),
        Word("red", (2,)),
        Word("dog", (3, 4)),
        Word("🦊", (6, 7)),
        Word("Ġ", (1,), special=True),
        Word("ĉ", (5,), special=True),
        Word("Ġ", (8,), special=True),
    ]


@given(st.text(alphabet=st.sampled_from("ab ,\t\u3000é"), max_size=20), st.data())
def test_every_token_is_in_exactly_one_word(prompt, data):
    spans = st.tuples(st.integers(0, len(prompt)), st.integers(0, len(prompt))).map(sorted)
    pieces = [("x", start, end) for start, end in data.draw(st.lists(spans, max_size=8))]
    words = words_of(prompt, pieces)
    assert sorted(n for word in words for n in word.tokens) == list(range(len(pieces)))
    assert all(word.text in prompt and not set(word.text) & set(" \t\u3000") for word in words if not word.special)


def words_of(prompt: str, pieces: list[tuple[str, int, int]]) -> list[Word]:
    return list(split_words(prompt, [TraceToken(text=t, start=s, end=e) for t, s, e in pieces]))


@given(st.text(alphabet=st.sampled_from('aé9 ,."-🦊'), max_size=20))
def test_a_word_is_the_tokens_that_a_rule_for_it_governs(prompt):
    spans = [match.span() for match in re.finditer(r"\w+|[^\w\s]", prompt)]
    tokens = [TraceToken(text=prompt[start:end], start=start, end=end) for start, end in spans]
    for word in split_words(prompt, tokens):
        occurrences = [tokens_of_rule(Rule(word.text, "=", (0,), nth=nth), prompt, tokens) for nth in range(1, 21)]
        assert word.tokens in occurrences


def test_punctuation_is_no_part_of_the_word_beside_it():
    pieces = [('"', 0, 1), ("a", 1, 2), ("cat", 3, 6), (".", 6, 7), ('."', 6, 8), ("(dog", 9, 13), (")", 13, 14)]
    assert words_of('"a cat." (dog)', pieces) == [
        Word('"', (0,)),
        Word("a", (1,)),
        Word("cat", (2,)),
        Word('."', (3, 4)),
        Word("dog", (5,)),
        Word(")", (6,)),
    ]


def test_accents_and_vowel_signs_belong_to_the_letter_before_them():
    prompt = "cafe\u0301, हिन्दी ❤\ufe0f"
    pieces = [
        ("cafe", 0, 4),
        ("\u0301", 4, 5),
        (",", 5, 6),
        ("हिन्द", 7, 12),
        ("ी", 12, 13),
        ("❤", 14, 15),
        ("\ufe0f", 15, 16),
    ]
    assert [(word.text, word.tokens) for word in words_of(prompt, pieces)] == [
        ("cafe\u0301", (0, 1)),
        (",", (2,)),
        ("हिन्दी", (3, 4)),
        ("❤\ufe0f", (5, 6)),
    ]


def test_words_are_found_whatever_their_case():
    prompt = "A cat, a Dog"
    words = words_of(prompt, [("A", 0, 1), ("cat", 2, 5), (",", 5, 6), ("a", 7, 8), ("Dog", 9, 12), ("[SEP]", 0, 0)])
    assert [word.text for word in find_words(words, ["DOG", "cat", "a"])] == ["A", "cat", "a", "Dog"]
    assert [word.text for word in find_words(words, [",", "[sep]"])] == [",", "[SEP]"]
    with pytest.raises(UsageError, match=r"'do' is not a word .*: its words are A, cat, ,, a#2, Dog, \[SEP\]$"):
        find_words(words, ["cat", "do"])


def test_an_occurrence_of_a_word_is_told_and_found_by_its_number():
    words = split_words("a cat and a dog and a Cat", tokens_of("a cat and a dog and a Cat"))
    labels = [word.label for word in words if not word.special]
    assert labels == ["a", "cat", "and", "a#2", "dog", "and#2", "a#3", "Cat#2"]
    assert [word.label for word in find_words(words, ["cat#2", "A#1"])] == ["a", "Cat#2"]
    with pytest.raises(UsageError, match="'dog#2' is not a word"):
        find_words(words, ["dog#2"])


def test_a_word_reads_the_mean_of_its_tokens():
    assert word_layers(Word("x", (0, 2)), [[1, 9, 2], [0, 9, 4]]) == (1.5, 2.0)
