"""Training the judge: sprites of every art set at random places on the canvas, augmented.

The scenes have neither the layouts nor the one style per picture of the generator's training data, and more art sets,
so that the judge learns only appearances. It learns colours from painted things; for others it predicts the most
similar paint, so that an unpainted banana is yellow.

Shapes: B pictures, K classified cells of a picture, V sprites, H x W = 128.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mos_cli.datasets.art.file import Art
from mos_cli.datasets.scenes.backgrounds import PAINTS, SCENERIES, Background
from mos_cli.datasets.scenes.compositor import Compositor
from mos_cli.datasets.scenes.layout import Placed, Scene
from mos_cli.datasets.scenes.vocabulary import COLOURS, RGB
from mos_cli.datasets.tables import DataTable
from mos_cli.evaluation.augment import TURN, degraded, turned, turned_point
from mos_cli.evaluation.judge import CELLS, SIDE, JudgeConfig, JudgeNet, save_judge
from mos_cli.utils.devices import choose_device, choose_precision

MOST_OBJECTS = 5
AROUND = [(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)]
"""The centre's cell and its neighbours, all of which are trained to classify the object."""
IGNORED = -100
"""The label of what is not trained."""
SPREAD = 1.2
"""Standard deviation of the Gaussian target of a centre, in cells."""


@dataclass(frozen=True)
class Sprites:
    """The sprites for training, uint8 [V, H, W, 4], and their words and styles.

    Attributes:
        pictures: for each word, the style (a number) and the row of every sprite of it. Numbers beyond the styles of
            `config` are art sets that are not styles of the judge.
    """

    config: JudgeConfig
    sprites_VHW4: Tensor
    pictures: tuple[dict[int, int], ...]


@dataclass(frozen=True)
class LabelledScene:
    """A scene with the labels of its objects: word, colour and style as numbers, or IGNORED."""

    scene: Scene
    labels: tuple[tuple[int, int, int], ...]


def load_sprites(art: Art, data: DataTable) -> Sprites:
    """The sprites of the recipe's words in all styles of the art file, also those that the recipe leaves out."""
    others = sorted({picture.style for picture in art.manifest.pictures} - set(data.styles))
    found = {(picture.name, picture.style): picture.index for picture in art.manifest.pictures}
    pictures, rows = [], []
    for word in data.words:
        styles = [number for number, style in enumerate((*data.styles, *others)) if (word, style) in found]
        pictures.append({style: len(rows) + index for index, style in enumerate(styles)})
        rows += [found[word, (*data.styles, *others)[style]] for style in styles]
    config = JudgeConfig(words=tuple(data.words), colours=tuple(COLOURS), styles=data.styles)
    return Sprites(config, art.pixels[rows], tuple(pictures))


def random_scene(sprites: Sprites, random: Random) -> LabelledScene:
    """Up to five objects at random places, in random sizes, styles and colours, with little overlap."""
    count = random.choice((1, 1, 1, 2, 2, 3, 4, 5))
    one_style = random.randrange(len(sprites.config.styles)) if random.random() < 0.5 else None
    words = random.sample(range(len(sprites.pictures)), count)
    if random.random() < 0.4:
        words = words[:1] * count
    spots: list[tuple[float, float, float]] = []
    placed, labels = [], []
    for word in words:
        style = random.choice(list(sprites.pictures[word])) if one_style is None else one_style
        x, y, side = _spot(count, spots, random)
        spots.append((x, y, side))
        colour, tint = IGNORED, None
        if random.random() < 0.5:
            colour = random.randrange(len(sprites.config.colours))
            tint = _varied(COLOURS[sprites.config.colours[colour]][0], random)
        placed.append(Placed(sprites.pictures[word][style], x, y, side, tint))
        labels.append((word, colour, style if style < len(sprites.config.styles) else IGNORED))
    return LabelledScene(Scene(tuple(placed), _background(random)), tuple(labels))


def _spot(count: int, taken: list[tuple[float, float, float]], random: Random) -> tuple[float, float, float]:
    """Centre and side of the next object, smaller and smaller until there is space for it."""
    side = random.uniform(0.32, 1.0) if count == 1 else random.uniform(0.22, 0.62 if count == 2 else 0.48)
    while True:
        for _ in range(20):
            # A sprite may reach a little beyond the canvas.
            margin = 0.46 * side
            x, y = random.uniform(margin, 1 - margin), random.uniform(margin, 1 - margin)
            if all(math.hypot(x - u, y - v) > 0.42 * (side + other) for u, v, other in taken):
                return x, y, side
        side *= 0.85


def _varied(colour: RGB, random: Random) -> RGB:
    return tuple(min(1.0, max(0.0, value + random.uniform(-0.05, 0.05))) for value in colour)  # type: ignore[return-value]


def _background(random: Random) -> Background:
    """White, a named paint, a scenery, or two random colours."""
    kind = random.random()
    if kind < 0.25:
        return Background(PAINTS["white"], PAINTS["white"])
    if kind < 0.5:
        paint = random.choice(list(PAINTS.values()))
        return Background(paint, paint)
    if kind < 0.65:
        return random.choice(list(SCENERIES.values()))[0]
    top, bottom = ((random.random(), random.random(), random.random()) for _ in range(2))
    return Background(top, bottom, random.uniform(0.4, 0.8) if random.random() < 0.3 else None)


@dataclass(frozen=True)
class JudgeBatch:
    """Augmented pictures [B, 3, H, W], and the targets of the judge.

    Attributes:
        centres: [B, cells, cells]; 1 at an object's centre, a Gaussian around it.
        cells: [B, K] numbers of the cells around the centres; `words`, `colours`, `styles` [B, K] are their labels.
    """

    pictures: Tensor
    centres: Tensor
    cells: Tensor
    words: Tensor
    colours: Tensor
    styles: Tensor


class JudgeBatches(Dataset):
    """A batch for every step; it depends only on the seed and the step's number."""

    def __init__(self, sprites: Sprites, batch: int, steps: int, seed: int) -> None:
        self.sprites, self.batch, self.steps, self.seed = sprites, batch, steps, seed
        self.compositor = Compositor(sprites.sprites_VHW4)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> JudgeBatch:
        random = Random(f"judge/{self.seed}/{step}")
        generator = torch.Generator().manual_seed(random.getrandbits(63))
        scenes = [random_scene(self.sprites, random) for _ in range(self.batch)]
        angles = [random.uniform(-TURN, TURN) if random.random() < 0.7 else 0.0 for _ in scenes]
        pictures = turned(self.compositor.draw([one.scene for one in scenes], SIDE), torch.tensor(angles))
        return JudgeBatch(degraded(pictures, generator), *_targets(scenes, angles))


def _targets(scenes: list[LabelledScene], angles: list[float]) -> tuple[Tensor, ...]:
    middles = (torch.arange(CELLS) + 0.5)[None]
    columns = MOST_OBJECTS * len(AROUND)
    centres = torch.zeros(len(scenes), CELLS, CELLS)
    cells = torch.zeros(len(scenes), columns, dtype=torch.long)
    labels = torch.full((3, len(scenes), columns), IGNORED)
    for row, (one, angle) in enumerate(zip(scenes, angles, strict=True)):
        column = 0
        for placed, what in zip(one.scene.objects, one.labels, strict=True):
            x, y = (CELLS * value for value in turned_point(placed.x, placed.y, angle))
            # Centred on the cell's middle, so that exactly one cell has the value 1.
            across, down = (min(CELLS - 1, max(0, int(value))) for value in (x, y))
            distance = (middles - across - 0.5).square() + (middles.T - down - 0.5).square()
            centres[row] = torch.maximum(centres[row], (-distance / (2 * SPREAD**2)).exp())
            for right, below in AROUND:
                if 0 <= across + right < CELLS and 0 <= down + below < CELLS:
                    cells[row, column] = (down + below) * CELLS + across + right
                    labels[:, row, column] = torch.tensor(what)
                    column += 1
    return centres, cells, *labels


def judge_loss(net: JudgeNet, batch: JudgeBatch, *, bfloat16: bool) -> Tensor:
    """CenterNet's focal loss on the centres (arXiv 1904.07850, eq. 1) and cross entropies of the classes."""
    with torch.autocast(batch.pictures.device.type, torch.bfloat16, enabled=bfloat16):
        logits, levels = net(batch.pictures.contiguous(memory_format=torch.channels_last))
        rows = torch.arange(len(batch.cells), device=batch.cells.device)[:, None].expand_as(batch.cells)
        cells = batch.cells.flatten()
        named = net.name(levels, rows.flatten(), cells // CELLS, cells % CELLS)
    logits, at_centre = logits.float(), batch.centres == 1
    sure = logits.sigmoid()
    hit = at_centre * (1 - sure).square() * F.logsigmoid(logits)
    miss = ~at_centre * (1 - batch.centres).pow(4) * sure.square() * F.logsigmoid(-logits)
    focal = -(hit + miss).sum() / at_centre.sum()
    targets = (batch.words, batch.colours, batch.styles)
    weights = (1.0, 0.5, 1.0)
    # Summed and divided here, because the mean of a batch with only ignored labels is NaN.
    return focal + sum(
        weight
        * F.cross_entropy(logits.float(), target.flatten(), ignore_index=IGNORED, reduction="sum")
        / (target != IGNORED).sum().clamp_min(1)
        for weight, logits, target in zip(weights, named, targets, strict=True)
    )


def train_judge(
    sprites: Sprites,
    folder: Path,
    *,
    steps: int = 4000,
    batch: int = 32,
    learning_rate: float = 3e-3,
    seed: int = 0,
    log: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Trains a judge from scratch and writes it to `folder`; `log` is called with each step and its loss."""
    device = choose_device("auto")
    bfloat16 = choose_precision(device) == "bf16"
    torch.manual_seed(seed)
    net = JudgeNet(sprites.config).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(net.parameters(), weight_decay=0.02, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=steps, pct_start=0.1)
    # One worker draws while the network learns.
    batches = DataLoader(JudgeBatches(sprites, batch, steps, seed), batch_size=None, num_workers=1, prefetch_factor=4)
    for step, drawn in enumerate(batches, start=1):
        on_device = JudgeBatch(**{name: value.to(device) for name, value in vars(drawn).items()})
        loss = judge_loss(net, on_device, bfloat16=bfloat16)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        log(step, float(loss.detach()))
    save_judge(net, sprites.config, folder)
