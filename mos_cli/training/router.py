"""Training the router and the gates of a base model, and nothing else; the baselines that a router has to beat.

Shapes: Q tokens of a prompt, Z slots, M layers, J blocks, N patches, P values of a patch, C channels, H x W the
latent's size.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mos_cli.adapters.adapter import Adapter, save_adapter
from mos_cli.adapters.loading import patch_values
from mos_cli.adapters.pipeline import AdapterPipeline
from mos_cli.adapters.recipe import RouterRecipe
from mos_cli.bundles.adapters import ROUTER, AdapterBundle, base_hash, base_name
from mos_cli.bundles.bundle import ADAPTER
from mos_cli.datasets.captioned import Captioned
from mos_cli.errors import UsageError
from mos_cli.routing.rules import parse_rules
from mos_cli.routing.steering import Steerer
from mos_cli.sampling.guidance import POSITIVE, SteeringInput
from mos_cli.towers.layers import TokenGrid
from mos_cli.towers.router import uniform_route
from mos_cli.training.base_models import BaseModelTrainer, Log, ModuleTraining, Sample
from mos_cli.utils.files import atomic_write, make_folder, replace_folder, sha256_of

RECIPE = "router.json"
TRAINED = ("the router", "its static baseline")
"""What is trained, in this order."""


class StaticAdapter(nn.Module):
    """The baseline of one static weight for every layer, the same for all tokens and times, in each block and slot."""

    def __init__(self, layers: int, blocks: int, slots: int) -> None:
        super().__init__()
        self.top_k, self.router = layers, None
        self.logits_MC = nn.Parameter(torch.zeros(layers, blocks * slots))
        self.gates_JZ = nn.Parameter(torch.zeros(blocks, slots))

    def logits(self, states_QS: Tensor, patches_1NP: Tensor, t: float, grid: TokenGrid) -> Tensor:
        return self.logits_MC.expand(1, len(states_QS), -1, -1)


@dataclass(frozen=True)
class Result:
    """The mean squared error on held-out examples: of the router, and of what it has to beat, by name."""

    router: float
    baselines: dict[str, float]

    @property
    def better(self) -> bool:
        """Whether the router is better than every baseline."""
        return self.router < min(self.baselines.values())


class _GatedTraining(ModuleTraining):
    """The training of an adapter, whose gates have a rate of their own and stay between 0 and 1."""

    def __init__(self, adapter: Any, recipe: RouterRecipe) -> None:
        others = [parameter for parameter in adapter.parameters() if parameter is not adapter.gates_JZ]
        super().__init__(adapter, [(others, recipe.lr), ([adapter.gates_JZ], recipe.gate_lr)], recipe.steps, adapter)

    def update(self, step: int) -> None:
        super().update(step)
        self.adapter.gates_JZ.data.clamp_(0, 1)


class RouterTrainer(BaseModelTrainer):
    """Trains the router of a base model.

    Raises:
        InputError: the folder has too few pictures, or one of them cannot be read.
        UsageError: the routes of the recipe do not go with the base model.
    """

    recipe: RouterRecipe

    def __init__(self, pipeline: AdapterPipeline, recipe: RouterRecipe, data: Captioned) -> None:
        super().__init__(pipeline, recipe, data, RECIPE)
        self.epsilon = recipe.epsilon

    def train(
        self,
        folder: Path,
        log: Log = lambda what, step, loss: None,
        say: Callable[[str], None] = lambda line: None,
    ) -> tuple[Adapter, Result]:
        """Trains a router and the static baseline, and compares both with the others on the held-out examples.

        The arguments and errors are those of `fit`.
        """
        sizes = (self.pipeline.layers, self.pipeline.blocks, len(self.pipeline.own_layers))
        adapter = Adapter(
            self.recipe.shape,
            states_width=self.pipeline.pipe.text_encoder.config.hidden_size,
            patch_values=patch_values(self.pipeline.pipe.transformer),
            layers=sizes[0],
            blocks=sizes[1],
            slots=sizes[2],
        )
        adapter.initialise(self.recipe.seed)
        static = StaticAdapter(*sizes)
        modules = dict(zip(TRAINED, (adapter, static), strict=True))
        trainings = {name: _GatedTraining(module.to(self.device), self.recipe) for name, module in modules.items()}
        self.fit(trainings, folder, log, say)
        mean = uniform_route([list(range(sizes[0]))] * (sizes[1] * sizes[2]), self.device)
        baselines = {
            "gates 0": self.loss(None),
            "mean of all layers": self.loss(None, lambda step, branch: mean),
            "one static weight per block": self.loss(static),
        }
        return adapter, Result(self.loss(adapter), baselines)

    def target(self, sample: Sample, z_1CHW: Tensor, t: float, noise_1CHW: Tensor) -> Tensor:
        if self.recipe.routes is None:
            return super().target(sample, z_1CHW, t, noise_1CHW)
        with torch.no_grad(), self.predicted(sample, z_1CHW, t, None, self._rules(sample)) as told_1CHW:
            return told_1CHW

    def _rules(self, sample: Sample) -> Callable[[int, str], SteeringInput]:
        """The steering of the recipe's routes for a caption; a rule whose word it does not have is left out."""
        assert self.recipe.routes is not None
        rules = parse_rules(self.recipe.routes)
        if any(getattr(rule, "steps", None) for rule in rules):
            raise UsageError("routes of a recipe hold at all times: leave steps out")
        return Steerer(
            rules,
            {POSITIVE: sample.text},
            {POSITIVE: range(1)},
            steps=1,
            blocks=self.pipeline.blocks,
            layers=self.pipeline.layers,
            device=self.device,
            own_layers=self.pipeline.own_layers,
        )


def export(adapter: Adapter, recipe: RouterRecipe, bundle: AdapterBundle, folder: Path) -> None:
    """Writes an adapter: its index and its weights, both or neither; an earlier one there is replaced.

    Raises:
        InputError: the folder cannot be written; an earlier one is as it was.
    """
    make_folder(folder.parent)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        made = Path(temporary) / "adapter"
        made.mkdir()
        save_adapter(adapter, made / ROUTER)
        index = bundle.index.model_copy(
            update={
                "name": recipe.name,
                "description": f"a router for {bundle.index.name}, trained by {recipe.objective}",
                "base": base_name(bundle.index) if bundle.local is None else str(bundle.local.resolve()),
                "base_hash": base_hash(bundle),
                "router": recipe.shape,
                "files": {ROUTER: sha256_of(made / ROUTER)},
            }
        )
        text = index.model_dump_json(indent=2, by_alias=True, exclude_none=True) + "\n"
        atomic_write(made / ADAPTER, text.encode(), overwrite=False)
        replace_folder(made, folder)
