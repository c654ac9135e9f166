"""Feature caching: at some steps the blocks are not computed and their last output is used again, by diffusers' hooks.

docs/caching.md has the measurements behind the technique and its constants.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from diffusers.hooks.first_block_cache import FirstBlockCacheConfig
from diffusers.hooks.mag_cache import MagCacheConfig
from diffusers.hooks.taylorseer_cache import TaylorSeerCacheConfig
from torch import Tensor

from mos_cli.sampling.guidance import Predictor, SteeringInput
from mos_cli.towers.bank import StateBank
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.router import Route

CacheConfig = TaylorSeerCacheConfig | FirstBlockCacheConfig | MagCacheConfig
WARM_UP = 4
"""The first 1 / WARM_UP of the steps is computed in full: it decides what the picture shows."""


@contextmanager
def caching(tower: GenerationTower, every: int | None, steps: int) -> Iterator[tuple[Predictor, Callable[[], None]]]:
    """Yields the tower, with its blocks computed at one step of `every`, and the function that resets the cache.

    None for `every` changes nothing. The first quarter of the steps and the last are computed in full; router,
    embeddings and output layer are computed at every step. After a reset the last step may be one that is skipped.
    """
    if every is None:
        yield tower, lambda: None
        return
    cached = CachedTower(tower, taylorseer_config(every, steps, tower.depth))
    try:
        yield cached, cached.reset_cache
    finally:
        cached.end()


def taylorseer_config(every: int, steps: int, blocks: int) -> TaylorSeerCacheConfig:
    """TaylorSeer of order 0 on the output of the last block; the blocks before it are skipped."""
    return TaylorSeerCacheConfig(
        cache_interval=every,
        disable_cache_before_step=max(1, steps // WARM_UP),
        disable_cache_after_step=steps - 1,
        max_order=0,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[rf"blocks\.{blocks - 1}"],
        skip_predict_identifiers=[rf"blocks\.(?!{blocks - 1}$)\d+"],
    )


class CachedTower:
    """A generation tower with one of diffusers' caches, as a `Predictor`.

    A branch, or a batch of branches, is identified by its state bank.
    """

    def __init__(self, tower: GenerationTower, config: CacheConfig) -> None:
        self.tower, self.config = tower, config
        tower.enable_cache(config)

    def __call__(
        self,
        z_BCHW: Tensor,
        t_B: Tensor,
        bank: StateBank,
        *,
        steering: SteeringInput,
        guidance_B: Tensor | None = None,
    ) -> tuple[Tensor, Route]:
        with self.tower.cache_context(str(id(bank))):
            return self.tower(z_BCHW, t_B, bank, steering=steering, guidance_B=guidance_B)

    def reset_cache(self) -> None:
        """Empties the cache and restarts the count of steps."""
        self.end()
        self.tower.enable_cache(self.config)

    def end(self) -> None:
        """Removes the cache from the tower."""
        self.tower.disable_cache()
