"""Validation of data from files: the base of all pydantic models, and types that several of them use."""

import difflib
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)

from mos_cli.errors import InputError, ModelError

PLAIN_NAME = r"^[A-Za-z0-9_][A-Za-z0-9._-]*$"
HUB_ID = r"^[A-Za-z0-9_][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*$"


PlainName = Annotated[str, StringConstraints(pattern=PLAIN_NAME)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Frozen(BaseModel):
    """An immutable value read from a file, in which unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", serialize_by_alias=True, allow_inf_nan=False)


def _two_times(value: object) -> object:
    if not isinstance(value, str):
        return value
    times = value.split(",")
    if len(times) != 2:
        raise ValueError(f"{value} is not two times in 0..1, the smaller first, such as 0.1,0.9")
    return times


def _in_order(interval: tuple[float, float]) -> tuple[float, float]:
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise ValueError(f"{low},{high} must be two times in 0..1, the smaller first")
    return interval


Interval = Annotated[tuple[float, float], BeforeValidator(_two_times), AfterValidator(_in_order)]
"""Two times t, where 1 is pure noise and 0 the picture; as text "0.1,0.9"."""


MAX_BATCH = 64
"""The most pictures that are drawn at once."""
Solver = Literal["euler", "ab2"]
"""The solver of the flow: Euler's method, or the two-step Adams-Bashforth method."""
DEFAULT_SOLVER: Solver = "ab2"


Size = Annotated[str, Field(coerce_numbers_to_str=True)]
"""A size as text, "384x256" or "3:2"; a whole number is both sides."""


def _one_rule(value: object) -> object:
    return (value,) if isinstance(value, str) else value


Loras = Annotated[tuple[str, ...], BeforeValidator(_one_rule), Field(min_length=1)]
"""LoRA files as text, FILE or FILE:SCALE; a single string is one."""
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


def read_toml(path: Path) -> dict[str, Any]:
    """Reads one TOML file; raises InputError if it cannot be read or is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"{path} is not there") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except RecursionError:
        raise InputError(f"{path} is not valid TOML: it is nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{path} is not valid TOML: {error}") from None


_WORDINGS = {
    "int_type": "{value} is no whole number",
    "int_parsing": "{value} is no whole number",
    "int_from_float": "{value} is no whole number",
    "float_type": "{value} is no number",
    "float_parsing": "{value} is no number",
    "bool_type": "{value} is neither true nor false",
    "bool_parsing": "{value} is neither true nor false",
    "string_type": "{value} is no text",
    "literal_error": "{value} is not {expected}",
    "json_invalid": "it is no JSON ({error})",
}
"""What is said for kinds of problems, instead of what pydantic says to programmers."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The known name that is nearest to an unknown one, as the end of a clause; nothing if none is near."""
    nearest = difflib.get_close_matches(name.lower(), sorted(known), n=1, cutoff=0.5)
    return f", did you mean {nearest[0]}?" if nearest else ""


def first_problem(error: ValidationError, model: type[BaseModel] | None = None) -> str:
    """The first problem of a validation error, in one line, with the field it is in.

    Args:
        model: what was validated: the fields that it has are listed where one is unknown.
    """
    # A misspelt field is often also a missing one: the stray name says more.
    problems = error.errors()
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    where = ".".join(str(part) for part in first["loc"])
    message, context = first["msg"].removeprefix("Value error, "), first.get("ctx", {})
    if wording := _WORDINGS.get(first["type"]):
        message = wording.format(value=f"{first['input']!r:.60}", **context)
    elif first["type"] == "string_too_short" and not first["input"]:
        message = "it is empty"
    elif context.get("pattern") == PLAIN_NAME:
        message = f"{first['input']!r} cannot be a name: use letters from A to Z, digits, dots and dashes"
    if first["type"] == "extra_forbidden":
        known = [] if model is None else _fields_beside(model, first["loc"])
        message = f"unknown setting{did_you_mean(str(first['loc'][-1]), known)}" + (
            f" (there are: {', '.join(known)})" if known else ""
        )
    return f"{where}: {message}" if where else message


def _fields_beside(model: type[BaseModel], place: tuple[int | str, ...]) -> list[str]:
    """The fields of the part of a model that a place, such as ("generate", "steps"), is in; none where that is open."""
    for part in place[:-1]:
        if isinstance(part, str):
            field = model.model_fields.get(part)
            inner = () if field is None else (field.annotation, *get_args(field.annotation))
            models = [kind for kind in inner if isinstance(kind, type) and issubclass(kind, BaseModel)]
            if len(models) != 1:
                return []
            model = models[0]
    return list(model.model_fields)
