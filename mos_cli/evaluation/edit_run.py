"""One evaluation of editing, from bundle to table: draws and judges every edit.

Shapes: B pictures, H x W a picture's size.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import Field

from mos_cli.config.recipe import make_recipe
from mos_cli.datasets.scenes.edits import EDIT_KINDS
from mos_cli.evaluation.edit_examine import EditExaminer, Examined
from mos_cli.evaluation.editbench import FILE, EditEntry
from mos_cli.evaluation.examine import TrueScenes
from mos_cli.evaluation.judge import Judge
from mos_cli.evaluation.results import (
    Measured,
    Score,
    Seen,
    markdown_table,
    overall,
    score,
    settings_of,
    table,
)
from mos_cli.evaluation.run import Advance, drawn_or_kept, square_side, tensor_of
from mos_cli.images.inputs import Inputs, describe_edit
from mos_cli.images.outputs import png
from mos_cli.images.pictures import Picture
from mos_cli.images.sheets import contact_sheet
from mos_cli.inference.pipeline import MoSPipeline
from mos_cli.towers.autoencoder import to_image
from mos_cli.utils.files import atomic_write, sha256_of
from mos_cli.utils.validation import Frozen

ON_SHEET = 2
"""Edits of each kind on the sheet."""


class EditScore(Score):
    """The score of a kind; `outside` is the mean PSNR where nothing may change, in dB, None where everything may."""

    outside: float | None


class EditVerdict(Frozen):
    """One edit: whether it passes, the PSNR outside of it, and the detections in the result."""

    id: str
    instruction: str
    passed: bool
    outside: float | None
    seen: tuple[Seen, ...]


class EditEvaluation(Measured):
    """The results of an evaluation of editing.

    `no_op_error` is the mean difference, in levels of 255, of edits that request no change.
    """

    schema_: Literal["mos-edit-eval/1"] = Field(alias="schema")
    scores: tuple[EditScore, ...]
    no_op_error: float
    verdicts: tuple[EditVerdict, ...]


HEADINGS = ("EditBench", "edits", "raw", "ceiling", "relative", "dB outside")


def evaluate_edits(
    pipeline: MoSPipeline,
    entries: Sequence[EditEntry],
    judge: Judge,
    true: TrueScenes,
    folder: Path,
    common: dict[str, Any],
    image_cfg: float,
    advance: Advance,
) -> EditEvaluation:
    """Draws and judges all edits; writes edit.json, edit.md, a sheet and the pictures to `folder`.

    Pictures in `folder` from an interrupted run of the same bundle and settings are used again.

    Args:
        common: the fields of a recipe that all edits share; width and height are the same.

    Raises:
        InputError: `folder` holds pictures with another recipe.
        ModelError: the judge does not know the bench's words.
        UsageError: the pictures are not square, or a setting is out of range.
    """
    side = square_side(common)
    examiner = EditExaminer(judge, true, entries, side)
    images, befores = [], [to_image(before[None]) for before in examiner.before_B3HW]
    for number, (entry, before) in enumerate(zip(entries, befores, strict=True), start=1):
        inputs = Inputs((Picture(before),))
        edit = describe_edit(inputs, canvas=(side, side), image_cfg=image_cfg, strength=1.0)
        recipe = make_recipe(prompt=entry.instruction, seed=entry.seed, edit=edit, **common)
        images.append(drawn_or_kept(pipeline, recipe, folder / "edits" / f"{entry.id}.png", inputs))
        advance("editing", number, len(entries))
    advance("judging", 0, 1)
    examined = examiner.examine(torch.stack([tensor_of(image) for image in images]))
    evaluation = EditEvaluation(
        schema="mos-edit-eval/1",
        bundle_hash=pipeline.bundle_hash,
        judge_hash=judge.hash,
        bench_hash=sha256_of(FILE),
        art_hash=true.art_hash,
        model=common["model"],
        settings={"image_cfg": image_cfg} | settings_of(common),
        scores=_scores(entries, examined, examiner.ceiling()),
        no_op_error=statistics.mean(one.error for one in examined if one.error is not None),
        verdicts=tuple(
            EditVerdict(
                id=entry.id,
                instruction=entry.instruction,
                passed=one.passed,
                outside=one.outside,
                seen=tuple(Seen(**asdict(what)) for what in one.seen),
            )
            for entry, one in zip(entries, examined, strict=True)
        ),
    )
    files = {
        "edit.json": (evaluation.model_dump_json(by_alias=True, indent=1) + "\n").encode(),
        "edit.md": markdown(evaluation).encode(),
        "edits.png": png(_sheet(entries, befores, images, examined), None),
    }
    for name, data in files.items():
        atomic_write(folder / name, data, overwrite=True)
    advance("judging", 1, 1)
    return evaluation


def rows(evaluation: EditEvaluation) -> list[tuple[str, ...]]:
    """The table's cells, one row per kind and one for all."""
    return [
        (*cells, "-" if one.outside is None else f"{one.outside:.1f}")
        for cells, one in zip(table(evaluation.scores), evaluation.scores, strict=True)
    ]


def markdown(evaluation: EditEvaluation) -> str:
    """The table with its settings and hashes, for a model card."""
    return f"""{markdown_table(HEADINGS, rows(evaluation))}

Where nothing was to change: {evaluation.no_op_error:.2f} levels of 255 on average.

{evaluation.origin}
"""


def _scores(entries: Sequence[EditEntry], examined: list[Examined], true_passed: list[bool]) -> tuple[EditScore, ...]:
    scores = []
    for kind in EDIT_KINDS:
        chosen = [row for row, entry in enumerate(entries) if entry.kind == kind]
        counted = score(kind, [examined[row].passed for row in chosen], [true_passed[row] for row in chosen])
        scores.append(EditScore(**counted.model_dump(), outside=_mean(examined[row].outside for row in chosen)))
    everything = overall(scores).model_dump()
    return (*scores, EditScore(**everything, outside=_mean(one.outside for one in examined)))


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def _sheet(
    entries: Sequence[EditEntry], befores: list[Image.Image], images: list[Image.Image], examined: list[Examined]
) -> Image.Image:
    """Some edits of every kind, before and after, with the verdict."""
    shown = []
    for kind in EDIT_KINDS:
        for row in [row for row, entry in enumerate(entries) if entry.kind == kind][:ON_SHEET]:
            verdict = "PASS" if examined[row].passed else "FAIL"
            shown += [(befores[row], kind), (images[row], f"{verdict}: {entries[row].instruction}")]
    return contact_sheet(shown)
