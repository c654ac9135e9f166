"""The results of an evaluation: the complete JSON, and the table for a model card."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from mos_cli.utils.validation import Frozen, Sha256


class Score(Frozen):
    """Share of prompts of a category whose picture passes.

    Attributes:
        raw: of the drawn pictures; `error` is its standard error over `pictures` prompts.
        ceiling: of true scenes of the same descriptions.
        relative: raw divided by ceiling; None if no true scene passes.
    """

    category: str
    pictures: int
    raw: float
    error: float
    ceiling: float
    relative: float | None


class KidScore(Frozen):
    """Distance of the pictures' features to those of true scenes: mean and spread over subsets of this size."""

    mean: float
    spread: float
    subset: int


class Seen(Frozen):
    """One detected object, its centre in picture widths; the style only for style prompts."""

    word: str
    colour: str
    style: str | None
    x: float
    y: float
    score: float


class Verdict(Frozen):
    """One picture: its prompt, whether it passes, and the detections in it."""

    id: str
    prompt: str
    passed: bool
    seen: tuple[Seen, ...]


class Measured(Frozen):
    """The model, the settings and the judge. Tables compare where the hashes of judge, bench and art are equal."""

    model: str
    bundle_hash: Sha256
    judge_hash: Sha256
    bench_hash: Sha256
    art_hash: Sha256
    settings: dict[str, str | int | float | tuple[float, float]]

    @property
    def origin(self) -> str:
        """The same as one line of text."""
        settings = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        hashes = f"Judge {self.judge_hash[:12]}, bench {self.bench_hash[:12]}, art {self.art_hash[:12]}."
        return f"{self.model} ({self.bundle_hash[:12]}), {settings}. {hashes}"


class Evaluation(Measured):
    """The results of an evaluation of drawing."""

    schema_: Literal["mos-eval/1"] = Field(alias="schema")
    scores: tuple[Score, ...]
    kid: KidScore
    verdicts: tuple[Verdict, ...]


def settings_of(common: Mapping[str, Any]) -> dict[str, Any]:
    """The settings for a table, from the fields that all recipes share: those that were set, without the model."""
    settings = {
        name: value for name, value in common.items() if name not in ("model", "negative") and value is not None
    }
    if loras := settings.pop("loras", None):
        settings["loras"] = ", ".join(f"{lora.name}:{lora.scale:g} ({lora.sha256[:12]})" for lora in loras)
    return settings


def score(category: str, passed: list[bool], true_passed: list[bool]) -> Score:
    """The score of one category."""
    raw, ceiling = sum(passed) / len(passed), sum(true_passed) / len(true_passed)
    error = (raw * (1 - raw) / len(passed)) ** 0.5
    return Score(
        category=category,
        pictures=len(passed),
        raw=raw,
        error=error,
        ceiling=ceiling,
        relative=raw / ceiling if ceiling else None,
    )


def overall(scores: Sequence[Score]) -> Score:
    """The mean over the categories, whatever their sizes."""
    raw, ceiling = (sum(getattr(one, name) for one in scores) / len(scores) for name in ("raw", "ceiling"))
    return Score(
        category="all",
        pictures=sum(one.pictures for one in scores),
        raw=raw,
        error=sum(one.error**2 for one in scores) ** 0.5 / len(scores),
        ceiling=ceiling,
        relative=raw / ceiling if ceiling else None,
    )


HEADINGS = ("SceneBench", "pictures", "raw", "ceiling", "relative")


def table(scores: Sequence[Score]) -> list[tuple[str, ...]]:
    """The table's cells, one row per category and one for all."""
    return [
        (
            one.category,
            str(one.pictures),
            f"{one.raw:.2f} ± {one.error:.2f}",
            f"{one.ceiling:.2f}",
            "-" if one.relative is None else f"{one.relative:.2f}",
        )
        for one in scores
    ]


def markdown(evaluation: Evaluation) -> str:
    """The table with its settings and hashes, for a model card."""
    kid = evaluation.kid
    return f"""{markdown_table(HEADINGS, table(evaluation.scores))}

KID {kid.mean:.4f} ± {kid.spread:.4f} against true scenes (EfficientNet-Lite0 features, subsets of {kid.subset}).

{evaluation.origin}
"""


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [headings, ("---", *["---:"] * (len(headings) - 1)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
