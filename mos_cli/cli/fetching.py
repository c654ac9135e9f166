"""Fetching an understanding tower before the eyes of the user."""

from pathlib import Path
from typing import TYPE_CHECKING

from mos_cli.cli import console

if TYPE_CHECKING:
    from mos_cli.bundles.specs import TowerSpec


def fetch_with_progress(spec: "TowerSpec") -> Path:
    """Fetches a tower as `fetch_tower` does, with a progress bar on stderr if it is not cached yet."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from mos_cli.bundles.sources import fetch_tower, tower_folder

    if tower_folder(spec).is_dir():
        return fetch_tower(spec)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(24),
        TextColumn("{task.fields[size]}"),
        TimeRemainingColumn(),
    )
    terminal = console.err.is_terminal
    if not terminal:
        console.err.print(f"fetching {spec.name} ({size_text(spec.size)})")
    with Progress(*columns, console=console.err, transient=True, disable=not terminal) as bars:

        def report(what: str, done: int, total: int) -> None:
            size = f"{size_text(done)} of {size_text(total)}" if total else ""
            if bars.tasks and bars.tasks[0].description == what:
                bars.update(bars.tasks[0].id, completed=done, size=size)
                return
            for task in bars.tasks:
                bars.remove_task(task.id)
            bars.add_task(what, completed=done, total=total or None, size=size)

        return fetch_tower(spec, report)


def size_text(size: int) -> str:
    """A number of bytes as people read it, in decimal units."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} B"
