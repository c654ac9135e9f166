"""Methods of quantisation. Imports no torch."""

from typing import Annotated, Literal

from pydantic import AfterValidator

from mos_cli.utils.migration import current_weight
from mos_cli.utils.validation import Frozen

Method = Literal["nf4", "int8"]
METHODS: dict[Method, str] = {"nf4": "4-bit NF4, double quantisation", "int8": "8-bit integers"}

HEADER = "mos_quantisation"
"""The field of a safetensors header with the quantisation of its tensors."""


class Quantisation(Frozen):
    """The quantisation of a network: the method, and the modules that stay in high precision.

    `kept` names modules; everything in a module is kept with it.
    """

    method: Method
    kept: tuple[Annotated[str, AfterValidator(current_weight)], ...]

    def keeps(self, module: str) -> bool:
        """Whether a module is kept, by its full name."""
        return any(module == name or module.startswith(f"{name}.") for name in self.kept)

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata for the header of a quantised file."""
        return {"format": "pt", HEADER: self.model_dump_json()}
