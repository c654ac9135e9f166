"""Validation of data from files: the base of all pydantic models, and types that several of them use."""

from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)

from mos_cli.errors import ModelError

PLAIN_NAME = r"^[A-Za-z0-9_][A-Za-z0-9._-]*$"
HUB_ID = r"^[A-Za-z0-9_][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*$"


PlainName = Annotated[str, StringConstraints(pattern=PLAIN_NAME)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Frozen(BaseModel):
    """An immutable value read from a file, in which unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", serialize_by_alias=True, allow_inf_nan=False)


def _two_times(value: object) -> object:
    return value.split(",") if isinstance(value, str) else value


def _in_order(interval: tuple[float, float]) -> tuple[float, float]:
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ValueError(f"{low},{high} must be two times in 0..1, the smaller first")
    return interval


Interval = Annotated[tuple[float, float], BeforeValidator(_two_times), AfterValidator(_in_order)]
"""Two times t, where 1 is pure noise and 0 the picture; as text "0.1,0.9"."""


Solver = Literal["euler", "ab2"]
"""The solver of the flow: Euler's method, or the two-step Adams-Bashforth method."""
DEFAULT_SOLVER: Solver = "ab2"


def _one_rule(value: object) -> object:
    return (value,) if isinstance(value, str) else value


RouteRules = Annotated[tuple[str, ...], BeforeValidator(_one_rule), Field(min_length=1)]
"""Route rules as text; a single string is one rule."""


_Model = TypeVar("_Model", bound=BaseModel)


def read_json(model: type[_Model], path: Path) -> _Model:
    """Reads one JSON file as `model`; raises ModelError with the file and the first thing wrong in it."""
    try:
        return model.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from None
    except ValidationError as error:
        raise ModelError(f"{path}: {first_problem(error)}") from None


def first_problem(error: ValidationError) -> str:
    """The first problem of a validation error, in one line, with the field it is in."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    message = "unknown setting" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
