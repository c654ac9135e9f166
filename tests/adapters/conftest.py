"""Diffusers folders of tiny base models, made once, and pipelines loaded from them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mos_cli.adapters.pipeline import AdapterPipeline
from mos_cli.bundles.adapters import AdapterBundle, read_adapter
from tests.helpers import tiny_base_models

MAKERS: dict[str, Callable[[], Any]] = {
    "klein": tiny_base_models.klein,
    "klein-base": lambda: tiny_base_models.klein(distilled=False),
    "z-image": tiny_base_models.z_image,
    "prx": tiny_base_models.prx,
}


@pytest.fixture(scope="session")
def base_folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The diffusers folder of a tiny base model, by name; read only."""
    root = tmp_path_factory.mktemp("base-models")

    def folder(name: str) -> Path:
        path = root / name
        if not path.is_dir():
            tiny_base_models.save(MAKERS[name](), path)
        return path

    return folder


@pytest.fixture
def in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands draw in full precision."""
    monkeypatch.setenv("MOS_PRECISION", "fp32")


@pytest.fixture(scope="session")
def loaded(base_folders: Callable[[str], Path]) -> Callable[..., AdapterPipeline]:
    """A loaded base model by name and precision, shared by the session: tests leave it as it is."""
    pipelines: dict[tuple[str, str], AdapterPipeline] = {}

    def load(name: str, precision: str = "fp32") -> AdapterPipeline:
        if (name, precision) not in pipelines:
            bundle = read_adapter(base_folders(name))
            assert isinstance(bundle, AdapterBundle)
            pipelines[name, precision] = AdapterPipeline(bundle, device=torch.device("cpu"), precision=precision)
        return pipelines[name, precision]

    return load
