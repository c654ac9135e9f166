"""A training run for drawings and edits, small enough for a test, with random art."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from mos_cli.datasets.art.file import Art
from mos_cli.datasets.scenes.compositor import Compositor
from mos_cli.datasets.scenes.vocabulary import load_vocabulary
from mos_cli.datasets.tables import DataTable
from mos_cli.evaluation.scenebench import bench_data
from mos_cli.towers.autoencoder import Pixels
from mos_cli.towers.image_encoder import ImageEncoder
from mos_cli.towers.understanding import UnderstandingTower
from mos_cli.training.batches import Batches
from mos_cli.training.launch import start_accelerator
from mos_cli.training.loop import Trainer
from mos_cli.training.recipe import TrainRecipe
from mos_cli.training.sources import edit_source
from mos_cli.training.stages import curriculum
from tests.helpers import tiny_training as tiny

CPU = torch.device("cpu")


def recipe(**train: object) -> TrainRecipe:
    """The tiny recipe with edits in half of its steps, and other settings of [train]."""
    table = json.loads(json.dumps(tiny.TABLE))
    data = bench_data()
    table["data"] = {"styles": list(data.styles), "words": {k: list(v) for k, v in data.words.items()}, "edits": 0.5}
    table["image_encoder"] = "efficientnet-lite0"
    table["bundle"]["edits"] = {"steps": 2, "cfg": 2.0, "cfg_interval": [0.0, 1.0], "image_cfg": 1.0}
    table["generation"] |= {"image_state_widths": list(ImageEncoder(layers=4).widths)}
    table["train"] |= train
    return TrainRecipe.model_validate(table)


def batches(editing: TrainRecipe, understanding: UnderstandingTower, art: Art, device: torch.device = CPU) -> Batches:
    """The batches of the recipe, made on a device, where the tower must be."""
    assert isinstance(editing.data, DataTable)
    vocabulary = load_vocabulary(art, editing.data)
    source = edit_source(vocabulary, Compositor(vocabulary.sprites_VHW4.to(device)), device)
    # The tiny tower reads 24 tokens.
    short = replace(source, pick=lambda random, canvas: (source.pick(random, canvas)[0], "a dog"))
    torch.manual_seed(0)
    encoder = ImageEncoder(layers=4).to(device)  # type: ignore[arg-type]
    sources = {("train", False): tiny.scenes(device), ("train", True): short}
    return Batches(curriculum(editing), editing.train, sources, understanding, Pixels(), device, image_encoder=encoder)


def trainer(editing: TrainRecipe, understanding: UnderstandingTower, art: Art, folder: Path) -> Trainer:
    made = batches(editing, understanding, art)
    return Trainer(editing, made, folder, start_accelerator(editing.train, folder))
