"""A step stays on its device: on "meta", where tensors have no values, reading one fails, and so does mixing devices.

So no step makes the host wait for a GPU to tell it something, and nothing in it lies on the CPU.
"""

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from mos_cli.routing.recorder import Recorder
from mos_cli.routing.trace import RecordOptions
from mos_cli.sampling.feature_cache import caching
from mos_cli.sampling.guidance import NEGATIVE, POSITIVE, WITHOUT_IMAGE, Guidance
from mos_cli.sampling.sampler import make_sigmas, sample
from mos_cli.towers.bank import StateBank
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.router import Steering
from tests.helpers.generation_towers import FIXED, ROUTED, WIDTHS, J, M, S, V, name_of, small_tower

META = torch.device("meta")
TOKENS = {POSITIVE: 5, NEGATIVE: 2, WITHOUT_IMAGE: 2}


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device=META)


def drawn(
    tower: GenerationTower,
    *,
    batched_guidance: bool,
    record_options: RecordOptions = RecordOptions(),
    cache: int | None = None,
    on: Any = META,
) -> torch.Tensor:
    """Four steps of an edit, its guidance acting in the middle; the words of its instruction are steered."""
    tower, recorder = tower.to(META), Recorder(record_options)
    with torch.inference_mode():
        banks: dict[str, StateBank] = {
            name: tower.project_states(empty(1, tokens, M, S)) for name, tokens in TOKENS.items()
        }
        references = tower.cache_references([empty(1, 3, 32, 24)])
        for name in (POSITIVE, NEGATIVE):
            banks[name] = tower.add_image_tokens(banks[name], empty(1, V, M, max(WIDTHS)), references)
        steering = None
        if tower.router is not None:
            tokens = TOKENS[POSITIVE] + V
            steering = Steering(torch.ones(1, tokens, J, M, dtype=torch.bool, device=on), empty(1, tokens, J, M))
        with recorder.attached(tower), caching(tower, cache, 4) as (predict, reset_cache):
            return sample(
                predict,
                empty(1, 3, 32, 24),
                banks,
                sigmas=make_sigmas(FlowMatchEulerDiscreteScheduler(), 4),
                solver="ab2",
                guidance=Guidance(3.0, (0.3, 0.8), 1.5),
                batched_guidance=batched_guidance,
                observers=[recorder],
                steer=lambda step, branch: steering if branch == POSITIVE else None,
                reset_cache=reset_cache,
            )


@pytest.mark.parametrize("variant", [*FIXED, *ROUTED], ids=name_of)
@pytest.mark.parametrize("batched_guidance", [True, False], ids=["batched", "sequential"])
def test_no_step_reads_or_brings_a_value(variant: dict[str, Any], batched_guidance: bool) -> None:
    tower = small_tower(image_state_widths=WIDTHS, **variant)
    assert drawn(tower, batched_guidance=batched_guidance).device == META


def test_recording_and_caching_stay_there_too() -> None:
    tower = small_tower(image_state_widths=WIDTHS)
    assert (
        drawn(
            tower, batched_guidance=True, record_options=RecordOptions(probabilities=True, regions=True, previews=True)
        ).device
        == META
    )
    assert drawn(tower, batched_guidance=True, cache=3).device == META


def test_what_lies_elsewhere_is_noticed() -> None:
    with pytest.raises(RuntimeError, match="device"):
        drawn(small_tower(image_state_widths=WIDTHS), batched_guidance=False, on=torch.device("cpu"))
