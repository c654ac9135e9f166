"""The pictures that a base model expects at each step."""

from collections.abc import Callable

import pytest
import torch

from mos_cli.adapters.pipeline import AdapterPipeline
from mos_cli.images.inputs import Inputs
from mos_cli.routing.trace import RecordOptions
from tests.helpers.adapted import edit_of, random_picture, recipe_of

PREVIEWS = RecordOptions(previews=True)


@pytest.mark.parametrize(("name", "cfg"), [("klein", 1.0), ("klein-base", 4.0), ("z-image", 4.0), ("prx", 4.0)])
def test_the_last_preview_is_the_picture(loaded: Callable[..., AdapterPipeline], name: str, cfg: float) -> None:
    """At the last step the predicted clean latent is the result: its decoding must be that of diffusers."""
    pipeline = loaded(name)
    recipe = recipe_of(pipeline, cfg=cfg)
    drawing = pipeline.draw(recipe, record_options=PREVIEWS)
    assert len(drawing.previews) == recipe.steps
    assert len({preview.tobytes() for preview in drawing.previews}) == recipe.steps
    seen, picture = (
        torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int()
        for image in (drawing.previews[-1], drawing.image)
    )
    assert (seen - picture).abs().max() <= 1
    assert pipeline.draw(recipe).image.tobytes() == drawing.image.tobytes()


@pytest.mark.parametrize("name", ["klein", "z-image"])
def test_an_edit_has_a_preview_of_each_step_that_it_takes(loaded: Callable[..., AdapterPipeline], name: str) -> None:
    pipeline, inputs = loaded(name), Inputs((random_picture(1),))
    drawing = pipeline.draw(edit_of(pipeline, inputs, strength=0.5), inputs=inputs, record_options=PREVIEWS)
    assert len(drawing.previews) == len(drawing.trace.times) < 3
