"""Where parts lie while a picture is drawn: no picture changes by it, and what cannot fit is said beforehand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image

from mos_cli.bundles.blueprints import find_network
from mos_cli.bundles.bundle import Bundle, write_index
from mos_cli.bundles.sources import fetch_tower
from mos_cli.bundles.specs import EditDefaults
from mos_cli.config.recipe import Recipe, make_recipe
from mos_cli.errors import InputError, MemoryLimitError
from mos_cli.images.inputs import describe_edit, read_inputs
from mos_cli.inference.offload import Part, StreamedBlocks, _held
from mos_cli.inference.pipeline import MoSPipeline
from mos_cli.planning import memory
from mos_cli.planning.candidates import candidates, fastest
from mos_cli.planning.memory import Setting
from mos_cli.quantization.method import METHODS, Quantisation
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.quantized import GENERATION_KEPT, quantise
from tests.helpers import vlm_towers
from tests.helpers.memory import no_memory
from tests.helpers.tiny_bundle import randomised, write_bundle

CPU = torch.device("cpu")
OFFLOADS = ("understanding", "blocks")


def loaded(bundle: Bundle, offload: Any = "none", device: str = "cpu") -> MoSPipeline:
    tower = fetch_tower(bundle.index.understanding)
    return MoSPipeline(bundle, tower, device=torch.device(device), precision="fp32", setting=Setting(offload=offload))


def asked(bundle: Bundle, prompt: str = "a red apple", **fields: Any) -> Recipe:
    settings = bundle.index.defaults.model_dump() | {"width": 32, "height": 32, "precision": "fp32", "seed": 1}
    return make_recipe(prompt=prompt, model=bundle.ref, **(settings | fields))


def drawn(pipeline: MoSPipeline, recipe: Recipe, inputs: Any = None) -> bytes:
    return pipeline.draw(recipe, inputs=inputs).image.tobytes()


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What comes to the device and leaves it, by the classes of what is moved."""
    log: list[tuple[str, str]] = []

    def recorded(move: str) -> Callable[[Part], None]:
        original = getattr(Part, move)

        def run(part: Part) -> None:
            before = part.on_device
            original(part)
            if part.on_device != before:
                log.append((move, type(part.owners[0]).__name__))

        return run

    for move in ("onload", "offload"):
        monkeypatch.setattr(Part, move, recorded(move))
    return log


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is away has other values: a picture that used any of it would change."""
    offload, onload = Part.offload, Part.onload
    taken: dict[Part, list[tuple[torch.Tensor, Callable[[torch.Tensor], None]]]] = {}

    def gone(part: Part) -> None:
        if part.on_device:
            offload(part)
            # Norms that come for a glimpse stay in other hands, which know of no poison.
            briefly_onloaded = isinstance(part.owners[0], torch.nn.RMSNorm)
            taken[part] = [] if briefly_onloaded else list(_held(part.owners))
            for tensor, put in taken[part]:
                put(torch.full_like(tensor, float("nan") if tensor.is_floating_point() else 0))

    def back(part: Part) -> None:
        if not part.on_device:
            for tensor, put in taken.pop(part):
                put(tensor)
            onload(part)

    monkeypatch.setattr(Part, "offload", gone)
    monkeypatch.setattr(Part, "onload", back)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("offload", OFFLOADS)
def test_no_byte_of_a_picture_changes(bundle: Bundle, offload: str) -> None:
    pipeline, recipe = loaded(bundle, offload), asked(bundle)
    expected = drawn(loaded(bundle), recipe)
    assert drawn(pipeline, recipe) == expected
    pipeline.encode_ahead([recipe])
    pipeline.prompt_encoder.clear_cache()
    assert drawn(pipeline, recipe) == expected


def edited(bundle: Bundle, folder: Path) -> tuple[Recipe, Any]:
    noise = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(folder / "in.png")
    inputs = read_inputs([folder / "in.png"])
    edit = describe_edit(inputs, canvas=(32, 32), image_cfg=1.5, strength=1.0, mask=None, composite=False)
    return asked(bundle, edit=edit, cfg=2.0), inputs


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("offload", OFFLOADS)
def test_no_byte_of_an_edit_changes(editor: Bundle, tmp_path: Path, offload: str) -> None:
    recipe, inputs = edited(editor, tmp_path)
    assert drawn(loaded(editor, offload), recipe, inputs) == drawn(loaded(editor), recipe, inputs)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("offload", OFFLOADS)
def test_a_tower_that_sees_comes_back_with_its_vision(bundle: Bundle, tmp_path: Path, offload: str) -> None:
    qwen = vlm_towers.qwen3_vl(tmp_path / "qwen")
    states = (vlm_towers.LAYERS + 1, vlm_towers.WIDTH)
    edits = EditDefaults(steps=3, cfg=2.0, cfg_interval=(0.0, 1.0), image_cfg=1.5)
    seeing = write_bundle(tmp_path / "models" / "seeing", qwen, edits=edits, states=states)
    recipe, inputs = edited(seeing, tmp_path)
    pipeline = loaded(seeing, offload)
    expected = drawn(loaded(seeing), recipe, inputs)
    assert drawn(pipeline, recipe, inputs) == expected
    # The second time, the vision part has been on the device and left it.
    assert drawn(pipeline, recipe, inputs) == expected


def test_all_prompts_are_read_before_the_first_step_and_nothing_comes_twice(
    bundle: Bundle, moves: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = loaded(bundle, "understanding")
    recipes = [asked(bundle, prompt) for prompt in ("a red apple", "a dog", "a cat", "an apple", "a red cat", "green")]
    read = pipeline.understanding.encode
    events: list[str] = []
    monkeypatch.setattr(pipeline.understanding, "encode", lambda *a: events.append("read") or read(*a))
    moves.clear()
    pipeline.encode_ahead(recipes)
    for recipe in recipes:
        pipeline.draw(recipe, [lambda _: events.append("step")])
    # The prompts and the negative they share.
    assert events == ["read"] * 7 + ["step"] * 18
    assert moves == [
        ("onload", "UnderstandingTower"),
        ("offload", "UnderstandingTower"),
        ("onload", "GenerationTower"),
    ]


@pytest.mark.parametrize("limit", [1, memory.LARGE_TOWER])
def test_the_understanding_tower_is_as_precise_as_it_is_planned(
    bundle: Bundle, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "LARGE_TOWER", limit)
    weights = next(loaded(bundle, "none").understanding.model.parameters())
    assert weights.dtype.itemsize == memory.understanding_bytes(find_network(bundle.ref))


def test_a_prompt_that_cannot_be_read_ahead_fails_alone(bundle: Bundle) -> None:
    pipeline, good, bad = loaded(bundle, "understanding"), asked(bundle), asked(bundle, "apple " * 40)
    pipeline.encode_ahead([bad, good])
    with pytest.raises(InputError, match="shorten it"):
        pipeline.draw(bad)
    assert drawn(pipeline, good) == drawn(loaded(bundle), good)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("offload", OFFLOADS)
def test_an_autoencoder_is_there_when_it_is_used_and_decodes_in_tiles(bundle: Bundle, offload: Any) -> None:
    sizes = {"block_out_channels": (4, 8), "norm_num_groups": 2, "latent_channels": 3, "sample_size": 16}
    ends = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    torch.manual_seed(0)
    AutoencoderKL(**sizes, **ends).save_pretrained(bundle.folder / "autoencoder")  # type: ignore[arg-type]
    kept = ("name", "description", "license", "understanding", "canvas", "defaults")
    made = write_index(bundle.folder, **{name: getattr(bundle.index, name) for name in kept})
    recipe, tower = asked(made, width=64, height=64), fetch_tower(made.index.understanding)

    def made_with(**how: Any) -> bytes:
        return drawn(MoSPipeline(made, tower, device=CPU, precision="fp32", setting=Setting(**how)), recipe)

    tiled = made_with(tiled=True)
    assert made_with(offload=offload, tiled=True) == tiled
    assert made_with(offload=offload) == made_with() != tiled


def test_two_blocks_are_on_the_device_at_a_time(bundle: Bundle) -> None:
    tower = loaded(bundle, "blocks").tower
    blocks = tower.blocks
    assert isinstance(blocks, StreamedBlocks)
    assert not any(part.on_device for part in blocks.parts)
    for number, _ in enumerate(blocks):
        there = [index for index, part in enumerate(blocks.parts) if part.on_device]
        assert number in there
        assert len(there) <= 2
    assert not any(part.on_device for part in blocks.parts)


def test_a_pass_that_is_broken_off_leaves_nothing_on_the_device(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline, recipe = loaded(bundle, "blocks"), asked(bundle)
    whole = drawn(pipeline, recipe)
    blocks = pipeline.tower.blocks
    assert isinstance(blocks, StreamedBlocks)
    with monkeypatch.context() as broken:
        broken.setattr(blocks[1], "forward", no_memory)
        with pytest.raises(MemoryLimitError):
            pipeline.draw(recipe)
    assert not any(part.on_device for part in blocks.parts)
    assert drawn(pipeline, recipe) == whole


@pytest.mark.parametrize("method", METHODS)
def test_quantised_weights_move_with_all_that_belongs_to_them(method: Any) -> None:
    sizes = {"width": 64, "depth": 1, "heads": 2, "hidden": 64, "router_width": 32, "router_heads": 2}
    tower = randomised(GenerationTower(**sizes, states_layers=4, states_width=32)).bfloat16()  # type: ignore[arg-type]
    tower.requires_grad_(False)
    quantise(tower, Quantisation(method=method, kept=GENERATION_KEPT))
    layer: Any = tower.get_submodule("blocks.0.mlp.down")

    def storages() -> set[int]:
        state = getattr(layer.weight, "quant_state", None)
        beside = [layer.weight.SCB] if state is None else [state.absmax, state.code, state.state2.absmax]
        return {tensor.untyped_storage().data_ptr() for tensor in (layer.weight, *beside)}

    part, x = Part(tower, device=CPU), torch.randn(3, 64, dtype=torch.bfloat16)
    home = storages()
    part.offload()
    assert storages() == home
    part.onload()
    assert not storages() & home
    once = layer(x)
    part.offload()
    part.onload()
    assert torch.equal(layer(x), once)


@pytest.mark.cuda
@pytest.mark.parametrize("offload", OFFLOADS)
def test_no_byte_changes_on_a_gpu(editor: Bundle, tmp_path: Path, offload: str) -> None:
    recipe, inputs = edited(editor, tmp_path)
    plain, placed = loaded(editor, device="cuda"), loaded(editor, offload, device="cuda")
    assert drawn(placed, asked(editor)) == drawn(plain, asked(editor))
    assert drawn(placed, recipe, inputs) == drawn(plain, recipe, inputs)
    assert placed.attention == plain.attention
    assert next(placed.understanding.model.parameters()).device.type == "cpu"


@pytest.mark.cuda
def test_max_vram_is_said_and_drawn_with_on_a_gpu(mos, bundle: Bundle, tmp_path: Path) -> None:
    result = mos("generate", "a dog", "-o", tmp_path / "a.png", "--device", "cuda", "--max-vram", 4, "--json")
    assert result.exit_code == 0, result.output
    (setting,) = [json.loads(line) for line in result.stdout.splitlines() if '"setting"' in line]
    best = fastest(candidates(find_network("tiny"), (32, 32)), 4).setting
    assert (setting["offload"], setting["tiled"]) == (best.offload, best.tiled)


@pytest.mark.cuda
def test_blocks_need_less_of_a_gpu(bundle: Bundle) -> None:
    tower = randomised(GenerationTower(width=512, depth=16, heads=4, hidden=2048, states_layers=4, states_width=32))
    tower.requires_grad_(False)
    block = sum(p.nbytes for p in tower.blocks[0].parameters())
    tower.blocks = StreamedBlocks(list(tower.blocks), torch.device("cuda"))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for module in tower.blocks:
        next(module.parameters()).sum().item()
    assert torch.cuda.max_memory_allocated() - before < 2.2 * block
