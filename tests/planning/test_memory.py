"""What is counted of memory is what real networks take: measured on the CPU, tensor by tensor."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from transformers import LlamaConfig, LlamaModel

from mos_cli.bundles.blueprints import Network, find_network
from mos_cli.bundles.shapes import AutoencoderShape, GenerationShape, UnderstandingShape
from mos_cli.planning import memory
from mos_cli.planning.memory import Setting, weights
from mos_cli.towers.autoencoder import Enlarger
from mos_cli.towers.bank import StateBank, join
from mos_cli.towers.generation import GenerationTower
from tests.helpers.memory import peak

DTYPES = {4: torch.float32, 2: torch.bfloat16}


def network(generation: GenerationShape, **changes: Any) -> Network:
    """Numbers of a model with this generation tower; the rest is that of mos-s."""
    return replace(find_network("mos-s"), **{"generation": generation, "references": 0, **changes})


def parts(numbers: Network, setting: Setting, size: tuple[int, int]) -> dict[str, dict[str, int]]:
    """What is on the device at the peak of each stage, by stage and name."""
    return {stage.name: stage.parts for stage in memory.stages(numbers, setting, size)}


SIZES: dict[str, Any] = {
    "channels": 32,
    "patch": 1,
    "depth": 3,
    "router_width": 128,
    "states_layers": 5,
    "states_width": 64,
}


def bank_of(tower: GenerationTower, *lengths: int) -> StateBank:
    """The banks of prompts of so many tokens, as they are drawn from."""
    banks = [tower.project_states(torch.randn(1, tokens, 5, 64)) for tokens in lengths]
    return banks[0] if len(banks) == 1 else join(banks)


@pytest.mark.parametrize("each", [2, 4])
@pytest.mark.parametrize(
    ("shape", "tokens", "side"),
    [
        ({"width": 256, "heads": 2, "hidden": 704}, 20, 24),
        ({"width": 512, "heads": 4, "hidden": 1024}, 128, 16),
        ({"width": 256, "heads": 2, "hidden": 704, "context": "tokens"}, 64, 20),
        ({"width": 256, "heads": 2, "hidden": 704, "router_width": 512}, 64, 20),
    ],
)
def test_a_pass_takes_what_is_counted(shape: dict[str, Any], tokens: int, side: int, each: int) -> None:
    config = {**SIZES, **shape}
    tower = GenerationTower(**config).to(DTYPES[each]).eval().requires_grad_(False)  # type: ignore[arg-type]
    numbers = network(GenerationShape(**config), value_bytes=each)
    for rows in (1, 2):
        z, t = torch.randn(1, 32, side, side).expand(rows, -1, -1, -1), torch.full((rows,), 0.5)
        with torch.inference_mode():
            # Of a picture's two prompts the shorter is padded.
            bank = bank_of(tower, *(tokens, 2)[:rows])
            tower(z, t, bank)
            measured = peak(lambda: tower(z, t, bank))  # noqa: B023
        counted = memory.drawing_activations(numbers, "none", tokens, side**2, rows)
        assert counted == pytest.approx(measured, rel=0.1), rows


def test_an_edit_takes_what_is_counted() -> None:
    """The references, the banks with and without their image tokens, and a pass of one branch and of two."""
    config = {**SIZES, "width": 256, "heads": 2, "hidden": 704, "image_state_widths": (16,) * 5}
    tower = GenerationTower(**config).to(torch.bfloat16).eval().requires_grad_(False)  # type: ignore[arg-type]
    numbers, side = network(GenerationShape(**config), references=1), 20
    assert numbers.autoencoder is not None
    size = (side * numbers.autoencoder.factor, side * numbers.autoencoder.factor)
    z = torch.randn(1, 32, side, side)
    with torch.inference_mode():
        references = tower.cache_references([z])
        words = [tower.project_states(torch.randn(1, memory.TOKENS, 5, 64)) for _ in range(2)]
        tokens = torch.randn(1, memory.IMAGE_TOKENS, 5, 16)
        banks = [tower.add_image_tokens(bank, tokens, references) for bank in words]
        for batched_guidance in (False, True):
            counted = parts(numbers, Setting(batched_guidance=batched_guidance), size)["sample"]
            joined = [join(banks)] if batched_guidance else []
            assert counted["bank"] == sum(map(bank_bytes, [*words, *banks, *joined]))
            assert counted["references"] == sum(kv.nbytes for kv in references.kv) + references.reference_BND.nbytes
            bank = joined[0] if batched_guidance else banks[0]
            rows = bank.bank_BTMD.shape[0]
            z_BCHW, t_B = z.expand(rows, -1, -1, -1), torch.full((rows,), 0.5)
            tower(z_BCHW, t_B, bank)
            measured = peak(lambda: tower(z_BCHW, t_B, bank))  # noqa: B023
            assert counted["activations"] == pytest.approx(measured, rel=0.1), rows


def bank_bytes(bank: StateBank) -> int:
    assert bank.router_BTR is not None
    return bank.bank_BTMD.nbytes + bank.router_BTR.nbytes


def test_twice_the_branches_take_twice_the_activations_and_a_bank_of_their_own() -> None:
    size = (1024, 1024)
    for numbers in (find_network("mos-l"), replace(find_network("mos-s"), references=0)):
        apart, both = (
            parts(numbers, Setting(batched_guidance=batched_guidance), size)["sample"]
            for batched_guidance in (False, True)
        )
        assert both["activations"] == 2 * apart["activations"]
        # The banks of an edit are there with and without image tokens; those that are read are joined.
        joined = memory.context_tokens(numbers, size)
        alone = joined + (memory.TOKENS if numbers.references else 0)
        assert (both["bank"] - apart["bank"]) * alone == apart["bank"] * joined
    # NF4 unpacks one layer, whatever passes it.
    nf4 = Setting(generation="nf4")
    one, two = (
        parts(numbers, replace(nf4, batched_guidance=batched_guidance), size)["sample"]["activations"]
        for batched_guidance in (False, True)
    )
    assert two < 2 * one
    unguided = replace(numbers, defaults=numbers.defaults.model_copy(update={"cfg": 1.0}))
    assert memory.stages(unguided, Setting(), size) == memory.stages(unguided, Setting(batched_guidance=False), size)


def test_full_precision_doubles_what_is_not_quantised() -> None:
    half, full = (find_network("mos-s", precision=precision) for precision in ("bf16", "fp32"))
    for part in ("blocks", "rest", "others"):
        assert getattr(weights(full, Setting()), part) == 2 * getattr(weights(half, Setting()), part)
    assert weights(full, Setting()).understanding == weights(half, Setting()).understanding
    quantised = Setting(generation="nf4")
    assert weights(full, quantised).blocks < 1.1 * weights(half, quantised).blocks


def test_projecting_takes_what_is_counted() -> None:
    layers, width, tokens = 9, 256, memory.TOKENS
    shape = GenerationShape(**{**SIZES, "states_layers": layers, "states_width": width}, width=128, heads=1, hidden=64)
    for each, parameters, dtype in (
        (2, 10**6, torch.float32),
        (2, 10**10, torch.bfloat16),
        (4, 10**6, torch.float32),
        (4, 10**10, torch.bfloat16),
    ):
        tower = GenerationTower(**shape.model_dump()).to(DTYPES[each]).eval().requires_grad_(False)  # type: ignore[arg-type]
        reader = UnderstandingShape(layers=layers - 1, width=width, hidden=64, linear=parameters, other=0, vision=0)
        numbers = network(shape, understanding=reader, value_bytes=each)
        states = torch.randn(1, tokens, layers, width, dtype=dtype)
        with torch.inference_mode():
            measured = peak(lambda: tower.project_states(states))  # noqa: B023
        counted = parts(numbers, Setting(), numbers.canvas.native)["bank"]
        # One prompt's bank may already be there at the peak: it is counted as that.
        bank = counted["bank"] // 2
        assert 0.9 * measured - bank < counted["activations"] < 1.1 * measured


@pytest.mark.parametrize(("layers", "hidden"), [(6, 768), (12, 256)], ids=["in a layer", "stacking the states"])
def test_reading_takes_what_is_counted(layers: int, hidden: int) -> None:
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": hidden, "num_hidden_layers": layers}
    model = LlamaModel(LlamaConfig(vocab_size=50, num_attention_heads=2, num_key_value_heads=1, **sizes))
    model = model.eval().requires_grad_(False)
    ids = torch.zeros(1, memory.TOKENS, dtype=torch.long)

    def read() -> object:
        hidden = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        return torch.stack(hidden, dim=2)

    with torch.inference_mode():
        read()
        measured = peak(read)
    reader = UnderstandingShape(layers=layers, width=256, hidden=hidden, linear=10**6, other=0, vision=0)
    numbers = network(GenerationShape(), understanding=reader)
    counted = parts(numbers, Setting(), numbers.canvas.native)["encode"]
    # The states of one prompt, and what is there beside them.
    assert counted["hidden states"] // 2 + counted["activations"] == pytest.approx(measured, rel=0.1)


def autoencoder(kind: str) -> tuple[Any, AutoencoderShape, int]:
    """A small autoencoder, its numbers and its factor."""
    if kind == "Enlarger":
        made: Any = Enlarger(width=48)
    elif kind == "AutoencoderDC":
        sizes, blocks = (32, 64, 128, 128, 256, 256), ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
        made = AutoencoderDC(
            encoder_block_types=blocks,  # type: ignore[arg-type]
            decoder_block_types=blocks,  # type: ignore[arg-type]
            encoder_block_out_channels=sizes,
            decoder_block_out_channels=sizes,
            encoder_layers_per_block=(1,) * 6,
            decoder_layers_per_block=(2,) * 6,
            upsample_block_type="interpolate",
            downsample_block_type="Conv",
        )
    else:
        sizes = (32, 64, 64)
        made = AutoencoderKL(
            block_out_channels=sizes,  # type: ignore[arg-type]
            down_block_types=("DownEncoderBlock2D",) * 3,  # type: ignore[arg-type]
            up_block_types=("UpDecoderBlock2D",) * 3,  # type: ignore[arg-type]
            norm_num_groups=16,
        )
    config = {"_class_name": kind, **made.config}
    shape = AutoencoderShape(parameters=made.num_parameters(), config=config)
    return made.eval().requires_grad_(False), shape, shape.factor


@pytest.mark.parametrize("each", [2, 4])
@pytest.mark.parametrize("kind", ["Enlarger", "AutoencoderDC", "AutoencoderKL"])
def test_decoding_takes_what_is_counted(kind: str, each: int) -> None:
    model, shape, factor = autoencoder(kind)
    model = model.to(DTYPES[each])
    width, height = 128, 192
    z = torch.randn(1, model.config.get("latent_channels", 3), height // factor, width // factor, dtype=DTYPES[each])
    with torch.inference_mode():
        model.decode(z)
        measured = peak(lambda: model.decode(z))
    numbers = network(GenerationShape(), autoencoder=shape, value_bytes=each)
    counted = memory.decoding_activations(numbers, (width, height))
    assert counted == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_quantised_weights_are_counted_as_they_are_kept(method: Any) -> None:
    from mos_cli.quantization.method import Quantisation
    from mos_cli.towers.quantized import GENERATION_KEPT, survey

    numbers = find_network("mos-s")
    with torch.device("meta"):
        tower = GenerationTower(**numbers.generation.model_dump())
    real = survey(tower, Quantisation(method=method, kept=GENERATION_KEPT), torch.bfloat16).bytes_after
    made = weights(numbers, Setting(generation=method))
    assert made.blocks + made.rest == pytest.approx(real, rel=0.001)
