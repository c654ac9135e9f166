"""One evaluation, from bundle to table: draws and judges every prompt, and true scenes of the same descriptions.

Shapes: B pictures, H x W a picture's size, F features.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mos_cli.config.recipe import Recipe, make_recipe
from mos_cli.errors import InputError, UsageError
from mos_cli.evaluation.examine import Examiner, TrueScenes
from mos_cli.evaluation.features import features_of
from mos_cli.evaluation.judge import Judge
from mos_cli.evaluation.kid import kid
from mos_cli.evaluation.results import (
    Evaluation,
    KidScore,
    Score,
    Seen,
    Verdict,
    markdown,
    overall,
    score,
    settings_of,
)
from mos_cli.evaluation.scenebench import CATEGORIES, FILE, Entry
from mos_cli.images.inputs import Inputs
from mos_cli.images.outputs import png, read_drawing
from mos_cli.images.sheets import COLUMNS, contact_sheet
from mos_cli.inference.pipeline import MoSPipeline
from mos_cli.utils.files import atomic_write, sha256_of

CHECKED = 50
"""The number of pictures on the sheet for checking the judge by eye."""

Advance = Callable[[str, int, int], None]
"""Called with a description, the number of items done and the total."""


@dataclass(frozen=True)
class Bench:
    """The tools of an evaluation: the prompts, the judge, the network of KID's features, and true scenes."""

    entries: tuple[Entry, ...]
    judge: Judge
    features: nn.Module
    true: TrueScenes


def evaluate(pipeline: MoSPipeline, bench: Bench, folder: Path, common: dict[str, Any], advance: Advance) -> Evaluation:
    """Draws and judges all prompts; writes eval.json, eval.md, two sheets and the pictures to `folder`.

    Pictures in `folder` from an interrupted run of the same bundle and settings are used again.

    Args:
        common: the fields of a recipe that all pictures share; width and height are the same.

    Raises:
        InputError: `folder` holds pictures with another recipe.
        ModelError: the judge does not know the bench's words.
        UsageError: the pictures are not square, as the true scenes are.
    """
    examiner = Examiner(bench.judge, bench.true, bench.entries, square_side(common))
    images = []
    for number, entry in enumerate(bench.entries, start=1):
        recipe = make_recipe(prompt=entry.prompt, seed=entry.seed, **common)
        images.append(drawn_or_kept(pipeline, recipe, folder / "pictures" / f"{entry.id}.png"))
        advance("drawing", number, len(bench.entries))
    pictures = torch.stack([tensor_of(image) for image in images])
    advance("judging", 0, 2)
    seen, passed = examiner.examine(pictures)
    true_passed = examiner.ceiling()
    advance("judging", 1, 2)
    true_pictures = bench.true.draw(bench.entries, common["width"], take=0)
    distance = kid(features_of(bench.features, pictures), features_of(bench.features, true_pictures))
    evaluation = Evaluation(
        schema="mos-eval/1",
        bundle_hash=pipeline.bundle_hash,
        judge_hash=bench.judge.hash,
        bench_hash=sha256_of(FILE),
        art_hash=bench.true.art_hash,
        model=common["model"],
        settings=settings_of(common),
        scores=scores(bench.entries, passed, true_passed),
        kid=KidScore(**asdict(distance)),
        verdicts=tuple(
            Verdict(id=entry.id, prompt=entry.prompt, passed=ok, seen=tuple(Seen(**asdict(one)) for one in what))
            for entry, ok, what in zip(bench.entries, passed, seen, strict=True)
        ),
    )
    _write(evaluation, images, bench.entries, folder)
    advance("judging", 2, 2)
    return evaluation


def square_side(common: dict[str, Any]) -> int:
    """The side of the pictures in pixels; raises UsageError if they are not square."""
    if common["width"] != common["height"]:
        raise UsageError(f"true scenes are square: {common['width']}x{common['height']} cannot be compared with them")
    return common["width"]


def scores(entries: Sequence[Entry], passed: list[bool], true_passed: list[list[bool]]) -> tuple[Score, ...]:
    """One score per category, and one for all."""
    counted = []
    for category in CATEGORIES:
        rows = [index for index, entry in enumerate(entries) if entry.category == category]
        true = [ok for row in rows for ok in true_passed[row]]
        counted.append(score(category, [passed[row] for row in rows], true))
    return (*counted, overall(counted))


def drawn_or_kept(pipeline: MoSPipeline, recipe: Recipe, path: Path, inputs: Inputs | None = None) -> Image.Image:
    """The picture at `path` if it is this one, else draws and writes it."""
    if path.exists():
        image, record = read_drawing(path)
        if record.recipe != recipe or record.made.bundle_hash != pipeline.bundle_hash:
            raise InputError(f"{path} was made by another bundle or with other settings: choose another --output")
        return image
    drawing = pipeline.draw(recipe, inputs=inputs)
    atomic_write(path, png(drawing.image, drawing.record))
    return drawing.image


def tensor_of(image: Image.Image) -> Tensor:
    """[3, H, W] in -1..1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


def _write(evaluation: Evaluation, images: list[Image.Image], entries: Sequence[Entry], folder: Path) -> None:
    """Writes the numbers, a sheet with the first pictures of each category, and one with verdicts to check by eye."""
    indices = {category: [i for i, e in enumerate(entries) if e.category == category] for category in CATEGORIES}
    first = [row for rows in indices.values() for row in rows[:COLUMNS]]
    checked = sorted(Random(0).sample(range(len(entries)), min(CHECKED, len(entries))))
    verdicts = [f"{'PASS' if verdict.passed else 'FAIL'}: {verdict.prompt}" for verdict in evaluation.verdicts]
    files = {
        "eval.json": (evaluation.model_dump_json(by_alias=True, indent=1) + "\n").encode(),
        "eval.md": markdown(evaluation).encode(),
        "sheet.png": png(contact_sheet([(images[row], entries[row].prompt) for row in first]), None),
        "check.png": png(contact_sheet([(images[row], verdicts[row]) for row in checked]), None),
    }
    for name, data in files.items():
        atomic_write(folder / name, data, overwrite=True)
