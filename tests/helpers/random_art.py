"""An art file of random pixels."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from mos_cli.datasets.art.file import SCHEMA
from mos_cli.evaluation.scenebench import bench_data
from mos_cli.utils.files import sha256_of

EXTRA_STYLE = "emojione"
"""A style the recipe does not learn."""


def write_art(folder: Path) -> None:
    """Every word of the bench in every style, as random blots; a few words in a further style."""
    data, size = bench_data(), 16
    keys = [(word, style) for word in data.words for style in data.styles]
    keys += [(word, EXTRA_STYLE) for word in list(data.words)[:3]]
    generator = torch.Generator().manual_seed(0)
    blots = torch.randint(0, 256, (len(keys), 4, 4, 4), generator=generator, dtype=torch.uint8)
    blots[..., 3] = 255
    pixels = blots.repeat_interleave(size // 4, 1).repeat_interleave(size // 4, 2).contiguous()
    save_file({"pixels": pixels}, folder / "art-16.safetensors", {"schema": SCHEMA})
    picture = {"keywords": (), "group": "g", "subgroup": "s"}
    manifest = {
        "schema": SCHEMA,
        "size": size,
        "sha256": sha256_of(folder / "art-16.safetensors"),
        "sets": (),
        "annotations": (),
        "counts": {"pictures": len(keys), "concepts": len(data.words), "dropped": {}},
        "pictures": [
            {"index": i, "concept": str(i), "name": word, "style": style, **picture}
            for i, (word, style) in enumerate(keys)
        ],
    }
    (folder / "art-16.json").write_text(json.dumps(manifest))
