"""SceneBench: prompts in seven categories, of combinations held out of training.

The prompts are fixed in scenebench.jsonl. Evaluations name the hash of this file, so it keeps the field names of
version 0.1.0; `python -m mos_cli.evaluation.scenebench` writes the same prompts with the present names.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any, Literal, get_args

import torch

from mos_cli.datasets.scenes.backgrounds import PAINTS
from mos_cli.datasets.scenes.captions import caption
from mos_cli.datasets.scenes.description import (
    DEFAULT_STYLE,
    Description,
    Thing,
    held_out,
    held_out_style,
)
from mos_cli.datasets.scenes.vocabulary import COLOURS, Vocabulary, VocabularyWord
from mos_cli.datasets.tables import DataTable, with_words
from mos_cli.utils.files import atomic_write
from mos_cli.utils.folders import presets_folder
from mos_cli.utils.validation import Frozen, read_toml

Category = Literal["single", "two", "counting", "colour", "position", "binding", "style"]
CATEGORIES: tuple[Category, ...] = get_args(Category)
RECIPE = "train-emoji-s"
"""The recipe whose words and styles the prompts use."""
PER_CATEGORY = 100
FILE = Path(__file__).with_name("scenebench.jsonl")


class Entry(Frozen):
    """One prompt, the description that its picture must match, and the seed that it is drawn with."""

    id: str
    category: Category
    seed: int
    prompt: str
    description: Description


def read_bench(limit: int | None = None) -> tuple[Entry, ...]:
    """The prompts of SceneBench, by category; the first `limit` of each if given."""
    entries = [Entry.model_validate_json(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    ranks: dict[str, int] = {}
    kept = []
    for entry in entries:
        ranks[entry.category] = ranks.get(entry.category, 0) + 1
        if limit is None or ranks[entry.category] <= limit:
            kept.append(entry)
    return tuple(kept)


def bench_data() -> DataTable:
    """The words and styles the prompts use."""
    table = read_toml(presets_folder() / f"{RECIPE}.toml")
    return DataTable.model_validate(with_words(table["data"], presets_folder()))


def bench_words() -> Vocabulary:
    """The vocabulary of the prompts, without sprites."""
    data = bench_data()
    words = {word: VocabularyWord(names, dict.fromkeys(data.styles, 0)) for word, names in data.words.items()}
    return Vocabulary(words, data.styles, torch.empty(0))


def make_bench(vocabulary: Vocabulary, count: int = PER_CATEGORY) -> tuple[Entry, ...]:
    """`count` different prompts of every category, always the same ones."""
    entries = []
    for category in CATEGORIES:
        random = Random(f"scenebench/{category}")
        prompts: dict[str, Description] = {}
        for description in _descriptions(category, vocabulary, random):
            prompts.setdefault(caption(description, vocabulary, random), description)
            if len(prompts) == count:
                break
        entries += [
            Entry(
                id=f"{category}-{number:03d}",
                category=category,
                seed=len(entries) + number,
                prompt=prompt,
                description=description,
            )
            for number, (prompt, description) in enumerate(prompts.items())
        ]
    return tuple(entries)


def bench_text(entries: Sequence[Frozen]) -> str:
    """The entries of a bench as JSON lines, without default values."""
    lines = [json.dumps(entry.model_dump(exclude_defaults=True), ensure_ascii=False) for entry in entries]
    return "\n".join(lines) + "\n"


def _descriptions(category: Category, vocabulary: Vocabulary, random: Random) -> Iterator[Description]:
    words = list(vocabulary.words)
    countable = [word for word in words if vocabulary.words[word].names_for(counted=True, painted=False)]
    paintable = [word for word in words if vocabulary.words[word].names_for(counted=False, painted=True)]
    pairs = [pair for pair in combinations(words, 2) if held_out(*pair)]
    painted_pairs = [pair for pair in pairs if set(pair) <= set(paintable)]
    styled = [(word, s) for word in words for s in vocabulary.styles if held_out_style(word, s)]

    def two(pair: tuple[str, str], *colours: str) -> tuple[Thing, ...]:
        """Held-out pairs are sorted: either may come first."""
        painted = colours or (None, None)
        return tuple(Thing(word=w, colour=c) for w, c in zip(random.sample(pair, 2), painted, strict=True))

    makers: dict[Category, tuple[list, Callable[[Any], dict]]] = {
        "single": (words, lambda word: {"things": (Thing(word=word),)}),
        "two": (pairs, lambda pair: {"things": two(pair)}),
        "counting": (countable, lambda word: {"things": (Thing(word=word, count=random.randint(2, 4)),)}),
        "colour": (paintable, lambda word: {"things": (Thing(word=word, colour=random.choice(list(COLOURS))),)}),
        "position": (
            pairs,
            lambda pair: {"things": two(pair), "relation": random.choice(("left", "right", "above", "below"))},
        ),
        "binding": (painted_pairs, lambda pair: {"things": two(pair, *random.sample(list(COLOURS), 2))}),
        "style": (styled, lambda key: {"things": (Thing(word=key[0]),), "style": key[1], "style_named": True}),
    }
    subjects, make = makers[category]
    while True:
        for subject in random.sample(subjects, len(subjects)):
            fields = {"style": DEFAULT_STYLE, "style_named": False, **make(subject)}
            yield Description(**fields, background=_background(fields["things"], random))


def _background(things: tuple[Thing, ...], random: Random) -> str | None:
    """White (None), or a plain background in which no painted thing is invisible."""
    colours = {thing.colour for thing in things if thing.colour}
    if random.random() < 0.5 and "white" not in colours:
        return None
    return random.choice([paint for paint in PAINTS if not any(colour in paint for colour in colours)])


if __name__ == "__main__":
    atomic_write(FILE, bench_text(make_bench(bench_words())).encode(), overwrite=True)
