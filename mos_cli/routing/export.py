"""Exporting a recording as a table with one row per decision, in parquet or csv.

Shapes: S steps, J generation blocks, T context tokens, K kept layers, M understanding layers.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mos_cli.errors import UsageError
from mos_cli.routing.analysis import Word
from mos_cli.routing.section import Section
from mos_cli.utils.files import atomic_file, refuse_existing

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".parquet", ".csv")


def decisions_table(section: Section, words: Sequence[Word]) -> "pa.Table":
    """The decisions of a section for the tokens of `words`, ordered by step, block and token.

    Columns: branch, step, t, block, token (its number), token_text, word, nth (its occurrence, from 1), kind ("word",
    "picture" or "special"), then for each kept layer, the strongest first, layer_1, weight_1, layer_2 and so on (in
    traces of base models layer_1, slot_1, weight_1), and where the trace has them the router's probability of every
    layer, before any rule, by its name: probability_layer_3.

    Raises:
        InputError: the trace holds a summary only.
    """
    import pyarrow as pa

    routes, branch = section.decisions, section.branch
    tokens = sorted(token for word in words for token in word.tokens)
    word_of = {token: word for word in words for token in word.tokens}
    ids_SJTK, weights_SJTK = routes.ids_SJTK[:, :, tokens], routes.weights_SJTK[:, :, tokens]
    steps, blocks, _, kept = ids_SJTK.shape
    held, rows = len(tokens), ids_SJTK[..., 0].size

    def named(per_token: Iterable[str | int]) -> "pa.Array":
        return pa.array(per_token).take(pa.array(np.tile(np.arange(held), steps * blocks)))

    columns = {
        "branch": pa.repeat(section.name, rows),
        "step": np.repeat(np.array(section.steps, np.int32), blocks * held),
        "t": np.repeat(np.array(section.times), blocks * held),
        "block": np.tile(np.repeat(np.array(section.blocks, np.int32), held), steps),
        "token": np.tile(np.array(tokens, np.int32), steps * blocks),
        "token_text": named([branch.tokens[token].text for token in tokens]),
        "word": named([word_of[token].text for token in tokens]),
        "nth": named([word_of[token].nth for token in tokens]),
        "kind": named([_kind(section, word_of[token]) for token in tokens]),
    }
    for k in range(kept):
        columns[f"layer_{k + 1}"] = ids_SJTK[..., k].ravel()
        if routes.slots_SJTK is not None:
            columns[f"slot_{k + 1}"] = routes.slots_SJTK[:, :, tokens, k].ravel()
        # fp32, which holds every fp16 exactly: csv knows no fp16, and few readers of parquet do.
        columns[f"weight_{k + 1}"] = weights_SJTK[..., k].ravel().astype(np.float32)
    if routes.probabilities_SJTM is not None:
        for layer, name in enumerate(section.layers):
            probabilities = routes.probabilities_SJTM[:, :, tokens, layer].ravel().astype(np.float32)
            columns[f"probability_{name.replace(' ', '_')}"] = probabilities
    return pa.table(columns)


def export_decisions(sections: Sequence[tuple[Section, Sequence[Word]]], path: Path, overwrite: bool = False) -> None:
    """Writes `decisions_table` of each section, one after the other, to a .parquet or a .csv file.

    Raises:
        UsageError: the name has another suffix, or pyarrow is not installed.
        InputError: the trace holds a summary only, or the file exists and `overwrite` is false, or cannot be written.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"cannot export to {path}: name it .parquet or .csv")
    try:
        import pyarrow as pa
        from pyarrow import csv, parquet
    except ImportError:
        raise UsageError("exporting routes needs pyarrow: pip install 'mos-cli[inspect]'") from None
    refuse_existing(path, overwrite)
    table = pa.concat_tables(decisions_table(section, words) for section, words in sections)
    with atomic_file(path, overwrite) as temporary:
        if path.suffix.lower() == ".csv":
            csv.write_csv(table, temporary)
        else:
            parquet.write_table(table, temporary)


def _kind(section: Section, word: Word) -> str:
    if word.special:
        return "special"
    return "word" if section.branch.tokens[word.tokens[0]].patch is None else "picture"
