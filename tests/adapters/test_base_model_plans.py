"""Plans of base models: their numbers are those of the networks, and what is counted is what is taken."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel, PRXTransformer2DModel
from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
from typer.testing import Result

from mos_cli.adapters.pipeline import AdapterPipeline
from mos_cli.bundles.adapters import AdapterBundle, BaseNetwork, base_network, read_adapter
from mos_cli.bundles.bundle import find_bundle
from mos_cli.planning.base_models import drawing_activations, stages
from mos_cli.planning.candidates import GPU_SIZES, candidates, fastest
from mos_cli.planning.memory import Quant, Setting
from tests.helpers.base_model_sizes import shape_of
from tests.helpers.memory import peak

DTYPES = {2: torch.bfloat16, 4: torch.float32}


def shipped(name: str) -> BaseNetwork:
    bundle = find_bundle(name)
    assert isinstance(bundle, AdapterBundle)
    return base_network(bundle, precision="bf16", references=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["klein", "z-image", "prx"])
def test_the_numbers_are_those_of_the_networks(name: str) -> None:
    """Recomputed on the meta device."""
    assert shipped(name).shape == shape_of(name)


@pytest.mark.parametrize("gib", GPU_SIZES)
@pytest.mark.parametrize("name", ["klein", "z-image", "prx"])
def test_every_gpu_has_a_setting(name: str, gib: int) -> None:
    network = shipped(name)
    assert fastest(candidates(network, network.canvas.native), gib).needs <= gib * 2**30


def one_pass(name: str, heads: int, text: int, side: int, dtype: torch.dtype) -> Callable[[], object]:
    """A pass of a transformer with the proportions of the real one."""
    width, patches = 64 * heads, side * side
    if name == "klein":
        klein = Flux2Transformer2DModel(
            in_channels=128,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=64,
            num_attention_heads=heads,
            joint_attention_dim=192,
            axes_dims_rope=(16, 16, 16, 16),
            guidance_embeds=False,
        ).to(dtype)
        given: dict[str, Any] = {
            "hidden_states": torch.randn(1, patches, 128, dtype=dtype),
            "timestep": torch.ones(1, dtype=dtype),
            "encoder_hidden_states": torch.randn(1, text, 192, dtype=dtype),
            "txt_ids": torch.zeros(text, 4),
            "img_ids": torch.zeros(patches, 4),
        }
        return lambda: klein(**given)
    if name == "z-image":
        z_image = ZImageTransformer2DModel(
            in_channels=16,
            dim=width,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=heads,
            n_kv_heads=heads,
            cap_feat_dim=64,
            axes_dims=[32, 16, 16],
            axes_lens=[1024, 64, 64],
        ).to(dtype)
        latent = torch.randn(16, 1, 2 * side, 2 * side, dtype=dtype)
        return lambda: z_image([latent], torch.ones(1, dtype=dtype), [torch.randn(text, 64, dtype=dtype)])
    prx = PRXTransformer2DModel(
        in_channels=16, context_in_dim=64, hidden_size=width, num_heads=heads, depth=2, axes_dim=[32, 32]
    ).to(dtype)
    latent = torch.randn(1, 16, 2 * side, 2 * side, dtype=dtype)
    return lambda: prx(latent, torch.ones(1), torch.randn(1, text, 64, dtype=dtype))


@pytest.mark.parametrize("each", [2, 4])
@pytest.mark.parametrize(("heads", "text", "side"), [(2, 64, 24), (4, 128, 32)])
@pytest.mark.parametrize("name", ["klein", "z-image", "prx"])
def test_a_pass_takes_what_is_counted(name: str, heads: int, text: int, side: int, each: int) -> None:
    network = shipped(name)
    shape = network.shape.model_copy(update={"width": 64 * heads, "head_width": 64})
    network = replace(network, shape=shape, value_bytes=each)  # type: ignore[arg-type]
    run = one_pass(name, heads, text, side, DTYPES[each])
    with torch.no_grad():
        taken = peak(run)
    counted = drawing_activations(network, "none", (16 * side, 16 * side), text)
    assert counted == pytest.approx(taken, rel=0.1)


@pytest.mark.parametrize("each", [2, 4])
def test_decoding_takes_what_is_counted(each: int) -> None:
    network, side = shipped("klein"), 256
    shape = network.shape.model_copy(update={"decoder_width": 64})
    network = replace(network, shape=shape, value_bytes=each)  # type: ignore[arg-type]
    vae = AutoencoderKLFlux2(
        block_out_channels=(64, 128, 256, 256), decoder_block_out_channels=None, latent_channels=16
    ).to(DTYPES[each])
    latent = torch.randn(1, 16, side // 8, side // 8, dtype=DTYPES[each])
    with torch.no_grad():
        taken = peak(lambda: vae.decode(latent))
    counted = stages(network, Setting(), (side, side))[-1].parts["activations"]
    # The last tensors are the picture's, which are made after the peak of the decoder.
    assert counted - 3 * side * side * 16 == pytest.approx(taken, rel=0.1)


@pytest.mark.parametrize("quant", ["none", "nf4", "int8"])
@pytest.mark.parametrize("name", ["klein", "z-image", "prx"])
def test_the_weights_take_what_is_counted(base_folders: Callable[[str], Path], name: str, quant: Quant) -> None:
    """Of a loaded base model, with the tensors that quantised layers keep beside their weights."""
    bundle = read_adapter(base_folders(name))
    network = base_network(bundle, precision="bf16", references=0)
    setting = Setting(quant, quant)
    pipeline = AdapterPipeline(bundle, device=torch.device("cpu"), precision="bf16", setting=setting)
    parts = stages(network, setting, (64, 64))[0].parts

    def held(module: Any) -> int:
        return sum(tensor.nbytes for tensor in module.state_dict().values())

    tied = "lm_head.weight"
    text = held(pipeline.pipe.text_encoder)
    if tied in pipeline.pipe.text_encoder.state_dict():
        text -= pipeline.pipe.text_encoder.state_dict()[tied].nbytes
    # These networks are so small that the tables of a quantised layer, 1.1 kB each, are as large as its weights.
    tables = sum("quant_map" in key for key in pipeline.pipe.text_encoder.state_dict()) * 640
    assert text - tables == pytest.approx(parts["language model"], rel=0.1)
    if quant == "none":
        assert held(pipeline.pipe.transformer) == pytest.approx(parts["transformer"], rel=0.01)
        assert held(pipeline.pipe.vae) == pytest.approx(parts["autoencoder"], rel=0.01)


def test_plans_on_the_command_line(mos: Callable[..., Result], base_folders: Callable[[str], Path]) -> None:
    planned = mos("plan", "klein", "--max-vram", "8")
    assert planned.exit_code == 0, planned.output
    assert "mos generate PROMPT -m klein --max-vram 8" in planned.output
    (line,) = mos("plan", "z-image", "--max-vram", "8", "--json").output.splitlines()
    assert set(json.loads(line)["stages"]) == {"encode", "bank", "sample", "decode"}
    assert mos("plan", base_folders("prx"), "--max-vram", "8").exit_code == 0
    assert mos("plan", "prx", "--references", "1").exit_code == 2
    assert mos("plan", "klein", "--understanding", "x").exit_code == 2
