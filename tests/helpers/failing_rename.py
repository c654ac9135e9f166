"""A rename that fails, as on Windows where a file of a folder is open."""

from pathlib import Path

import pytest


def fail_first_rename(monkeypatch: pytest.MonkeyPatch, target: Path) -> None:
    """The next rename to `target` raises PermissionError; those after it succeed."""
    rename, failures = Path.rename, iter([PermissionError(13, "Permission denied")])

    def renamed(self: Path, to: Path) -> Path:
        if to == target and (failure := next(failures, None)) is not None:
            raise failure
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", renamed)
