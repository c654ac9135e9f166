"""The CUDA runtime of xformers, where PyTorch is a build for another major version of CUDA.

The compiled part of xformers is linked to the CUDA runtime of one major version. Where PyTorch does not bring that
version, the package `nvidia-cuda-runtime-cu12` does (the extra `cuda`), and its library must be in the process before
xformers is imported. diffusers imports xformers together with its models.
"""

import ctypes
import json
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path


def load_xformers_runtime() -> None:
    """Loads the library of `missing_runtime` if its package is installed; call before the first import of diffusers."""
    major = missing_runtime()
    if major is not None and (library := runtime_library(major)) is not None:
        ctypes.CDLL(str(library))


def missing_runtime() -> int | None:
    """The major version of CUDA that xformers was built for, if PyTorch was built for another one; else None."""
    import torch

    spec = find_spec("xformers")
    if spec is None or spec.origin is None or torch.version.cuda is None:
        return None
    built = Path(spec.origin).with_name("cpp_lib.json")
    number = json.loads(built.read_text(encoding="utf-8"))["version"]["cuda"] if built.exists() else None
    # Stored as 1208 for CUDA 12.8.
    major = None if number is None else number // 100
    return None if major == int(torch.version.cuda.partition(".")[0]) else major


def runtime_library(major: int) -> Path | None:
    """The CUDA runtime of this major version in the installed package; None if it is not installed."""
    try:
        files = metadata.files(f"nvidia-cuda-runtime-cu{major}") or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name == f"libcudart.so.{major}"), None)
