"""Recipes of training on a base model: one TOML file with a [router] or a [base_lora] table."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from mos_cli.bundles.adapters import RouterShape
from mos_cli.errors import UsageError
from mos_cli.planning.memory import Quant
from mos_cli.utils.validation import Frozen, PlainName, RouteRules, first_problem, read_toml


class BaseModelRecipe(Frozen):
    """What both tables have.

    Args:
        name: of the adapter or the LoRA that is made.
        base: the base model: an adapter by name, or a diffusers folder.
        objective: "flow" predicts the pictures of a folder, at any time. "few-steps" does so at the times of the
            model's own steps. "distil" predicts at these times where a teacher gets to by the next of them, for
            distilled models. "routes" is for routers: it predicts what the base model predicts under `routes`, at these
            times, and the router learns to do without the rules.
        teacher: the undistilled base model of "distil": `teacher_steps` of its steps, with the guidance `teacher_cfg`,
            are one of the model's own.
        data: the folder of captioned pictures.
        caption: of pictures without one; {folder} and {name} are the names of its folder and its file.
        canvas: side of the pictures in pixels.
        held_out: examples that are not trained on, and on which the result is compared.
        batch: examples of a step, computed one after the other.
        quant: how the base model is quantised meanwhile.
    """

    name: PlainName
    base: str
    objective: Literal["flow", "few-steps", "distil", "routes"]
    teacher: str | None = None
    teacher_steps: int = Field(default=4, ge=1)
    teacher_cfg: float = Field(default=4.0, ge=1)
    data: str | None = None
    caption: str | None = None
    seed: int = 0
    steps: int = Field(ge=1)
    batch: int = Field(default=1, ge=1)
    held_out: int = Field(ge=1)
    canvas: int = Field(ge=64, multiple_of=16)
    lr: float = Field(gt=0)
    quant: Quant = "none"

    @model_validator(mode="after")
    def _teachers_distil(self) -> Self:
        if (self.objective == "distil") != (self.teacher is not None):
            raise ValueError('teacher is given with objective = "distil", and only then')
        return self


class RouterRecipe(BaseModelRecipe):
    """The [router] table.

    Args:
        routes: the rules that a router learns to do without.
        gate_lr: learning rate of the gates.
        epsilon: share of the choices that are random while the router learns.
    """

    routes: RouteRules | None = None
    gate_lr: float = Field(gt=0)
    epsilon: float = Field(default=0.05, ge=0, lt=1)
    shape: RouterShape

    @model_validator(mode="after")
    def _routes_are_for_their_objective(self) -> Self:
        if (self.objective == "routes") != (self.routes is not None):
            raise ValueError('routes are given with objective = "routes", and only then')
        return self


class BaseLoraRecipe(BaseModelRecipe):
    """The [base_lora] table, of a LoRA for a base model's transformer with the given rank."""

    rank: int = Field(default=16, ge=1)

    @model_validator(mode="after")
    def _learns_from_pictures(self) -> Self:
        if self.objective == "routes":
            raise ValueError('objective = "routes" is for routers: a LoRA learns by "flow", "few-steps" or "distil"')
        return self


TABLES: dict[str, type[BaseModelRecipe]] = {"router": RouterRecipe, "base_lora": BaseLoraRecipe}


def is_base_model_recipe(path: Path) -> bool:
    """Whether a recipe's file trains on a base model; raises InputError if it is not TOML."""
    return not TABLES.keys().isdisjoint(read_toml(path))


def load_base_model_recipe(path: Path, overrides: dict[str, Any]) -> BaseModelRecipe:
    """Reads a recipe of training on a base model.

    Args:
        overrides: fields that replace the file's.

    Raises:
        UsageError: a value is missing, unknown or out of range.
    """
    table = read_toml(path)
    (name, *others) = table
    if others:
        raise UsageError(f"{path}: the recipe of a base model has one table, [{next(iter(TABLES.keys() & table))}]")
    kind = TABLES[name]
    try:
        return kind.model_validate(table[name] | overrides)
    except ValidationError as error:
        raise UsageError(f"{path}: {first_problem(error, kind)}") from None
