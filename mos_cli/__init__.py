"""mos: local, steerable image generation with Mixture of States.

`mos_cli.load` is the Python interface; docs/api.md describes it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mos_cli.adapters.model import load as load

__version__ = "0.3.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    # Imported when it is used: PyTorch takes seconds, and the command line imports this package too.
    if name == "load":
        # As the command line does, before PyTorch and what it comes with are imported.
        import_module("mos_cli.utils.threads").limit_spinning()
        import_module("mos_cli.utils.quiet").quieten()
        return import_module("mos_cli.adapters.model").load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
