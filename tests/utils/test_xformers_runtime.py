"""xformers finds the CUDA runtime that it was built for, beside a PyTorch of another version of CUDA."""

import _ctypes
import json
import subprocess
import sys
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from mos_cli.errors import DeviceError
from mos_cli.towers.attention import Attention, choose_attention
from mos_cli.utils.xformers_runtime import missing_runtime, runtime_library

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NEEDED = {each.name: each for each in map(Requirement, PROJECT["dependencies"])}
EXTRA = {each.name: each for each in map(Requirement, PROJECT["optional-dependencies"]["cuda"])}
RUNTIME = "nvidia-cuda-runtime-cu12"
XFORMERS = """
from pathlib import Path
print("xformers", "libcudart.so.12" in Path("/proc/self/maps").read_text())
"""
FIRST = """
import os, sys
from importlib import import_module
sys.path.insert(0, sys.argv[1])
import torch
torch.version.cuda = "13.0"
for module in sys.argv[2:]:
    if os.fork() == 0:
        import_module(f"mos_cli.{module}")
        sys.exit()
    assert os.wait()[1] == 0
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path with stand-ins of xformers and of the runtime's package."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "xformers", raising=False)
    library = Path("nvidia/cuda_runtime/lib/libcudart.so.12")
    for name, version, file in (("xformers", "0.0.35", "xformers/__init__.py"), (RUNTIME, "12.8.90", library)):
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (folder / "RECORD").write_text(f"{file},,\n")
    (tmp_path / "xformers").mkdir()
    (tmp_path / "xformers" / "__init__.py").write_text(XFORMERS)
    (tmp_path / "xformers" / "ops.py").touch()
    (tmp_path / "xformers" / "cpp_lib.json").write_text(json.dumps({"version": {"cuda": 1208}}))
    (tmp_path / library).parent.mkdir(parents=True)
    # Any library will do to see that it is loaded.
    (tmp_path / library).write_bytes(Path(_ctypes.__file__).read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("cuda", "missing"),
    [("13.0", 12), ("12.8", None), ("12.6", None), (None, None)],
    ids=["13.0", "12.8", "12.6", "cpu"],
)
def test_the_runtime_is_missing_where_pytorch_has_another_major_version(installed, monkeypatch, cuda, missing) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert missing_runtime() == missing


def test_a_build_for_rocm_misses_nothing(installed, monkeypatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (installed / "xformers" / "cpp_lib.json").write_text(json.dumps({"version": {"cuda": None}}))
    assert missing_runtime() is None


def test_the_library_is_that_of_the_package(installed) -> None:
    assert runtime_library(12) == installed / "nvidia/cuda_runtime/lib/libcudart.so.12"
    assert runtime_library(11) is None


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the package is for Linux")
def test_the_library_is_loaded_before_xformers(installed) -> None:
    """Whichever module is imported first: each in a process of its own, which has PyTorch from the one it came from."""
    modules = ("towers.attention", "sampling.feature_cache", "inference.model", "training.run")
    command = [sys.executable, "-u", "-c", FIRST, str(installed), *modules]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines() == ["xformers True"] * len(modules)


def test_what_is_not_installed_is_named_with_its_extra(monkeypatch) -> None:
    monkeypatch.setattr("mos_cli.towers.attention.find_spec", lambda name: None)
    with pytest.raises(DeviceError, match=r"pip install 'mos-cli\[cuda\]'"):
        choose_attention(Attention(32, 2), "xformers")


def test_an_installation_for_a_cpu_has_neither() -> None:
    assert "torch" in NEEDED
    assert EXTRA.keys() == {"xformers", RUNTIME}
    assert not NEEDED.keys() & EXTRA.keys()


@pytest.mark.slow
def test_the_pinned_wheels_belong_together(tmp_path) -> None:
    """Fetches both wheels (4 MB): what the one needs, the other or PyTorch has."""
    from elftools.elf.dynamic import DynamicSection
    from elftools.elf.elffile import ELFFile

    platform = ["--platform", "manylinux_2_28_x86_64", "--platform", "manylinux2014_x86_64", "--only-binary", ":all:"]
    wanted = [f"{name}{requirement.specifier}" for name, requirement in EXTRA.items()]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(tmp_path), *platform]
    subprocess.run([*pip, *wanted], check=True)
    xformers, package = (zipfile.ZipFile(next(tmp_path.glob(f"{name}*.whl"))) for name in ("xformers", "nvidia"))

    def dynamic(wheel: zipfile.ZipFile, tag: str) -> set[str]:
        names: set[str] = set()
        for member in wheel.namelist():
            if ".so" in Path(member).name:
                with wheel.open(member) as file:
                    section = ELFFile(file).get_section_by_name(".dynamic")
                    assert isinstance(section, DynamicSection)
                    names |= {getattr(entry, tag[3:].lower()) for entry in section.iter_tags(tag)}
        return names

    (about,) = (name for name in xformers.namelist() if name.endswith(".dist-info/METADATA"))
    needs = message_from_bytes(xformers.read(about)).get_all("Requires-Dist") or []
    (torch_range,) = (each.specifier for each in map(Requirement, needs) if each.name == "torch")
    built = json.loads(xformers.read("xformers/cpp_lib.json"))["version"]
    lowest = min(Version(each.version) for each in NEEDED["torch"].specifier if each.operator == ">=")
    assert lowest in torch_range
    assert Version(built["torch"]) >= lowest

    of_pytorch = {f"lib{name}.so" for name in ("c10", "c10_cuda", "torch", "torch_cpu", "torch_cuda", "torch_python")}
    of_system = {f"lib{name}" for name in ("stdc++.so.6", "m.so.6", "gcc_s.so.1", "pthread.so.0", "c.so.6")}
    left = dynamic(xformers, "DT_NEEDED") - of_pytorch - of_system - {"ld-linux-x86-64.so.2"}
    assert left == dynamic(package, "DT_SONAME") == {f"libcudart.so.{built['cuda'] // 100}"}
    assert Path(str(package.filename)).name.split("-")[1].startswith(f"{built['cuda'] // 100}.{built['cuda'] % 100}.")
