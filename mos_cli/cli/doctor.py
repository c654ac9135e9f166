"""`mos doctor`: what is installed, what this machine has, and what works; it downloads nothing."""

import os
import platform
import tempfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mos_cli import __version__
from mos_cli.cli.output import print_json, size_text, stdout

if TYPE_CHECKING:
    from mos_cli.bundles.adapters import AdapterBundle

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "huggingface-hub",
    "numpy",
    "pillow",
    "bitsandbytes",
    "xformers",
    "gguf",
    "resvg-py",
)


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Show versions, devices, caches and models, and what works here and what does not."""
    torch, torch_error = _import_torch()
    gpus = _gpus(torch) if torch else []
    cpu, models = _cpu(torch), _models()
    report = {
        "versions": _versions(),
        "cpu": cpu,
        "gpus": gpus,
        "caches": _caches(),
        "models": models,
        "towers": _towers(),
        "checks": [
            _check_torch(torch, torch_error),
            _check_settings(),
            *_check_models(models),
            _check_gpu(torch, gpus),
            _check_bf16(torch, cpu, gpus),
            _check("sdpa", torch is not None, "attention of PyTorch, on every device"),
            _check_xformers(torch, gpus),
            _check_package("wheel sources", "pip", "python -m ensurepip"),
            _check_package("gguf towers", "gguf", "pip install 'mos-cli[gguf]'"),
            _check_package("training data", "resvg_py", "pip install 'mos-cli[train]'"),
            *_check_folders(),
        ],
    }
    if as_json:
        print_json([report])
    else:
        _print(report)


def _import_torch() -> tuple[ModuleType | None, str]:
    try:
        import torch
    # A broken installation can raise anything here, and saying so is what this command is for.
    except Exception as error:
        return None, _first_line(error)
    return torch, ""


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"mos": __version__, "python": platform.python_version()}
    versions["system"] = platform.platform()
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _cpu(torch: ModuleType | None) -> dict[str, Any]:
    import psutil

    name, bf16 = platform.processor() or platform.machine(), None
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line.partition(":") for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()]
        facts = {key.strip().lower(): value.strip() for key, _, value in lines}
        name = facts.get("model name", name)
        flags = set(facts.get("flags", facts.get("features", "")).split())
        bf16 = sorted(flags & {"avx512_bf16", "amx_bf16", "bf16"})
    return {
        "name": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads() if torch else None,
        "memory": psutil.virtual_memory().total,
        "bf16": bf16,
    }


def _gpus(torch: Any) -> list[dict[str, Any]]:
    gpus = []
    # A GPU is counted though its driver is too old to be used.
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = [facts.major, facts.minor]
        gpus.append({"name": facts.name, "memory": total, "free": free, "capability": capability})
    return gpus


def _caches() -> list[dict[str, Any]]:
    from huggingface_hub.constants import HF_HUB_CACHE

    from mos_cli.utils.files import folder_size
    from mos_cli.utils.folders import cache_folder

    folders = {"mos": cache_folder(), "hub": Path(HF_HUB_CACHE)}
    return [{"name": name, "folder": str(path), "size": folder_size(path)} for name, path in folders.items()]


def _models() -> list[dict[str, Any]]:
    from mos_cli.bundles.adapters import AdapterBundle
    from mos_cli.bundles.bundle import bundle_folders, find_bundle
    from mos_cli.bundles.sources import tower_folder
    from mos_cli.errors import ModelError

    models = []
    for name, folder in bundle_folders().items():
        row: dict[str, Any] = {"name": name, "folder": str(folder)}
        try:
            bundle = find_bundle(name)
            if isinstance(bundle, AdapterBundle):
                models.append(row | _base_model(bundle))
                continue
            tower = bundle.index.understanding
        except ModelError as error:
            models.append(row | {"tower": None, "pulled": False, "download": None, "problem": str(error)})
            continue
        pulled = tower_folder(tower).is_dir()
        models.append(row | {"tower": tower.name, "pulled": pulled, "download": tower.size, "problem": None})
    return models


def _base_model(bundle: "AdapterBundle") -> dict[str, Any]:
    source = bundle.index.source
    size = None if source is None else source.size
    return {"tower": None, "base_model": True, "pulled": bundle.pulled, "download": size, "problem": None}


def _towers() -> list[dict[str, Any]]:
    from mos_cli.bundles.bundle import list_tower_specs
    from mos_cli.bundles.sources import tower_folder

    return [{"name": spec.name, "pulled": tower_folder(spec).is_dir()} for spec in list_tower_specs()]


def _check(what: str, ok: bool, detail: str, hint: str = "") -> dict[str, Any]:
    return {"what": what, "ok": ok, "detail": detail, "hint": "" if ok else hint}


def _check_torch(torch: ModuleType | None, error: str) -> dict[str, Any]:
    return _check("PyTorch", torch is not None, error or "can be imported", "reinstall it: pip install torch")


def _check_settings() -> dict[str, Any]:
    from mos_cli.config.settings import Settings, config_path, make_settings, resolve
    from mos_cli.errors import MosError

    variables = {name: os.environ.get(f"MOS_{name.upper()}") for name in Settings.model_fields}
    try:
        path = config_path()
        resolve(make_settings(**variables), os.environ.get("MOS_PRESET"))
    except MosError as error:
        hint = "correct the config file or the MOS_ variable"
        return _check("settings", False, str(error), hint)
    return _check("settings", True, f"from {path}" if path else "no config file")


def _check_models(models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not models:
        return [_check("models", False, "none found", "give a folder, or name their folder in MOS_MODELS")]
    checks = []
    for model in models:
        what = f"model {model['name']}"
        if model["problem"]:
            checks.append(_check(what, False, model["problem"], "restore it or remove the folder"))
        elif model.get("base_model"):
            # Whoever draws emoji needs none, so that a base model that is not here is no fault.
            detail = "ready" if model["pulled"] else "a base model, not pulled: mos models pull says what it asks"
            checks.append(_check(what, True, detail))
        elif model["pulled"]:
            checks.append(_check(what, True, f"ready; {model['tower']} is in the cache"))
        else:
            detail = f"{model['tower']} ({size_text(model['download'])} on disk) is fetched at the first run"
            checks.append(_check(what, False, detail, f"to fetch it now: mos models pull {model['name']}"))
    return checks


def _check_gpu(torch: Any, gpus: list[dict[str, Any]]) -> dict[str, Any]:
    import shutil

    from mos_cli.utils.devices import unsupported_gpu

    if torch and (unsupported := unsupported_gpu()):
        return _check("GPU", False, f"{unsupported} is not supported", "the CPU is used")
    if gpus:
        return _check("GPU", True, ", ".join(gpu["name"] for gpu in gpus))
    if torch and torch.version.cuda is None and shutil.which("nvidia-smi"):
        hint = "install a CUDA build of PyTorch to use it"
        return _check("GPU", False, "there is an NVIDIA driver, but PyTorch is a build for CPUs", hint)
    return _check("GPU", False, "no CUDA device; the CPU is used", "a small model does not need one")


def _check_bf16(torch: ModuleType | None, cpu: dict[str, Any], gpus: list[dict[str, Any]]) -> dict[str, Any]:
    from mos_cli.utils.devices import choose_precision

    capable = [gpu["name"] for gpu in gpus if gpu["capability"] >= [8, 0]]
    if not capable and torch and choose_precision(torch.device("cpu")) == "bf16":
        capable = [f"the CPU ({', '.join(cpu['bf16'] or [])})"]
    if capable:
        return _check("bf16", True, "fast on " + ", ".join(capable))
    known = "this CPU has no bf16 instructions" if cpu["bf16"] == [] else "unknown for this CPU"
    return _check("bf16", False, "this CPU computes faster in fp32" if cpu["bf16"] else known, "fp32 is used")


def _check_xformers(torch: Any, gpus: list[dict[str, Any]]) -> dict[str, Any]:
    from mos_cli.utils.xformers_runtime import load_xformers_runtime, missing_runtime, runtime_library

    what, instead, install = (
        "xformers",
        "sdpa is used",
        "to add it: pip install 'mos-cli[cuda]'; sdpa is used until then",
    )
    if find_spec("xformers") is None:
        return _check(what, False, "not installed", install if gpus else f"it needs an NVIDIA GPU; {instead}")
    if not gpus:
        return _check(what, False, "installed, but it needs an NVIDIA GPU", instead)
    missing = missing_runtime()
    if missing is not None and runtime_library(missing) is None:
        detail = f"it needs the runtime of CUDA {missing}, and this PyTorch has CUDA {torch.version.cuda}"
        return _check(what, False, detail, install)
    try:
        load_xformers_runtime()
        from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports] (the extra `cuda`)

        query = torch.ones(1, 64, 2, 64, device="cuda", dtype=torch.float16)
        memory_efficient_attention(query, query, query)
    # It fails in many ways, from a wrong CUDA version to a GPU without an operator; each is reported.
    except Exception as error:
        return _check(what, False, f"fails on this GPU: {_first_line(error)}", instead)
    return _check(what, True, f"works on {gpus[0]['name']}")


def _check_package(what: str, module: str, remedy: str) -> dict[str, Any]:
    found = find_spec(module) is not None
    return _check(what, found, f"{module} is {'' if found else 'not '}installed", f"to add it: {remedy}")


def _check_folders() -> list[dict[str, Any]]:
    from mos_cli.utils.folders import cache_folder

    checks = []
    for what, folder in (("cache folder", cache_folder()), ("current folder", Path.cwd())):
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        try:
            # Permissions do not tell: the disk may be read-only, or the folder no real one.
            with tempfile.TemporaryFile(dir=nearest):
                writable = True
        except OSError:
            writable = False
        detail = f"{folder} {'can' if writable else 'cannot'} be written"
        remedy = "set MOS_CACHE to another folder" if what == "cache folder" else "use --output with another folder"
        checks.append(_check(what, writable, detail, remedy))
    return checks


def _print(report: dict[str, Any]) -> None:
    def line(heading: str, text: str) -> None:
        stdout.print(f"{heading:<16} {text}", markup=False, soft_wrap=True)

    for package, version in report["versions"].items():
        line(package, version or "not installed")
    cpu = report["cpu"]
    threads = f", {_number(cpu['threads'], 'thread')}" if cpu["threads"] else ""
    line("CPU", f"{cpu['name']}, {_number(cpu['cores'], 'core')}{threads}, {size_text(cpu['memory'])} of memory")
    for gpu in report["gpus"]:
        free = f"{size_text(gpu['free'])} of {size_text(gpu['memory'])} free"
        line("GPU", f"{gpu['name']}, compute {'.'.join(map(str, gpu['capability']))}, {free}")
    for cache in report["caches"]:
        line(f"{cache['name']} cache", f"{cache['folder']}, {size_text(cache['size'])}")
    for tower in report["towers"]:
        line("tower", f"{tower['name']}, {'in the cache' if tower['pulled'] else 'not pulled'}")
    stdout.print()
    for check in report["checks"]:
        mark = "[green]ok[/]" if check["ok"] else "[yellow]no[/]"
        stdout.print(mark, end=" ")
        line(check["what"], check["detail"] + (f" ({check['hint']})" if check["hint"] else ""))


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
