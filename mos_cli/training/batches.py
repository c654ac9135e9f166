"""Training batches: step number in, everything the loss needs out. The same step always gives the same batch.

Shapes: B batch, T context tokens, M layers, S width of a state, C channels, H x W the latent's size.
"""

from dataclasses import dataclass, fields
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from mos_cli.errors import UsageError
from mos_cli.sampling.flow import logit_normal, noised
from mos_cli.towers.understanding import UnderstandingTower
from mos_cli.training.captions import SceneWriter
from mos_cli.training.recipe import TrainTable
from mos_cli.training.scenes import Compositor


@dataclass(frozen=True)
class Batch:
    """Clean and noised pictures, their times, and what the understanding tower read of the captions."""

    z0_BCHW: Tensor
    z_BCHW: Tensor
    t_B: Tensor
    states_BTMS: Tensor
    mask_BT: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True)
class Batches:
    """Makes batches from scenes."""

    writer: SceneWriter
    compositor: Compositor
    understanding: UnderstandingTower
    train: TrainTable

    def make(self, step: int) -> Batch:
        """The batch of one step, from a random stream of that step's own: resuming needs no state.

        Raises:
            UsageError: a caption does not fit into `context_tokens`.
        """
        train = self.train
        random = Random(f"{train.seed}/{step}")
        scenes = [self.writer.write(random) for _ in range(train.batch)]
        captions = ["" if random.random() < train.drop_caption else scene.caption for scene in scenes]
        generator = torch.Generator().manual_seed(random.getrandbits(63))
        z0 = self.compositor.draw(scenes)
        t = logit_normal(train.batch, train.time_mean, train.time_std, generator)
        z = noised(z0, torch.randn(z0.shape, generator=generator), t)
        reading = self.understanding.read(captions)
        room = train.context_tokens - reading.mask_BT.shape[1]
        if room < 0:
            raise UsageError(f"a caption is {-room} tokens too long: raise context_tokens in the recipe")
        states = F.pad(reading.states_BTMS, (0, 0, 0, 0, 0, room))
        return Batch(z0, z, t, states, F.pad(reading.mask_BT, (0, room)))
