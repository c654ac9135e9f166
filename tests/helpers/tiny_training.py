"""A training run small enough for a test: discs for pictures, two blocks, sixteen pixels."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image

from mos_cli.datasets.scenes.compositor import Compositor
from mos_cli.datasets.scenes.layout import Scene
from mos_cli.datasets.scenes.vocabulary import Vocabulary, VocabularyWord
from mos_cli.datasets.scenes.writer import SceneWriter
from mos_cli.towers.autoencoder import Pixels
from mos_cli.towers.understanding import UnderstandingTower
from mos_cli.training.batches import Batches
from mos_cli.training.launch import start_accelerator
from mos_cli.training.loop import Trainer
from mos_cli.training.metrics import METRICS
from mos_cli.training.picks import Share, Source
from mos_cli.training.recipe import TrainRecipe
from mos_cli.training.sources import ScenePicker, scene_source
from mos_cli.training.stages import curriculum
from tests.helpers.tiny_bundle import tower_spec

CPU = torch.device("cpu")
NAMES = ("dog", "apple", "cat", "bird", "tree", "car", "boat", "house")
STYLES = ("fluent-3d", "noto")
TABLE: dict[str, Any] = {
    "understanding": "tiny-encoder",
    "bundle": {
        "name": "tiny",
        "description": "a test",
        "license": "Apache-2.0",
        "canvas": {"native": [16, 16], "multiple": 8, "min": 16, "max": 32},
        "defaults": {"steps": 2, "cfg": 2.0, "cfg_interval": [0.0, 1.0]},
    },
    "data": {"styles": list(STYLES), "words": {name: [name] for name in NAMES}},
    "generation": {
        **{"channels": 3, "patch": 8, "width": 32, "depth": 2, "heads": 2, "hidden": 48},
        **{"states_layers": 4, "states_width": 32, "router_width": 32, "router_heads": 2},
    },
    "train": {
        **{"seed": 0, "steps": 8, "batch": 8, "context_tokens": 24, "drop_caption": 0.1, "epsilon": 0.05},
        **{"time_mean": 0.4, "time_std": 0.8, "muon_lr": 1e-2, "adamw_lr": 1e-2, "warmup": 1, "decay": 0.4},
        **{"clip": 1.0, "precision": "fp32", "compile": False, "save_every": 4, "sample_every": 8},
        "sample_prompts": ["a dog", "a cat"],
    },
}

STAGES = ({"name": "small", "steps": 3, "canvas": 16}, {"name": "large", "steps": 3, "canvas": 32, "batch": 4})
"""Two stages, the second on a larger canvas."""


def recipe(stages: tuple[dict, ...] = (), **train: Any) -> TrainRecipe:
    """The tiny recipe with other settings of [train]."""
    return TrainRecipe.model_validate({**TABLE, "train": {**TABLE["train"], **train}, "stages": stages})


def sprites() -> torch.Tensor:
    """Discs of different colours, premultiplied RGBA, [16, 32, 32, 4]."""
    y, x = np.mgrid[:32, :32] - 15.5
    alpha = (np.clip(14 - np.hypot(x, y), 0, 1) * 255)[..., None]
    colours = np.random.default_rng(0).integers(0, 256, (2 * len(NAMES), 3))
    discs = [np.concatenate([alpha * colour / 255, alpha], axis=-1) for colour in colours]
    return torch.from_numpy(np.stack(discs).round().astype(np.uint8))


def scenes(device: torch.device = CPU) -> Source:
    words = {
        name: VocabularyWord((name,), {style: 2 * row + offset for offset, style in enumerate(STYLES)})
        for row, name in enumerate(NAMES)
    }
    picker = ScenePicker(SceneWriter(Vocabulary(words, STYLES, sprites())))

    def pick(random: Random, canvas: int) -> tuple[Scene, str]:
        """The tiny tower reads 24 tokens."""
        scene, caption = picker(random, canvas)
        return scene, " ".join(caption.split()[:12])

    return scene_source(pick, Compositor(picker.writer.vocabulary.sprites_VHW4.to(device)), device)


def batches(tiny: TrainRecipe, understanding: UnderstandingTower, share: Share = Share()) -> Batches:
    plan = curriculum(tiny)
    sources = {(stage.name, False): scenes() for stage in plan.stages}
    return Batches(plan, tiny.train, sources, understanding, Pixels(), CPU, share)


def trainer(tiny: TrainRecipe, understanding: UnderstandingTower, folder: Path) -> Trainer:
    return Trainer(tiny, batches(tiny, understanding), folder, start_accelerator(tiny.train, folder))


def run(trainer: Trainer) -> list[float]:
    """Trains to the end; the losses."""
    losses: list[float] = []
    trainer.run(lambda metrics: losses.append(metrics.loss), lambda _: None)
    return losses


def rows(folder: Path) -> list[dict[str, str]]:
    """The metrics of a run, a row a step."""
    with (folder / METRICS).open(newline="") as file:
        return list(csv.DictReader(file))


def write_discs(folder: Path, count: int = 6) -> None:
    """A folder of captioned pictures: discs on white, the colour said."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in zip(range(count), ("red", "green", "blue", "black", "pink", "brown"), strict=False):
        y, x = np.mgrid[:20, :24] - 10
        disc = np.where((np.hypot(x, y) < 7)[..., None], sprites()[index, 16, 16, :3].numpy(), 255)
        Image.fromarray(disc.astype(np.uint8)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {name} apple\n")


def write_recipe(folder: Path, encoder: Path, **train: Any) -> Path:
    """A recipe file that the command line can run on discs in a folder, without any art or network."""
    write_discs(folder / "discs")
    (folder / "tower.json").write_text(tower_spec(encoder).model_dump_json())
    data = {"kind": "captioned", "path": str(folder / "discs"), "held_out": 0.2}
    table = {**TABLE, "understanding": str(folder / "tower.json"), "data": data, "train": {**TABLE["train"], **train}}
    path = folder / "tiny.toml"
    path.write_text(_toml(table))
    return path


def _toml(table: dict[str, Any]) -> str:
    """JSON's scalars and arrays are TOML's."""
    plain = {key: value for key, value in table.items() if not isinstance(value, dict)}
    lines = [f"{key} = {json.dumps(value)}" for key, value in plain.items()]
    for name in table.keys() - plain.keys():
        lines.append(f"[{name}]")
        for key, value in table[name].items():
            inner = ", ".join(f"{k} = {json.dumps(v)}" for k, v in value.items()) if isinstance(value, dict) else None
            lines.append(f"{key} = {json.dumps(value) if inner is None else '{ ' + inner + ' }'}")
    return "\n".join(lines) + "\n"


def start_mos(*arguments: object, folder: Path, processes: int = 1, shard: bool = False) -> subprocess.Popen[str]:
    """`mos` in processes of its own, on the CPU, in `folder`."""
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MOS_CACHE": str(folder), "ACCELERATE_USE_CPU": "true"}
    if shard:
        environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    launcher = []
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, "-m", "mos_cli", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
