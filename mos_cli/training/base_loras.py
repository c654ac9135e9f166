"""Training a LoRA of a base model's transformer, by peft's conventions; its file loads in diffusers."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from mos_cli.adapters.loras import check_takes_loras
from mos_cli.adapters.pipeline import AdapterPipeline
from mos_cli.adapters.recipe import BaseLoraRecipe
from mos_cli.bundles.loras import record_lora
from mos_cli.datasets.captioned import Captioned
from mos_cli.towers.lora import add_lora, save_lora
from mos_cli.training.base_models import BaseModelTrainer, Log, ModuleTraining
from mos_cli.utils.files import make_folder, sha256_of

RECIPE = "lora.json"


@dataclass(frozen=True)
class Result:
    """The mean squared error on held-out examples, with the LoRA and without it."""

    lora: float
    without: float


class LoraTrainer(BaseModelTrainer):
    """Trains a LoRA of all linear layers of the blocks that read text.

    Raises:
        InputError: the folder has too few pictures, or one of them cannot be read.
        UsageError: diffusers has no LoRA for this base model.
    """

    recipe: BaseLoraRecipe

    def __init__(self, pipeline: AdapterPipeline, recipe: BaseLoraRecipe, data: Captioned) -> None:
        check_takes_loras(pipeline.pipe, pipeline.bundle.index.name)
        super().__init__(pipeline, recipe, data, RECIPE)

    def train(
        self,
        folder: Path,
        log: Log = lambda what, step, loss: None,
        say: Callable[[str], None] = lambda line: None,
    ) -> Result:
        """Trains the LoRA, which stays in the transformer; the arguments and errors are those of `fit`."""
        without, transformer, rank = self.loss(None), self.pipeline.pipe.transformer, self.recipe.rank
        torch.manual_seed(self.recipe.seed)
        add_lora(transformer, rank, rank, [site.blocks for site in self.base.sites])
        for parameter in self.weights.values():
            # In the type of the base model, small steps would be rounded away.
            parameter.data = parameter.data.float()
        learned = nn.ParameterList(self.weights.values())
        training = ModuleTraining(learned, [(list(learned), self.recipe.lr)], self.recipe.steps)
        self.fit({"the LoRA": training}, folder, log, say)
        return Result(self.loss(None), without)

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The weights of the LoRA by their names in the transformer."""
        return {name: one for name, one in self.pipeline.pipe.transformer.named_parameters() if ".lora_" in name}

    def export(self, file: Path) -> None:
        """Writes the LoRA and records where it is; an earlier file is replaced. Raises InputError as `save_lora`."""
        bundle, rank = self.pipeline.bundle, self.recipe.rank
        make_folder(file.parent)
        save_lora(file, self.weights, rank, rank, model=bundle.ref, bundle_hash=bundle.hash)
        record_lora(file, sha256_of(file))
