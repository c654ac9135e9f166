"""Packages that are imported when they are first used."""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def defer(name: str) -> None:
    """Lets `import name`, here and in libraries, import the package when an attribute of it is first used.

    Without effect if the package is not installed, or was imported before. (importlib's LazyLoader imports a module at
    the second `import` of it, and when a library asks whether it is installed.)
    """
    if name not in sys.modules and (spec := find_spec(name)) is not None:
        sys.modules[name] = module = _Deferred(name)
        module.__spec__, module.__file__ = spec, spec.origin


class _Deferred(ModuleType):
    """Stands for a package; `__getattr__` is called for what is not there yet."""

    def __getattr__(self, attribute: str) -> Any:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        package = import_module(self.__name__)
        self.__dict__.update(package.__dict__)
        return getattr(package, attribute)
