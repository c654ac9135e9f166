"""With closed gates, the pixels are those of diffusers' own pipeline."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mos_cli.adapters.pipeline import AdapterPipeline
from tests.helpers.adapted import plain_arguments, plain_pipeline, recipe_of, trained_adapter, with_adapter


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "cfg"),
    [("klein", 1.0), ("klein-base", 4.0), ("z-image", 1.0), ("z-image", 4.0), ("prx", 1.0), ("prx", 4.0)],
)
def test_closed_gates_change_no_pixel(
    loaded: Callable[..., AdapterPipeline],
    base_folders: Callable[[str], Path],
    name: str,
    cfg: float,
    precision: str,
) -> None:
    pipeline = loaded(name, precision)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    recipe = recipe_of(pipeline, cfg=cfg)
    plain = plain_pipeline(base_folders(name), dtype, pipeline)(**plain_arguments(name, recipe)).images[0]
    untrained = pipeline.draw(recipe)
    assert untrained.image.tobytes() == plain.tobytes()
    with with_adapter(pipeline, trained_adapter(pipeline, 0.0)):
        closed = pipeline.draw(recipe)
    with with_adapter(pipeline, trained_adapter(pipeline, 1.0)):
        opened = pipeline.draw(recipe)
    assert closed.image.tobytes() == plain.tobytes()
    assert opened.image.tobytes() != plain.tobytes()
    assert pipeline.draw(recipe).image.tobytes() == plain.tobytes()
