"""The kit for a GPU machine without a network: its packages need nothing else, its art draws the same scenes."""

import os
import subprocess
import tarfile
from importlib import metadata
from io import BytesIO
from pathlib import Path

import gpu_kit
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mos_cli.datasets.art.file import load_art
from mos_cli.datasets.scenes.vocabulary import load_vocabulary
from mos_cli.datasets.tables import DataTable
from mos_cli.evaluation.scenebench import bench_data

WORDS = dict(list(bench_data().words.items())[:2])
DATA = DataTable(words=WORDS, styles=("fluent-3d", "noto"))


def test_packages_are_pinned_and_need_no_others() -> None:
    pinned = {requirement.name: requirement for requirement in map(Requirement, gpu_kit.lacking())}
    assert str(pinned["diffusers"].specifier) == f"=={metadata.version('diffusers')}"
    assert {"pydantic", "inflect", "bitsandbytes", "xformers", "nvidia-cuda-runtime-cu12"} <= set(pinned)
    assert not set(pinned) & gpu_kit.PRESENT
    for name in set(pinned) - {"xformers", "nvidia-cuda-runtime-cu12"}:
        for needed in map(Requirement, metadata.requires(name) or ()):
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                assert canonicalize_name(needed.name) in {*pinned, *gpu_kit.PRESENT}


def test_the_art_of_a_recipe_has_its_pictures_alone(tmp_path: Path, art_folder: Path) -> None:
    gpu_kit.add_art(tmp_path / "kit", art_folder, DATA)
    whole, kept = load_art(art_folder), load_art(tmp_path / "kit")
    assert len(kept.manifest.pictures) == 4 < len(whole.manifest.pictures)
    assert (kept.manifest.counts.pictures, kept.manifest.counts.concepts) == (4, 2)
    one, other = load_vocabulary(whole, DATA), load_vocabulary(kept, DATA)
    assert one.words == other.words
    assert torch.equal(one.sprites_VHW4, other.sprites_VHW4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    weights = tmp_path / "folder" / "mos" / "models" / "weights.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(os.urandom(2500))
    (tmp_path / "folder" / "setup.sh").write_text(gpu_kit.SETUP)
    return tmp_path / "folder"


def test_parts_are_one_archive(tmp_path: Path, folder: Path) -> None:
    parts = gpu_kit.pack(tmp_path / "kit", folder, 1000)
    assert len(parts) > 2
    assert max(part.stat().st_size for part in parts) == 1000
    with tarfile.open(fileobj=BytesIO(b"".join(part.read_bytes() for part in parts))) as archive:
        archive.extractall(tmp_path / "there", filter="data")
    for path in folder.rglob("*.*"):
        assert (tmp_path / "there" / path.relative_to(folder)).read_bytes() == path.read_bytes()


def test_parts_of_an_earlier_kit_are_removed(tmp_path: Path, folder: Path) -> None:
    gpu_kit.pack(tmp_path / "kit", folder, 1000)
    (part,) = gpu_kit.pack(tmp_path / "kit", folder, 1 << 20)
    assert list((tmp_path / "kit").iterdir()) == [part]


def test_a_checkout_is_its_files_that_git_knows(tmp_path: Path) -> None:
    (checkout := tmp_path / "checkout" / "models").mkdir(parents=True)
    (checkout / "weights.safetensors").write_bytes(b"weights")
    (checkout / "notes.txt").write_text("mine")
    for command in (["init", "-q"], ["add", "models/weights.safetensors"]):
        subprocess.run(["git", *command], cwd=checkout.parent, check=True)
    gpu_kit.add_checkout(tmp_path / "kit", checkout.parent)
    (copied,) = (path for path in (tmp_path / "kit").rglob("*") if path.is_file())
    assert copied == tmp_path / "kit" / "models" / "weights.safetensors"
    assert copied.read_bytes() == b"weights"


def test_setup_sets_paths_and_goes_to_the_checkout(tmp_path: Path, folder: Path) -> None:
    script = f". {folder}/setup.sh && echo $PYTHONPATH $MOS_CACHE $PWD"
    shell = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert shell.stdout.split() == [f"{folder}/site:{folder}/mos", f"{folder}/cache", f"{folder}/mos"]
