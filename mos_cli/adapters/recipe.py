"""The recipe of a router for a base model: one TOML file with a [router] table."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from mos_cli.bundles.adapters import RouterShape
from mos_cli.errors import UsageError
from mos_cli.planning.memory import Quant
from mos_cli.utils.validation import Frozen, PlainName, RouteRules, first_problem, read_toml

TABLE = "router"


class RouterRecipe(Frozen):
    """The [router] table.

    Args:
        name: of the adapter that is made.
        base: the base model: an adapter by name, or a diffusers folder.
        objective: "flow" predicts the pictures of a folder, at any time. "few-steps" does so at the times of the
            model's own steps, for distilled models. "routes" predicts what the base model predicts under `routes`, at
            these times: the router learns to do without the rules.
        data: the folder of captioned pictures.
        canvas: side of the pictures in pixels.
        held_out: examples that are not trained on, and that the router has to be better on.
        batch: examples of a step, computed one after the other.
        quant: how the base model is quantised meanwhile.
    """

    name: PlainName
    base: str
    objective: Literal["flow", "few-steps", "routes"]
    routes: RouteRules | None = None
    data: str | None = None
    seed: int = 0
    steps: int = Field(ge=1)
    batch: int = Field(default=1, ge=1)
    held_out: int = Field(ge=1)
    canvas: int = Field(ge=64, multiple_of=16)
    lr: float = Field(gt=0)
    gate_lr: float = Field(gt=0)
    epsilon: float = Field(default=0.05, ge=0, lt=1)
    quant: Quant = "none"
    shape: RouterShape

    @model_validator(mode="after")
    def _routes_are_for_their_objective(self) -> Self:
        if (self.objective == "routes") != (self.routes is not None):
            raise ValueError('routes are given with objective = "routes", and only then')
        return self


def is_router_recipe(path: Path) -> bool:
    """Whether a recipe's file is that of a router; raises InputError if it is not TOML."""
    return TABLE in read_toml(path)


def load_router_recipe(path: Path, overrides: dict[str, Any]) -> RouterRecipe:
    """Reads the recipe of a router.

    Args:
        overrides: fields that replace the file's.

    Raises:
        UsageError: a value is missing, unknown or out of range.
    """
    table = read_toml(path)
    if table.keys() != {TABLE}:
        raise UsageError(f"{path}: the recipe of a router has one table, [{TABLE}]")
    try:
        return RouterRecipe.model_validate(table[TABLE] | overrides)
    except ValidationError as error:
        raise UsageError(f"{path}: {first_problem(error, RouterRecipe)}") from None
