"""Measuring a pipeline: the measurement changes nothing, and a short peak of memory is seen."""

import time
from pathlib import Path

import torch

from mos_cli.bundles.bundle import Bundle
from mos_cli.inference.profiling import PeakMemory, Timing, measure

CPU = torch.device("cpu")


def test_measuring_leaves_the_pipeline_as_it_was(bundle: Bundle, encoder_folder: Path) -> None:
    from mos_cli.config.recipe import make_recipe
    from mos_cli.inference.pipeline import MoSPipeline

    pipeline = MoSPipeline(bundle, encoder_folder, device=CPU, precision="fp32")
    sizes = {"width": 32, "height": 32, "steps": 2, "cfg": 2.0, "cfg_interval": (0.0, 1.0)}
    recipe = make_recipe(prompt="a dog", model="tiny", seed=5, precision="fp32", **sizes)
    before = pipeline.draw(recipe).record.sha256
    timing = measure(pipeline, recipe, 1)
    assert isinstance(timing, Timing)
    assert timing.joules is None
    assert pipeline.draw(recipe).record.sha256 == before
    assert "decode" not in vars(pipeline.autoencoder)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipeline.tower.modules())


def test_memory_at_the_peak_is_seen_even_where_it_is_gone_at_the_end() -> None:
    size = 200_000_000
    with PeakMemory(CPU) as memory:
        held = torch.ones(size, dtype=torch.uint8)
        assert held[-1] == 1
        # Longer than between two looks.
        time.sleep(0.05)
        del held
    assert 0.9 * size < memory.bytes < 1.5 * size
