"""What is in the wheel and in the sdist, and how large they are."""

import hashlib
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[2]
CACHES = re.compile(r"__pycache__|\.pyc$|(^|/)\.(\w+_cache|venv|hypothesis)|(^|/)(outputs|runs|dist|build)/")
SIZE = 64e6
"""Of each, in bytes: 25 MB of them are weights."""


def files(folder: Path) -> list[str]:
    """The files below a folder, without caches."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return [name for name in names if not CACHES.search(name)]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", folder], cwd=ROOT, check=True, capture_output=True
    )
    return folder


@pytest.mark.slow
def test_the_wheel_is_the_package_with_models_and_presets(built: Path) -> None:
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as wheel:
        contents = {name: wheel.read(name) for name in wheel.namelist()}
    names = [name for name in contents if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in names} == {"mos_cli"}
    shipped = {f"mos_cli/{name}" for name in files(ROOT / "mos_cli")}
    shipped |= {f"mos_cli/_data/{top}/{name}" for top in ("models", "presets") for name in files(ROOT / top)}
    assert sorted(names) == sorted(shipped)
    weights = [data for name, data in contents.items() if PurePosixPath(name).suffix == ".safetensors"]
    assert len({hashlib.sha256(data).digest() for data in weights}) == len(weights) > 0
    assert path.stat().st_size < SIZE


@pytest.mark.slow
def test_the_sdist_has_what_builds_and_tests_it(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as sdist:
        names = [member.name.partition("/")[2] for member in sdist.getmembers() if member.isfile()]
    assert {name.split("/")[0] for name in names} >= {"mos_cli", "models", "presets", "tests", "docs", "pyproject.toml"}
    assert [name for name in names if CACHES.search(name)] == []
    assert len(names) == len(set(names))
    assert path.stat().st_size < SIZE
