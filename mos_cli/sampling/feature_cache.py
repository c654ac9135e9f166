"""Feature caching: at some steps the blocks are not computed, what they last said is taken again. By diffusers' hooks.

docs/caching.md has the measurements that chose the technique and its fixed values.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers.hooks.first_block_cache import FirstBlockCacheConfig
from diffusers.hooks.mag_cache import MagCacheConfig
from diffusers.hooks.taylorseer_cache import TaylorSeerCacheConfig
from torch import Tensor

from mos_cli.sampling.branches import Predictor, SteeringInput
from mos_cli.towers.bank import StateBank
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.router import Route

CacheConfig = TaylorSeerCacheConfig | FirstBlockCacheConfig | MagCacheConfig
WARM_UP = 4
"""The first of so many parts of the run is computed whole: what the picture shows is decided there."""


@contextmanager
def caching(tower: GenerationTower, every: int | None, steps: int) -> Iterator[tuple[Predictor, Callable[[], None]]]:
    """The tower, within the context with its blocks computed at one step of `every` alone; None changes nothing.

    The first quarter of the steps is computed, and the last. Router, embeddings and output layer work at every step.
    Beside it what `sample` is to call where other branches are asked for: it lets the cache begin anew, after which the
    last step may be one of those that are not computed.
    """
    if every is None:
        yield tower, lambda: None
        return
    cached = Cached(tower, reusing(every, steps, tower.depth))
    try:
        yield cached, cached.reset_cache
    finally:
        cached.end()


def reusing(every: int, steps: int, blocks: int) -> TaylorSeerCacheConfig:
    """TaylorSeer of order 0 on what the last block hands on; the blocks before it are passed over."""
    return TaylorSeerCacheConfig(
        cache_interval=every,
        disable_cache_before_step=max(1, steps // WARM_UP),
        disable_cache_after_step=steps - 1,
        max_order=0,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[rf"blocks\.{blocks - 1}"],
        skip_predict_identifiers=[rf"blocks\.(?!{blocks - 1}$)\d+"],
    )


class Cached:
    """A generation tower with one of diffusers' caches, as the sampler asks it.

    A branch, or the branches that pass together, are known by the bank they read.
    """

    def __init__(self, tower: GenerationTower, config: CacheConfig) -> None:
        self.tower, self.config = tower, config
        tower.enable_cache(config)

    def __call__(
        self, z_BCHW: Tensor, t_B: Tensor, bank: StateBank, *, steering: SteeringInput
    ) -> tuple[Tensor, Route]:
        with self.tower.cache_context(str(id(bank))):
            return self.tower(z_BCHW, t_B, bank, steering=steering)

    def reset_cache(self) -> None:
        """Forgets what was kept, and counts the steps from here."""
        self.end()
        self.tower.enable_cache(self.config)

    def end(self) -> None:
        """Frees what was kept, and leaves the tower as it was."""
        self.tower.disable_cache()
