"""Training the enlarger: the network that decodes a picture at half its size.

Shapes: B pictures, C channels, H x W the halved picture's size.
"""

from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from mos_cli.towers.autoencoder import Enlarger
from mos_cli.training.picks import Source
from mos_cli.utils.devices import choose_device, choose_precision

CANVAS = 128
NOISE = 0.1
"""The largest standard deviation of the noise in half of the pictures: the tower's latents are not quite clean."""


def train_enlarger(
    source: Source,
    folder: Path,
    *,
    steps: int,
    batch: int = 16,
    learning_rate: float = 2e-3,
    seed: int = 0,
    log: Callable[[int, float], None],
) -> None:
    """Trains an enlarger from scratch and writes it to `folder`; `log` is called with each step and its loss."""
    device = choose_device("auto")
    bfloat16 = choose_precision(device) == "bf16"
    torch.manual_seed(seed)
    enlarger = Enlarger().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(enlarger.parameters(), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=steps, pct_start=0.1)
    noise = torch.Generator(device).manual_seed(seed)
    for step in range(steps):
        scenes = [source.pick(Random(f"{seed}/{step}/{index}"), CANVAS)[0] for index in range(batch)]
        pictures = source.draw(source.collate(scenes), CANVAS)[:, 0]
        z = with_noise(enlarger.encode(pictures), noise).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            drawn = enlarger.decode(z)
        loss = picture_loss(drawn, pictures)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(enlarger.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        log(step + 1, float(loss.detach()))
    enlarger.to(torch.bfloat16, memory_format=torch.contiguous_format).save_pretrained(folder)  # type: ignore[call-overload]


def with_noise(z_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """The first half of the batch with noise, of a random standard deviation for each picture."""
    noisy, clean = z_BCHW.chunk(2)
    deviation = NOISE * torch.rand(len(noisy), 1, 1, 1, generator=generator, device=z_BCHW.device)
    return torch.cat([noisy + deviation * torch.randn(noisy.shape, generator=generator, device=noisy.device), clean])


def picture_loss(drawn: Tensor, pictures: Tensor) -> Tensor:
    """Mean absolute error of the pictures and of their differences along rows and columns, which makes edges sharp."""
    error = drawn - pictures
    return F.l1_loss(drawn, pictures) + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
