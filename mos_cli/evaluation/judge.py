"""The judge: a small detector of objects, their words and colours.

It is trained on true scenes only (see judge_training) and scores SceneBench and EditBench.

Shapes: B pictures, H x W = 128, h x w = 32 cells of 4 pixels, N cells that are classified.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors.torch import load_file, save
from torch import Tensor, nn

from mos_cli.bundles.sources import bad_file
from mos_cli.errors import ModelError
from mos_cli.utils.files import atomic_write
from mos_cli.utils.folders import models_folder
from mos_cli.utils.validation import Frozen, Sha256, read_json

SIDE = 128
"""Side of the judge's input, in pixels; other pictures are scaled to it."""
CELLS = 32
THRESHOLD = 0.2
"""Least score of a detection."""
INDEX, WEIGHTS = "judge.json", "judge.safetensors"


class JudgeConfig(Frozen):
    """The classes of the judge, and the sizes of its network: channels at each scale, and width of the classifier."""

    words: tuple[str, ...]
    colours: tuple[str, ...]
    styles: tuple[str, ...]
    widths: tuple[int, int, int, int] = (48, 96, 176, 176)
    hidden: int = 256


class JudgeIndex(Frozen):
    """The content of judge.json; `sha256` is that of the weights and identifies the judge in tables."""

    schema_: Literal["mos-judge/1"] = Field(alias="schema")
    sha256: Sha256
    config: JudgeConfig


@dataclass(frozen=True)
class Detection:
    """One detected object: its word, its centre in picture widths (x right, y down), and a score in 0..1.

    `colour` is the most similar paint, whether it is painted or not; `style` is set where styles were compared.
    """

    word: str
    colour: str
    x: float
    y: float
    score: float
    style: str | None = None


class JudgeNet(nn.Module):
    """Convolutions at 1/4 to 1/32 of the picture: whether a cell is an object's centre, and the class of the object.

    The scales are merged to find centres. Few cells are classified, so the classifier can use the features of all
    scales and the mean of the coarsest.
    """

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        small, middle, large, largest = config.widths
        self.class_counts = [len(config.words), len(config.colours), len(config.styles)]
        self.stem = nn.Sequential(nn.Conv2d(3, small, 5, 4, 2, bias=False), nn.BatchNorm2d(small), nn.ReLU())
        self.stages = nn.ModuleList(
            [
                _Block(small, small, 1),
                nn.Sequential(_Block(small, middle, 2), _Block(middle, middle, 1)),
                nn.Sequential(_Block(middle, large, 2), _Block(large, large, 1)),
                _Block(large, largest, 2),
            ]
        )
        self.joins = nn.ModuleList([nn.Conv2d(width, small, 1) for width in config.widths])
        self.mix = nn.Sequential(nn.Conv2d(small, small, 3, 1, 1, bias=False), nn.BatchNorm2d(small), nn.ReLU())
        self.centre = nn.Conv2d(small, 1, 1)
        # Most cells have no centre: a low bias makes that the initial prediction.
        nn.init.constant_(self.centre.bias, -4.0)  # type: ignore[arg-type]
        self.what = nn.Sequential(
            nn.Linear(sum(config.widths) + largest, config.hidden),
            nn.ReLU(),
            nn.Linear(config.hidden, sum(self.class_counts)),
        )

    def forward(self, pictures_B3HW: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits of an object's centre [B, h, w], and the features of all scales."""
        x, levels = self.stem(pictures_B3HW), []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        joined = self.joins[-1](levels[-1])
        for level, join in zip(levels[-2::-1], list(self.joins)[-2::-1], strict=True):
            joined = F.interpolate(joined, scale_factor=2.0) + join(level)
        return self.centre(self.mix(joined))[:, 0], levels

    def name(self, levels: list[Tensor], rows_N: Tensor, y_N: Tensor, x_N: Tensor) -> tuple[Tensor, ...]:
        """Logits of words, colours and styles at some cells of some pictures, [N, words], [N, colours], [N, styles].

        Styles are used in training only, for features that distinguish them; see `Judge.features`.
        """
        local = [level[rows_N, :, y_N >> scale, x_N >> scale] for scale, level in enumerate(levels)]
        whole = levels[-1].mean(dim=(2, 3))[rows_N]
        return self.what(torch.cat([*local, whole], dim=1)).split(self.class_counts, dim=1)


class _Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(after)
        self.second = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(after)
        same = before == after and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(inner)) + self.skip(x))


class Judge:
    """A trained judge from its folder; `hash` is the sha256 of its weights.

    Raises:
        ModelError: there is no judge in the folder, or it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / INDEX).is_file():
            raise ModelError(f"there is no judge in {folder}: mos train-judge --output {folder} makes one")
        index = read_json(JudgeIndex, folder / INDEX)
        if problem := bad_file(folder, {WEIGHTS: index.sha256}):
            raise ModelError(f"{problem} in {folder}: `mos train-judge` makes a judge")
        self.hash, self.config = index.sha256, index.config
        self.net = JudgeNet(index.config)
        self.net.load_state_dict(load_file(folder / WEIGHTS))
        self.net.eval().requires_grad_(False)

    @torch.inference_mode()
    def detect(self, pictures_B3HW: Tensor) -> list[tuple[Detection, ...]]:
        """The objects in pictures in -1..1 of any square size, by descending score."""
        return [seen for part in pictures_B3HW.split(64) for seen in self._detect(part)]

    @torch.inference_mode()
    def features(self, pictures_B3HW: Tensor) -> Tensor:
        """The spatial means of the features of all scales, [B, F]."""
        parts = [self._net(part)[1] for part in pictures_B3HW.split(64)]
        return torch.cat([torch.cat([level.mean(dim=(2, 3)) for level in levels], dim=1) for levels in parts])

    def _net(self, pictures_B3HW: Tensor) -> tuple[Tensor, list[Tensor]]:
        if pictures_B3HW.shape[-1] != SIDE:
            pictures_B3HW = F.interpolate(pictures_B3HW, (SIDE, SIDE), mode="bilinear", antialias=True)
        return self.net(pictures_B3HW)

    def _detect(self, pictures_B3HW: Tensor) -> list[tuple[Detection, ...]]:
        logits, levels = self._net(pictures_B3HW)
        centres = logits.sigmoid()
        peaks = (centres == F.max_pool2d(centres[:, None], 5, 1, 2)[:, 0]) & (centres >= THRESHOLD)
        found = peaks.nonzero()
        words, colours, _ = self.net.name(levels, *found.unbind(dim=1))
        sure, word = words.softmax(dim=1).max(dim=1)
        seen: list[list[Detection]] = [[] for _ in pictures_B3HW]
        for index, (row, y, x) in enumerate(found.tolist()):
            score = float(sure[index] * centres[row, y, x])
            if score >= THRESHOLD:
                seen[row].append(
                    Detection(
                        word=self.config.words[int(word[index])],
                        colour=self.config.colours[int(colours[index].argmax())],
                        x=(x + 0.5) / CELLS,
                        y=(y + 0.5) / CELLS,
                        score=score,
                    )
                )
        return [tuple(sorted(row, key=lambda detection: -detection.score)) for row in seen]


def judge_folder() -> Path:
    """The folder of the judge in the package."""
    return models_folder() / "judge"


def save_judge(net: JudgeNet, config: JudgeConfig, folder: Path) -> None:
    """Writes a judge in half precision, replacing an earlier one."""
    weights = {
        name: (value.half() if value.is_floating_point() else value).contiguous().cpu()
        for name, value in net.state_dict().items()
    }
    data = save(weights)
    index = JudgeIndex(schema="mos-judge/1", sha256=hashlib.sha256(data).hexdigest(), config=config)
    atomic_write(folder / WEIGHTS, data, overwrite=True)
    atomic_write(folder / INDEX, (index.model_dump_json(indent=2) + "\n").encode(), overwrite=True)
