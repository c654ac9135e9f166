"""Quantised and offloaded base models: with closed gates the pixels are those of the same weights in diffusers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mos_cli.adapters.pipeline import AdapterPipeline
from mos_cli.bundles.adapters import read_adapter
from mos_cli.bundles.base_models import KEPT
from mos_cli.planning.memory import Quant, Setting
from mos_cli.quantization.method import Quantisation
from mos_cli.towers.quantized import UNDERSTANDING_KEPT, quantise
from mos_cli.utils.threads import cpu_threads
from tests.helpers.adapted import plain_arguments, plain_pipeline, recipe_of, trained_adapter, with_adapter

CPU = torch.device("cpu")


@pytest.mark.parametrize("method", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["klein", "z-image", "prx"])
def test_closed_gates_change_no_pixel_of_a_quantised_model(
    base_folders: Callable[[str], Path], name: str, method: Quant
) -> None:
    assert method != "none"
    bundle = read_adapter(base_folders(name))
    pipeline = AdapterPipeline(bundle, device=CPU, precision="bf16", setting=Setting(method, method))  # type: ignore[arg-type]
    recipe = recipe_of(pipeline, steps=2)
    plain = plain_pipeline(base_folders(name), torch.bfloat16)
    kept = KEPT[type(plain).__name__]
    quantise(plain.transformer, Quantisation(method=method, kept=kept))
    quantise(plain.text_encoder, Quantisation(method=method, kept=UNDERSTANDING_KEPT))
    expected = plain(**plain_arguments(name, recipe)).images[0]
    assert pipeline.draw(recipe).image.tobytes() == expected.tobytes()
    with with_adapter(pipeline, trained_adapter(pipeline, 1.0)):
        assert pipeline.draw(recipe).image.tobytes() != expected.tobytes()


@pytest.mark.parametrize("name", ["klein", "z-image", "prx"])
def test_the_language_model_leaves_the_device_before_the_transformer_comes(
    base_folders: Callable[[str], Path], name: str
) -> None:
    bundle = read_adapter(base_folders(name))
    stays = AdapterPipeline(bundle, device=CPU, precision="fp32")  # type: ignore[arg-type]
    setting = Setting("none", "none", "understanding")
    leaves = AdapterPipeline(bundle, device=CPU, precision="fp32", setting=setting)  # type: ignore[arg-type]
    recipe = recipe_of(stays, steps=2, routes=("fox=2",))
    present: list[tuple[bool, bool]] = []

    def note(*_: object) -> None:
        assert leaves.offloader.understanding is not None
        drawing = all(part.on_device for part in leaves.offloader.drawing)
        present.append((leaves.offloader.understanding.on_device, drawing))

    leaves.pipe.text_encoder.register_forward_pre_hook(note)
    leaves.pipe.transformer.register_forward_pre_hook(note)
    leaves.encode_ahead([recipe])
    drawn = leaves.draw(recipe)
    assert set(present) == {(True, False), (False, True)}
    assert drawn.image.tobytes() == stays.draw(recipe).image.tobytes()
    assert drawn.routes["positive"].ids_SJTK.tolist() == stays.draw(recipe).routes["positive"].ids_SJTK.tolist()


@pytest.fixture
def offloaded(base_folders: Callable[[str], Path]) -> AdapterPipeline:
    bundle, setting = read_adapter(base_folders("klein")), Setting("none", "none", "understanding")
    return AdapterPipeline(bundle, device=CPU, precision="fp32", setting=setting)  # type: ignore[arg-type]


def moves_of(pipeline: AdapterPipeline, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The moves of the language model to the device from now on."""
    moves, part = [], pipeline.offloader.understanding
    assert part is not None
    onload = part.onload
    monkeypatch.setattr(part, "onload", lambda: moves.append("onload") or onload())
    return moves


def test_prompts_read_ahead_are_not_read_again_with_another_number_of_threads(
    offloaded: AdapterPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves = moves_of(offloaded, monkeypatch)
    prompts = [f"{number} red foxes" for number in range(6)]
    offloaded.encode_ahead([recipe_of(offloaded, prompt=prompt) for prompt in prompts])
    with cpu_threads(torch.get_num_threads() + 1):
        for prompt in prompts:
            offloaded.encode(prompt)
    assert moves == ["onload"]


def test_the_last_prompts_alone_are_kept(offloaded: AdapterPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    moves = moves_of(offloaded, monkeypatch)
    for number in [*range(6), 5, 4, 0]:
        offloaded.encode(f"{number} red foxes")
    # Of the last three, two were kept.
    assert moves == ["onload"] * 7
