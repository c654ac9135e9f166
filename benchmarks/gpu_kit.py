"""A kit for a GPU machine without a network: what `gpu_day.py` needs there beside PyTorch.

python benchmarks/gpu_kit.py KIT [--recipe train-emoji-more] [--art DIR] [--python 3.12] [--cuda 130] [--part 60]

KIT/part-0, part-1, ... are a tar.xz in parts of so many MiB, for a connection that takes no larger file. In it:

mos      the files of this checkout
site     the packages that mos needs and a machine for PyTorch lacks, in the versions of this environment
cache    the towers of the default model and of the recipe, and the recipe's pictures as an art file
setup.sh sets the paths and goes to the checkout

There: cat part-* | xz -dT0 | tar x -C DIR && . DIR/setup.sh. docs/gpu-day.md has the whole procedure.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.torch import save_file

from mos_cli.bundles.bundle import find_bundle
from mos_cli.bundles.sources import fetch_tower
from mos_cli.config.settings import RunSettings
from mos_cli.datasets.art.file import SCHEMA, ArtManifest, data_folder, load_art
from mos_cli.datasets.tables import DataTable
from mos_cli.towers.efficientnet import features_spec
from mos_cli.training.recipe import TrainRecipe, load_recipe
from mos_cli.training.references import understanding_of
from mos_cli.utils.files import sha256_of
from mos_cli.utils.folders import cache_folder
from mos_cli.utils.quiet import quieten

CHECKOUT = Path(__file__).resolve().parents[1]
PRESENT = {
    *("accelerate", "filelock", "huggingface-hub", "matplotlib", "numpy", "packaging", "peft", "pillow", "psutil"),
    *("regex", "requests", "safetensors", "shellingham", "tensorboard", "torch", "transformers", "typing-extensions"),
}
"""Packages of a machine for PyTorch, with what they need."""
PLATFORMS = ("2_34", "2_28", "2_27", "2_24", "2_17")
SETUP = """\
# For bash: `. DIR/setup.sh`.
kit=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH=$kit/site:$kit/mos MOS_CACHE=$kit/cache HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
cd "$kit/mos"
"""


def lacking() -> Iterator[str]:
    """The requirements of mos and of training with it that are not `PRESENT`, and theirs in turn, pinned."""
    seen: set[str] = set(PRESENT)
    todo: list[tuple[str, tuple[str, ...]]] = [("mos-cli", ("train", "cuda"))]
    while todo:
        name, extras = todo.pop()
        for requirement in map(Requirement, metadata.requires(name) or ()):
            wanted = requirement.marker is None or any(
                requirement.marker.evaluate({"extra": extra}) for extra in extras or ("",)
            )
            key = canonicalize_name(requirement.name)
            if not wanted or key in seen:
                continue
            seen.add(key)
            try:
                yield f"{key}=={metadata.version(key)}"
            except metadata.PackageNotFoundError:
                # The packages for CUDA: they need nothing else.
                yield f"{key}{requirement.specifier}"
            else:
                todo.append((key, ()))


def add_checkout(folder: Path, checkout: Path = CHECKOUT) -> None:
    """Copies the files of a checkout that git knows, as they are."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=checkout, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(checkout / name, folder / name)


def add_site(site: Path, python: str, cuda: str) -> None:
    """Unpacks the wheels of `lacking` for a Linux machine; of bitsandbytes' libraries only those for its CUDA."""
    with tempfile.TemporaryDirectory() as wheels:
        platforms = [f"--platform=manylinux_{glibc}_x86_64" for glibc in PLATFORMS]
        kind = ["--no-deps", "--only-binary=:all:", f"--python-version={python}", "--implementation=cp", *platforms]
        download = [sys.executable, "-m", "pip", "download", "--quiet", "-d", wheels, *kind]
        subprocess.run([*download, "--platform=manylinux2014_x86_64", *lacking()], check=True)
        for wheel in Path(wheels).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                other = re.compile(rf"libbitsandbytes_(?!cpu|cuda{cuda})")
                archive.extractall(site, [name for name in archive.namelist() if not other.search(name)])


def add_towers(cache: Path, recipe: TrainRecipe) -> None:
    """Copies the towers of the default model and of the recipe."""
    start = None if recipe.start_from is None else find_bundle(recipe.start_from)
    default = find_bundle(RunSettings().model)
    folders = {fetch_tower(default.index.understanding), understanding_of(recipe, start)[1]}
    if recipe.image_encoder is not None:
        folders.add(fetch_tower(features_spec()))
    for folder in folders:
        shutil.copytree(folder, cache / folder.relative_to(cache_folder()))


def add_art(folder: Path, source: Path, data: DataTable) -> None:
    """Writes an art file with the pictures of the recipe's words in its styles alone."""
    art = load_art(source)
    named = {(picture.name, picture.style): picture for picture in art.manifest.pictures}
    kept = [named[word, style] for word in data.words for style in data.styles]
    folder.mkdir(parents=True)
    pixels = folder / f"art-{art.manifest.size}.safetensors"
    save_file({"pixels": art.pixels[[picture.index for picture in kept]]}, pixels, {"schema": SCHEMA})
    pictures = tuple(picture.model_copy(update={"index": index}) for index, picture in enumerate(kept))
    words, sets = len(data.words), [one for one in art.manifest.sets if one.style in data.styles]
    manifest: ArtManifest = art.manifest.model_copy(
        update={
            "sha256": sha256_of(pixels),
            "sets": tuple(one.model_copy(update={"pictures": words}) for one in sets),
            "counts": art.manifest.counts.model_copy(update={"pictures": len(kept), "concepts": words}),
            "pictures": pictures,
        }
    )
    pixels.with_suffix(".json").write_text(manifest.model_dump_json(by_alias=True) + "\n", encoding="utf-8")


def pack(kit: Path, folder: Path, part: int) -> list[Path]:
    """Packs `folder` into parts of so many bytes at most; returns them."""
    kit.mkdir(parents=True, exist_ok=True)
    for old in kit.glob("part-*"):
        old.unlink()
    parts = []
    with tempfile.NamedTemporaryFile(suffix=".tar") as whole:
        with tarfile.open(fileobj=whole, mode="w") as archive:
            for path in sorted(folder.iterdir()):
                archive.add(path, path.name)
        whole.flush()
        # In blocks, which are unpacked side by side.
        packing = subprocess.Popen(["xz", "-3", "-T0", "--block-size=8MiB", "-c", whole.name], stdout=subprocess.PIPE)
        assert packing.stdout is not None
        while data := packing.stdout.read(part):
            parts.append(kit / f"part-{len(parts)}")
            parts[-1].write_bytes(data)
        if packing.wait():
            raise subprocess.CalledProcessError(packing.returncode, packing.args)
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kit", type=Path)
    parser.add_argument("--recipe", default="train-emoji-more")
    parser.add_argument("--art", type=Path, default=data_folder())
    parser.add_argument("--python", default="3.12", help="its version there")
    parser.add_argument("--cuda", default="130", help="that of PyTorch there, for bitsandbytes")
    parser.add_argument("--part", type=int, default=60, help="MiB")
    options = parser.parse_args()
    quieten()
    recipe = load_recipe(options.recipe)
    assert isinstance(recipe.data, DataTable), "recipes of captioned pictures need those, and no art"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        add_checkout(folder / "mos")
        add_site(folder / "site", options.python, options.cuda)
        add_towers(folder / "cache", recipe)
        add_art(folder / "cache" / "data", options.art, recipe.data)
        (folder / "setup.sh").write_text(SETUP)
        for path in pack(options.kit, folder, options.part << 20):
            print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
