"""Small random towers and a bundle made of them: everything the product does, in a second and without a network."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from mos_cli.bundles.bundle import Bundle, write_index
from mos_cli.bundles.specs import Canvas, Defaults, EditDefaults, FolderSource, TowerSpec
from mos_cli.datasets.art.file import SCHEMA, Art, load_art
from mos_cli.evaluation.scenebench import bench_data
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.image_encoder import ImageEncoder
from mos_cli.utils.files import sha256_of

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "an", "red", "green", "apple", "dog", "cat", "##s"]


def _tokenizer(folder: Path, *, marks: bool) -> None:
    """A word-piece tokenizer; with `marks` it puts [CLS] and [SEP] around a prompt, as encoders do."""
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    if marks:
        tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"} if marks else {"eos_token": "[SEP]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=24, **special).save_pretrained(folder)


def tower_spec(folder: Path) -> TowerSpec:
    """Describes the small tower in `folder`, which is also where it comes from."""
    return TowerSpec(
        schema="mos-tower/1",
        name="tiny-encoder",
        license="Apache-2.0",
        description="random",
        format="safetensors",
        files={path.name: sha256_of(path) for path in sorted(folder.iterdir())},
        size=1,
        sources=(FolderSource(kind="folder", path=str(folder)),),
    )


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A three-layer BERT with random weights."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=24, **sizes)).save_pretrained(folder)
    _tokenizer(folder, marks=True)
    return folder


@pytest.fixture(scope="session")
def decoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A four-layer Llama with random weights."""
    folder = tmp_path_factory.mktemp("decoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    LlamaModel(LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=24, **sizes)).save_pretrained(folder)
    _tokenizer(folder, marks=False)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache and settings of the test's own."""
    monkeypatch.setenv("MOS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MOS_DATA", str(tmp_path.with_name(f"{tmp_path.name}-data")))
    (tmp_path / "config.toml").write_text("[generate]\n")
    monkeypatch.setenv("MOS_CONFIG", str(tmp_path / "config.toml"))
    return tmp_path / "cache"


def awake(tower: GenerationTower) -> GenerationTower:
    """Gives every parameter a random value: a fresh tower draws grey whatever it reads."""
    torch.manual_seed(1)
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return tower.eval()


def write_bundle(folder: Path, encoder: Path, **seeing: Any) -> Bundle:
    """A bundle named as its folder that draws random 32 px pictures; what it sees with is the caller's to give."""
    sizes = {"width": 32, "depth": 3, "heads": 2, "hidden": 48, "router_width": 32, "router_heads": 2}
    image_encoder, states = seeing.get("image_encoder"), seeing.get("states", (4, 32))
    vision = {"image_state_widths": image_encoder.widths} if image_encoder else {"has_vision": "edits" in seeing}
    tower = GenerationTower(**sizes, **vision, states_layers=states[0], states_width=states[1])
    awake(tower).save_pretrained(folder / "generation")
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    if image_encoder:
        image_encoder.save_pretrained(folder / "image_encoder")
    return write_index(
        folder,
        name=folder.name,
        description="random weights",
        license="Apache-2.0",
        understanding=tower_spec(encoder),
        canvas=Canvas(native=(32, 32), multiple=8, min=16, max=64),
        defaults=Defaults(steps=3, cfg=2.0, cfg_interval=(0.0, 1.0)),
        edits=seeing.get("edits"),
    )


@pytest.fixture
def bundle(tmp_path: Path, encoder_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A bundle named "tiny" that draws; found by name, and the default."""
    monkeypatch.setenv("MOS_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("MOS_MODEL", "tiny")
    return write_bundle(tmp_path / "models" / "tiny", encoder_folder)


@pytest.fixture
def editor(tmp_path: Path, encoder_folder: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A bundle named "editor" that draws and edits, and is the default, beside "tiny"."""
    monkeypatch.setenv("MOS_MODEL", "editor")
    torch.manual_seed(2)
    edits = EditDefaults(steps=3, cfg=2.0, cfg_interval=(0.0, 1.0), image_cfg=1.0)
    return write_bundle(
        tmp_path / "models" / "editor", encoder_folder, image_encoder=ImageEncoder(layers=4), edits=edits
    )


@pytest.fixture
def mos(cache: Path) -> Callable[..., Result]:
    """Runs the command line as typed; asserts that no traceback reaches the user."""
    from mos_cli.cli.app import app

    def run(*arguments: object, input: str | None = None) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=input)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return run


EXTRA_STYLE = "emojione"
"""A style the recipe does not learn."""


@pytest.fixture(scope="session")
def art_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every word of the bench in every style, as random blots; a few words in a further style."""
    folder, data, size = tmp_path_factory.mktemp("art"), bench_data(), 16
    keys = [(word, style) for word in data.words for style in data.styles]
    keys += [(word, EXTRA_STYLE) for word in list(data.words)[:3]]
    generator = torch.Generator().manual_seed(0)
    blots = torch.randint(0, 256, (len(keys), 4, 4, 4), generator=generator, dtype=torch.uint8)
    blots[..., 3] = 255
    pixels = blots.repeat_interleave(size // 4, 1).repeat_interleave(size // 4, 2).contiguous()
    save_file({"pixels": pixels}, folder / "art-16.safetensors", {"schema": SCHEMA})
    picture = {"keywords": (), "group": "g", "subgroup": "s"}
    manifest = {
        "schema": SCHEMA,
        "size": size,
        "sha256": sha256_of(folder / "art-16.safetensors"),
        "sets": (),
        "annotations": (),
        "counts": {"pictures": len(keys), "concepts": len(data.words), "dropped": {}},
        "pictures": [
            {"index": i, "concept": str(i), "name": word, "style": style, **picture}
            for i, (word, style) in enumerate(keys)
        ],
    }
    (folder / "art-16.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="session")
def art(art_folder: Path) -> Art:
    return load_art(art_folder)
