"""What a shell completes: names and paths. Nothing here imports torch."""

from collections.abc import Callable, Iterator
from pathlib import Path


def model_names(incomplete: str) -> list[str]:
    """The bundles that can be found by name."""
    from mos_cli.bundles.bundle import bundle_folders

    return _beginning(incomplete, bundle_folders())


def model_and_tower_names(incomplete: str) -> list[str]:
    """The bundles, and the understanding towers."""
    from mos_cli.utils.folders import models_folder

    towers = [path.stem for path in (models_folder() / "towers").glob("*.json")]
    return [*model_names(incomplete), *_beginning(incomplete, towers)]


def tower_names(incomplete: str) -> list[str]:
    """The understanding towers in the cache."""
    from mos_cli.bundles.sources import cached_towers

    return _beginning(incomplete, [path.name.rpartition("-")[0] for path in cached_towers()])


def plannable_names(incomplete: str) -> list[str]:
    """The bundles, and the blueprints."""
    from mos_cli.utils.folders import list_blueprints

    return [*model_names(incomplete), *_beginning(incomplete, list_blueprints())]


def blueprint_names(incomplete: str) -> list[str]:
    """The models without weights."""
    from mos_cli.utils.folders import list_blueprints

    return _beginning(incomplete, list_blueprints())


def preset_names(incomplete: str) -> list[str]:
    """The presets for drawing, and the user's own files."""
    names = [name for name in _presets() if not name.startswith("train-")]
    return [*_beginning(incomplete, names), *_paths(incomplete, ".toml")]


def recipe_names(incomplete: str) -> list[str]:
    """The training recipes, and the user's own files."""
    names = [name for name in _presets() if name.startswith("train-")]
    return [*_beginning(incomplete, names), *_paths(incomplete, ".toml")]


def trace_paths(incomplete: str) -> list[str]:
    """The heads of traces, which lie beside a picture, and folders."""
    return list(_paths(incomplete, ".json"))


def picture_paths(incomplete: str) -> list[str]:
    """Pictures that this tool writes, and folders."""
    return list(_paths(incomplete, ".png", ".jpg", ".jpeg", ".webp"))


def choices(*names: str) -> Callable[[str], list[str]]:
    """Completes one of these names."""

    def complete(incomplete: str) -> list[str]:
        return _beginning(incomplete, list(names))

    return complete


def _presets() -> list[str]:
    from mos_cli.utils.folders import presets_folder

    return [path.stem for path in presets_folder().glob("*.toml")]


def _beginning(incomplete: str, names: "dict[str, Path] | list[str]") -> list[str]:
    return sorted(name for name in names if name.startswith(incomplete))


def _paths(incomplete: str, *suffixes: str) -> Iterator[str]:
    """The files with one of the suffixes, and the folders, that begin as what was typed."""
    folder, slash, begun = incomplete.rpartition("/")
    shown = folder + slash
    try:
        found = sorted(Path(shown or ".").expanduser().iterdir())
    except (OSError, RuntimeError):
        return
    for path in found:
        if path.name.startswith(begun) and (begun or not path.name.startswith(".")):
            if path.is_dir():
                yield f"{shown}{path.name}/"
            elif path.suffix in suffixes and (path.suffix != ".json" or _is_trace(path)):
                yield f"{shown}{path.name}"


def _is_trace(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return b'"mos-trace/' in file.read(200)
    except OSError:
        return False
