"""EditBench: edits of every kind, with the pictures before and after, of pairs of things held out of training.

The edits are fixed in editbench.jsonl. Evaluations name the hash of this file, so it keeps the field names of
version 0.1.0; `python -m mos_cli.evaluation.editbench` writes the same edits with the present names.
"""

from pathlib import Path
from random import Random
from typing import Annotated

from pydantic import BeforeValidator

from mos_cli.datasets.scenes.composition import Composition
from mos_cli.datasets.scenes.edits import EDIT_KINDS, EditKind, EditWriter
from mos_cli.datasets.scenes.vocabulary import Vocabulary
from mos_cli.evaluation.scenebench import bench_text, bench_words
from mos_cli.utils.files import atomic_write
from mos_cli.utils.migration import current_fields
from mos_cli.utils.validation import Frozen

PER_KIND = 40
FILE = Path(__file__).with_name("editbench.jsonl")


class EditEntry(Frozen):
    """One edit and the seed that it is drawn with. The expected result follows from `before` and `after`."""

    id: str
    kind: EditKind
    seed: int
    instruction: str
    before: Annotated[Composition, BeforeValidator(current_fields)]
    after: Annotated[Composition, BeforeValidator(current_fields)]


def read_edit_bench(limit: int | None = None) -> tuple[EditEntry, ...]:
    """The edits by kind; the first `limit` of each if given."""
    entries = [EditEntry.model_validate_json(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    groups = [[entry for entry in entries if entry.kind == kind] for kind in EDIT_KINDS]
    return tuple(entry for group in groups for entry in group[:limit])


def make_edit_bench(vocabulary: Vocabulary, count: int = PER_KIND) -> tuple[EditEntry, ...]:
    """`count` edits of every kind, always the same ones."""
    writer, entries = EditWriter(vocabulary, held_out_pairs=True), []
    for kind in EDIT_KINDS:
        random = Random(f"editbench/{kind}")
        for number in range(count):
            edit = writer.write(random, kind)
            entries.append(
                EditEntry(
                    id=f"{kind.replace(' ', '-')}-{number:03d}",
                    kind=kind,
                    seed=len(entries),
                    instruction=edit.instruction,
                    before=edit.was,
                    after=edit.now,
                )
            )
    return tuple(entries)


if __name__ == "__main__":
    atomic_write(FILE, bench_text(make_edit_bench(bench_words())).encode(), overwrite=True)
