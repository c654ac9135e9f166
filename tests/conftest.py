"""Fixtures that several packages use: small random towers, bundles made of them, and the command line.

Functions that tests share are in `tests/helpers/`.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel
from typer.testing import CliRunner, Result

from mos_cli.bundles.bundle import Bundle
from mos_cli.bundles.specs import EditDefaults
from mos_cli.datasets.art.file import Art, load_art
from mos_cli.towers.image_encoder import ImageEncoder
from tests.helpers.random_art import write_art
from tests.helpers.tiny_bundle import WORDS, save_tokenizer, write_bundle

# No test measures time.
hypothesis.settings.register_profile("mos", deadline=None)
hypothesis.settings.load_profile("mos")


@pytest.fixture(autouse=True)
def number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of CPU threads is as if the user had set it: pictures do not depend on what else the machine does."""
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A three-layer BERT with random weights."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=24, **sizes)).save_pretrained(folder)
    save_tokenizer(folder, marks=True)
    return folder


@pytest.fixture(scope="session")
def decoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A four-layer Llama with random weights."""
    folder = tmp_path_factory.mktemp("decoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    LlamaModel(LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=24, **sizes)).save_pretrained(folder)
    save_tokenizer(folder, marks=False)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache and settings of the test's own."""
    monkeypatch.setenv("MOS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MOS_DATA", str(tmp_path.with_name(f"{tmp_path.name}-data")))
    (tmp_path / "config.toml").write_text("[generate]\n")
    monkeypatch.setenv("MOS_CONFIG", str(tmp_path / "config.toml"))
    return tmp_path / "cache"


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
        if arguments[:1] == ("train",) and (accelerate := sys.modules.get("accelerate.state")) is not None:
            # A training is a process of its own: the one before may have had another precision.
            accelerate.AcceleratorState._reset_state()
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=input)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return run


@pytest.fixture(scope="session")
def art_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An art file of every word of the bench in every style; see `write_art`."""
    folder = tmp_path_factory.mktemp("art")
    write_art(folder)
    return folder


@pytest.fixture(scope="session")
def art(art_folder: Path) -> Art:
    """The art file of `art_folder`, read."""
    return load_art(art_folder)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The system's Chromium; without it these tests are skipped, but fail where MOS_TEST_BROWSER=1 asks for them."""
    missing = None
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing = "playwright is not installed"
    chromium = shutil.which("chromium")
    if chromium is None:
        missing = "there is no chromium on the PATH"
    if missing:
        (pytest.fail if os.environ.get("MOS_TEST_BROWSER") == "1" else pytest.skip)(f"browser tests: {missing}")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()
