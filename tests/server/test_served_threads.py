"""The number of threads of a served model: adapted to other programs on a CPU, left alone on a GPU."""

from typing import Any

import pytest
import torch

from mos_cli.bundles.bundle import Bundle
from mos_cli.config.recipe import make_recipe
from mos_cli.config.settings import RunSettings
from mos_cli.errors import MosError
from mos_cli.server.drawing import CheckedRequest, ServedModel
from mos_cli.utils.threads import AdaptiveThreads


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_the_number_of_threads_is_adapted_on_a_cpu_alone(bundle: Bundle, kind: str) -> None:
    observing: list[Any] = []

    class Pipeline:
        device, compiled = torch.device(kind), False

        def draw(self, recipe: Any, observers: Any, *_: Any, **__: Any) -> None:
            observing.extend(observers)
            raise MosError("nothing is drawn here")

    settings, load = RunSettings(), Pipeline
    how: dict[str, Any] = {"precision": "fp32", "quant": None, "loras": None}
    served = ServedModel(bundle, settings, settings, **how, load=load)  # type: ignore[arg-type]
    size = {"width": 32, "height": 32}
    recipe = make_recipe(
        prompt="a dog", model=bundle.ref, seed=1, steps=2, cfg=1.0, cfg_interval=(0.0, 1.0), precision="fp32", **size
    )
    with pytest.raises(MosError, match="nothing is drawn"):
        served.draw(CheckedRequest(recipe), lambda _step: None)
    assert any(isinstance(one, AdaptiveThreads) for one in observing) == (kind == "cpu")
