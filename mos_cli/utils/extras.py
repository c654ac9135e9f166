"""Packages that only some commands need, installed as extras of this one."""

from importlib.util import find_spec

from mos_cli.errors import UsageError


def require(what: str, extra: str, *modules: str) -> None:
    """Raises UsageError, naming the extra to install, if one of the modules is not installed; imports none."""
    for module in modules:
        if find_spec(module) is None:
            raise UsageError(f"{what} needs {module.replace('_', '-')}: pip install 'mos-cli[{extra}]'")
