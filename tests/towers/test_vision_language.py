"""Towers that see: states of words and pictures held against a plain walk through the layers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageTextToText, LlavaConfig

from mos_cli.errors import InputError, ModelError
from mos_cli.towers.understanding import UnderstandingTower
from mos_cli.towers.vision_language import VisionLanguageTower, load_understanding
from tests.helpers import vlm_towers

KINDS = ("qwen3_vl", "internvl", "perception_lm")
LEADS = {"qwen3_vl": vlm_towers.QWEN[:3], "internvl": vlm_towers.INTERN, "perception_lm": ("", "<|image|>", "")}
TEXT = "paint the red apple green"
EXACT: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: getattr(vlm_towers, kind)(tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tower(folders: dict[str, Path], kind: str) -> VisionLanguageTower:
    tower = load_understanding(folders[kind])
    assert isinstance(tower, VisionLanguageTower)
    return tower


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    noise = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.to(torch.uint8).numpy())


def levels(image: Image.Image) -> Tensor:
    """[3, H, W] in -1..1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


def test_words_alone_are_read_as_by_the_language_part_alone(tower: VisionLanguageTower, folders, kind: str) -> None:
    reading = tower.encode([TEXT])
    language = AutoModelForImageTextToText.from_pretrained(folders[kind]).eval().model.language_model
    ids = tower.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = language(ids, output_hidden_states=True)
        normed = language.norm(reading.states_BTMS[:, :, -1])
    assert reading.states_BTMS.shape[2:] == (tower.layers, tower.width) == (5, 64)
    torch.testing.assert_close(reading.states_BTMS[:, :, :-1], torch.stack(out.hidden_states[:-1], dim=2), **EXACT)
    # The last state is what enters the final norm, not what leaves it.
    torch.testing.assert_close(normed, out.last_hidden_state, **EXACT)
    assert not torch.allclose(reading.states_BTMS[:, :, -1], out.last_hidden_state, atol=1e-2)


@pytest.mark.parametrize("sizes", [[(128, 128)], [(256, 64)], [(64, 128), (256, 64)]])
@torch.no_grad()
def test_entry_i_is_what_enters_layer_i(tower: VisionLanguageTower, folders, kind: str, sizes) -> None:
    pictures = [picture(*size, seed=seed) for seed, size in enumerate(sizes)]
    reading = tower.encode([TEXT], [pictures])
    slow, normed = slow_states(tower, folders[kind], kind, pictures)
    torch.testing.assert_close(reading.states_BTMS[0], slow, **EXACT)
    # The walk itself ends where the whole model ends.
    torch.testing.assert_close(tower.model.get_submodule("norm")(slow[:, -1]), normed, **EXACT)


def slow_states(
    tower: VisionLanguageTower, folder: Path, kind: str, pictures: list[Image.Image]
) -> tuple[Tensor, Tensor]:
    """A prompt walked through the model layer by layer: what enters each, and where the model's own run ends."""
    whole = AutoModelForImageTextToText.from_pretrained(folder).eval().model
    language, image_id = whole.language_model, whole.config.image_token_id
    if kind == "perception_lm":
        shown = {"pixel_values": torch.stack([levels(each.resize((56, 56), 3))[None] for each in pictures])}
    else:
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        one = {"crop_to_patches": False} if kind == "internvl" else {}
        processed = processor(images=pictures, return_tensors="pt", **one)
        shown = {name: processed[name] for name in ("pixel_values", "image_grid_thw") if name in processed}
    seen = whole.get_image_features(**shown)
    features = list(seen.pooler_output)
    deepstack = [torch.cat(each) for each in getattr(seen, "deepstack_features", [])]
    columns = [4] * len(pictures)
    if kind == "qwen3_vl":
        assert len(deepstack) == 3
        columns = [grid[2] // 2 for grid in shown["image_grid_thw"].tolist()]
    opening, image, closing = LEADS[kind]
    lead = "".join(opening + image * len(feature) + closing for feature in features)
    ids = tower.tokenizer(lead + TEXT, return_tensors="pt")["input_ids"]
    is_image = ids[0] == image_id

    position, left, positions = 0, list(zip(features, columns, strict=True)), []
    while len(positions) < len(is_image):
        if kind != "qwen3_vl" or not is_image[len(positions)]:
            positions.append((position,) * 3)
            position += 1
            continue
        feature, wide = left.pop(0)
        cells = [divmod(cell, wide) for cell in range(len(feature))]
        positions += [(position, position + row, position + column) for row, column in cells]
        position += max(wide, len(feature) // wide)
    positions_3BT = torch.tensor(positions).T[:, None]

    x = language.embed_tokens(ids)
    x[0, is_image] = torch.cat(features)
    rotations = language.rotary_emb(x, positions_3BT if kind == "qwen3_vl" else positions_3BT[0])
    states = [x[0]]
    for index, layer in enumerate(language.layers):
        x = layer(x, attention_mask=None, position_embeddings=rotations).clone()
        if index < len(deepstack):
            x[0, is_image] += deepstack[index]
        states.append(x[0])
    types = {"mm_token_type_ids": is_image[None].int()} if kind == "qwen3_vl" else {}
    return torch.stack(states, dim=1), whole(input_ids=ids, **shown, **types).last_hidden_state[0]


def test_image_tokens_are_the_cells_of_their_picture(tower: VisionLanguageTower, kind: str) -> None:
    square, wide = picture(128, 128), picture(256, 64)
    square_grid, wide_grid = (4, 4), (2, 8) if kind == "qwen3_vl" else (4, 4)
    reading = tower.encode([TEXT, TEXT, "", TEXT], [[square], [wide], [square, wide], []])
    grids = [[square_grid], [wide_grid], [square_grid, wide_grid], []]
    for tokens, expected, image_spans in zip(reading.tokens, grids, reading.image_spans, strict=True):
        assert [token.patch for token in tokens if token.patch] == [
            (number, row, column)
            for number, (rows, columns) in enumerate(expected)
            for row in range(rows)
            for column in range(columns)
        ]
        assert [(span.rows, span.columns) for span in image_spans] == expected
        assert all(tokens[span.first].patch == (number, 0, 0) for number, span in enumerate(image_spans))
    # The words behind the pictures are those of the prompt, and stand for its characters.
    words = [[(token.text, token.start, token.end) for token in tokens if token.end] for tokens in reading.tokens]
    assert words[0] == words[1] == words[3]
    assert words[2] == []
    assert "".join(TEXT[start:end] for _, start, end in words[0]) == TEXT
    assert reading.mask_BT.sum(1).tolist() == [len(tokens) for tokens in reading.tokens]


@pytest.mark.parametrize("cell", [(0, 0), (1, 3), (3, 1)])
def test_a_token_shows_what_is_in_its_cell(tower: VisionLanguageTower, cell: tuple[int, int]) -> None:
    before = Image.new("RGB", (128, 128), "grey")
    after = before.copy()
    left, top = cell[1] * 32, cell[0] * 32
    ImageDraw.Draw(after).rectangle((left, top, left + 31, top + 31), "red")
    one, other = (tower.encode([TEXT], [[each]]).states_BTMS[0, :, 0] for each in (before, after))
    changed = int((one - other).square().sum(-1).argmax())
    assert tower.encode([TEXT], [[after]]).tokens[0][changed].patch == (0, *cell)


def test_neither_padding_nor_another_prompt_shows(tower: VisionLanguageTower) -> None:
    shown = [[picture(256, 64)], [], [picture(64, 64), picture(96, 128)]]
    prompts = ["remove the dog on the left", TEXT, "a cat"]
    batched = tower.encode(prompts, shown)
    for index, (prompt, pictures) in enumerate(zip(prompts, shown, strict=True)):
        alone = tower.encode([prompt], [pictures])
        assert alone.mask_BT.all()
        states = batched.states_BTMS[index][batched.mask_BT[index]]
        torch.testing.assert_close(states, alone.states_BTMS[0], **EXACT)
        assert batched.tokens[index] == alone.tokens[0]


def test_words_depend_on_the_picture_they_stand_behind(tower: VisionLanguageTower) -> None:
    readings = [tower.encode([TEXT], [[picture(128, 128, seed)]]).states_BTMS[0, -3:] for seed in (1, 2)]
    assert (readings[0][:, 0] == readings[1][:, 0]).all()
    assert (readings[0][:, -1] - readings[1][:, -1]).abs().max() > 1e-2


def test_a_picture_may_be_a_tensor(tower: VisionLanguageTower) -> None:
    image = picture(64, 96)
    states = [tower.encode([TEXT], [[shown]]).states_BTMS for shown in (image, levels(image))]
    assert torch.equal(*states)


def copied(folder: Path, copy: Path, *, without: str) -> Path:
    """A copy of a tower that lacks a file, or else the weights with such names."""
    copy.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.name != without:
            (copy / path.name).write_bytes(path.read_bytes())
    weights = load_file(copy / "model.safetensors")
    save_file({n: w for n, w in weights.items() if without not in n}, copy / "model.safetensors", {"format": "pt"})
    return copy


def test_vision_is_loaded_when_the_first_picture_is_shown(folders, kind: str, tmp_path: Path) -> None:
    whole = load_understanding(folders[kind])
    vision = "visual" if kind == "qwen3_vl" else "vision_tower"
    blind = load_understanding(copied(folders[kind], tmp_path, without=vision))
    assert isinstance(whole, VisionLanguageTower)
    # Words are read without any of it, also where pictures could be given but are not.
    words = whole.encode([TEXT]).states_BTMS
    assert torch.equal(blind.encode([TEXT], [[]]).states_BTMS, words)
    assert not whole.vision_loaded
    with pytest.raises(ModelError, match=r"the vision part of .* cannot be loaded: .* weights are missing"):
        blind.encode([TEXT], [[picture(64, 64)]])
    whole.encode([TEXT], [[picture(64, 64)]])
    assert whole.vision_loaded
    assert torch.equal(whole.encode([TEXT]).states_BTMS, words)


def test_a_language_part_that_is_not_whole_is_an_error(folders, kind: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="weights are missing"):
        load_understanding(copied(folders[kind], tmp_path, without="layers.2."))


def test_a_tower_that_does_not_say_how_to_prepare_pictures_is_an_error(folders, kind: str, tmp_path: Path) -> None:
    tower = load_understanding(copied(folders[kind], tmp_path, without="preprocessor_config.json"))
    with pytest.raises(ModelError, match="has no usable image processor"):
        tower.encode([TEXT], [[picture(64, 64)]])


def test_half_precision_goes_into_both_parts(folders, kind: str) -> None:
    tower = load_understanding(folders[kind], dtype=torch.bfloat16)
    exact = load_understanding(folders[kind]).encode([TEXT], [[picture(64, 64)]]).states_BTMS
    states = tower.encode([TEXT], [[picture(64, 64)]]).states_BTMS
    assert states.dtype == torch.bfloat16
    assert (states - exact).square().mean().sqrt() < 0.05 * exact.square().mean().sqrt()


# The random weights, and with them the error, differ between releases of transformers.
@pytest.mark.parametrize(("method", "bound"), [("nf4", 0.3), ("int8", 0.03)])
def test_the_language_part_alone_is_quantised_but_for_sizes_that_cannot_be(
    kind: str, method: Any, bound: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(vlm_towers.TEXT, "intermediate_size", 96)
    folder, shown = getattr(vlm_towers, kind)(tmp_path), ([TEXT], [[picture(64, 64)]])
    exact, tower = (load_understanding(folder, dtype=torch.bfloat16, quant=quant) for quant in (None, method))
    assert isinstance(tower, VisionLanguageTower)
    states, expected = (each.encode(*shown).states_BTMS.float() for each in (tower, exact))
    assert 0 < (states - expected).norm() / expected.norm() < bound
    linears = {name: layer for name, layer in tower._full_model.named_modules() if isinstance(layer, torch.nn.Linear)}
    full = {name for name, layer in linears.items() if type(layer) is torch.nn.Linear}
    assert {name for name in full if name.startswith("language_model.")} == {
        f"language_model.layers.{index}.mlp.down_proj" for index in range(vlm_towers.LAYERS)
    }
    assert {name for name in linears if not name.startswith("language_model.")} < full


def test_what_cannot_be_shown_is_said_in_one_line(tower: VisionLanguageTower, kind: str) -> None:
    image = picture(128, 128)
    mark = LEADS[kind][1]
    for prompt, pictures, said in [
        ("apple " * 500, [image], "the model reads 400: shorten it, or give fewer"),
        ("dog", [image] * 30, "its pictures included, the model reads 400"),
        (f"a {mark} dog", [image], "leave it out"),
        ("apple " * 500, [], "the model reads 400: shorten it$"),
    ]:
        with pytest.raises(InputError, match=said) as error:
            tower.encode([prompt], [pictures])
        assert "\n" not in str(error.value)


def test_a_picture_of_an_impossible_shape_is_refused(folders) -> None:
    with pytest.raises(InputError, match="cannot take a picture") as error:
        load_understanding(folders["qwen3_vl"]).encode([TEXT], [[picture(500, 2)]])
    assert "\n" not in str(error.value)


def test_a_tower_of_words_cannot_be_shown_a_picture(encoder_folder: Path, decoder_folder: Path) -> None:
    for folder in (encoder_folder, decoder_folder):
        tower = load_understanding(folder)
        assert type(tower) is UnderstandingTower
        with pytest.raises(InputError, match="has no vision"):
            tower.encode(["a dog"], [[picture(64, 64)]])


def test_timm_is_asked_for_where_it_is_needed(tmp_path: Path) -> None:
    tower = load_understanding(vlm_towers.perception_lm(tmp_path, timm=True))
    assert tower.encode([TEXT]).states_BTMS.isfinite().all()
    with pytest.raises(ModelError, match="needs timm for its vision part, which is not installed: pip install timm"):
        tower.encode([TEXT], [[picture(64, 64)]])


def test_other_models_that_see_are_refused_by_name(tmp_path: Path) -> None:
    LlavaConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="holds a llava: of vision-language models, only qwen3_vl, internvl"):
        load_understanding(tmp_path)
    with pytest.raises(ModelError, match="is not an understanding tower that can be read"):
        load_understanding(tmp_path / "nothing")
