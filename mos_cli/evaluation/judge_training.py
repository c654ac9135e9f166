"""Trains the judge: true pictures of every art set, strewn over the canvas as no prompt would have them, and spoilt.

Its scenes have nothing of the layouts, the single hand per picture and the cleanness that the generator learns from,
and more art sets, so that the judge knows a thing by its looks alone. It learns colours from painted things only: asked
for the colour of another it says the likest one, and a banana that is yellow by nature is a yellow banana.

Shapes: B pictures, K cells looked at in a picture, V sprites, H x W = 128.
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

MOST_STREWN = 5
AROUND = [(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)]
"""Cells, beside that of the centre, which have to know the object as well."""
IGNORED = -100
"""What is not asked."""
SPREAD = 1.2
"""Width of the bump that marks a centre, in cells."""


@dataclass(frozen=True)
class Sprites:
    """What a judge learns from: sprites uint8 [V, H, W, 4], and where those of each word are.

    Attributes:
        pictures: for each word, the style (a number) and the row of every sprite of it. Numbers beyond the styles of
            `config` are art sets whose hand the judge need not tell.
    """

    config: JudgeConfig
    sprites_VHW4: Tensor
    pictures: tuple[dict[int, int], ...]


@dataclass(frozen=True)
class Strewn:
    """Objects on a canvas with what the judge should say of each: word, colour and style as numbers, or IGNORED."""

    scene: Scene
    said: tuple[tuple[int, int, int], ...]


def load_sprites(art: Art, data: DataTable) -> Sprites:
    """The recipe's words in all styles of the art file, those the generator does not learn included."""
    others = sorted({picture.style for picture in art.manifest.pictures} - set(data.styles))
    found = {(picture.name, picture.style): picture.index for picture in art.manifest.pictures}
    pictures, rows = [], []
    for word in data.words:
        styles = [number for number, style in enumerate((*data.styles, *others)) if (word, style) in found]
        pictures.append({style: len(rows) + index for index, style in enumerate(styles)})
        rows += [found[word, (*data.styles, *others)[style]] for style in styles]
    config = JudgeConfig(words=tuple(data.words), colours=tuple(COLOURS), styles=data.styles)
    return Sprites(config, art.pixels[rows], tuple(pictures))


def strew(sprites: Sprites, random: Random) -> Strewn:
    """Up to five objects anywhere, in any sizes, hands and colours; at most a little of one is hidden by another."""
    count = random.choice((1, 1, 1, 2, 2, 3, 4, 5))
    one_style = random.randrange(len(sprites.config.styles)) if random.random() < 0.5 else None
    words = random.sample(range(len(sprites.pictures)), count)
    if random.random() < 0.4:
        words = words[:1] * count
    spots: list[tuple[float, float, float]] = []
    placed, said = [], []
    for word in words:
        style = random.choice(list(sprites.pictures[word])) if one_style is None else one_style
        x, y, side = _spot(count, spots, random)
        spots.append((x, y, side))
        colour, tint = IGNORED, None
        if random.random() < 0.5:
            colour = random.randrange(len(sprites.config.colours))
            tint = _varied(COLOURS[sprites.config.colours[colour]][0], random)
        placed.append(Placed(sprites.pictures[word][style], x, y, side, tint))
        said.append((word, colour, style if style < len(sprites.config.styles) else IGNORED))
    return Strewn(Scene(tuple(placed), _background(random)), tuple(said))


def _spot(count: int, taken: list[tuple[float, float, float]], random: Random) -> tuple[float, float, float]:
    """Centre and side of the next object; it shrinks until it finds room."""
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
    """White, a named paint, a scenery, or any two colours at all."""
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
    """Spoilt pictures [B, 3, H, W], and what the judge should say of them.

    Attributes:
        centres: [B, cells, cells]; 1 at an object's centre, falling off around it.
        cells: [B, K] numbers of the cells around the centres; `words`, `colours`, `styles` [B, K] say what is there.
    """

    pictures: Tensor
    centres: Tensor
    cells: Tensor
    words: Tensor
    colours: Tensor
    styles: Tensor


class JudgeBatches(Dataset):
    """Step number in, batch out; the same step always gives the same batch."""

    def __init__(self, sprites: Sprites, batch: int, steps: int, seed: int) -> None:
        self.sprites, self.batch, self.steps, self.seed = sprites, batch, steps, seed
        self.compositor = Compositor(sprites.sprites_VHW4)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> JudgeBatch:
        random = Random(f"judge/{self.seed}/{step}")
        generator = torch.Generator().manual_seed(random.getrandbits(63))
        strewn = [strew(self.sprites, random) for _ in range(self.batch)]
        angles = [random.uniform(-TURN, TURN) if random.random() < 0.7 else 0.0 for _ in strewn]
        pictures = turned(self.compositor.draw([one.scene for one in strewn], SIDE), torch.tensor(angles))
        return JudgeBatch(degraded(pictures, generator), *_targets(strewn, angles))


def _targets(strewn: list[Strewn], angles: list[float]) -> tuple[Tensor, ...]:
    middles = (torch.arange(CELLS) + 0.5)[None]
    room = MOST_STREWN * len(AROUND)
    centres = torch.zeros(len(strewn), CELLS, CELLS)
    cells = torch.zeros(len(strewn), room, dtype=torch.long)
    said = torch.full((3, len(strewn), room), IGNORED)
    for row, (one, angle) in enumerate(zip(strewn, angles, strict=True)):
        column = 0
        for placed, what in zip(one.scene.objects, one.said, strict=True):
            x, y = (CELLS * value for value in turned_point(placed.x, placed.y, angle))
            # The bump is drawn around the cell's middle, so that exactly one cell is the centre.
            across, down = (min(CELLS - 1, max(0, int(value))) for value in (x, y))
            distance = (middles - across - 0.5).square() + (middles.T - down - 0.5).square()
            centres[row] = torch.maximum(centres[row], (-distance / (2 * SPREAD**2)).exp())
            for right, below in AROUND:
                if 0 <= across + right < CELLS and 0 <= down + below < CELLS:
                    cells[row, column] = (down + below) * CELLS + across + right
                    said[:, row, column] = torch.tensor(what)
                    column += 1
    return centres, cells, *said


def judge_loss(net: JudgeNet, batch: JudgeBatch, *, bfloat16: bool) -> Tensor:
    """CenterNet's focal loss on the centres (arXiv 1904.07850, eq. 1) and cross entropies of what is there."""
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
    # Summed and divided here: the mean over a batch in which something is never asked would not be a number.
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
    """Trains a judge from scratch and writes it to `folder`; `log` is told the step done and its loss."""
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
