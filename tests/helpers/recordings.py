"""Recordings made of random numbers, with everything a recording can hold."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mos_cli.config.recipe import Provenance, make_recipe, pixels_hash
from mos_cli.images.companions import TRACE_SCHEMA
from mos_cli.routing.trace import Recording, RegionGrid, Routes, Trace, make_branch
from tests.helpers.traces import tokens_of

HOSTILE = "</script><img src=x onerror=alert(1)>"
GRID = RegionGrid(rows=4, columns=4)


def routes_of(steps: int, blocks: int, tokens: int, layers: int, seed: int) -> Routes:
    """Two layers of random weights for each decision, and random regions."""
    rng = np.random.default_rng(seed)
    ids_SJTK = rng.random((steps, blocks, tokens, layers)).argsort(axis=-1)[..., :2]
    first = rng.uniform(0.5, 1, (steps, blocks, tokens, 1))
    weights_SJTK = np.concatenate([first, 1 - first], axis=-1)
    regions_JTN = rng.dirichlet(np.ones(tokens), (blocks, GRID.rows * GRID.columns)).transpose(0, 2, 1)
    return Routes(ids_SJTK.astype(np.uint8), weights_SJTK.astype(np.float16), None, regions_JTN.astype(np.float16))


def record(
    folder: Path,
    prompt: str = "a red apple and a cat",
    *,
    seed: int = 0,
    layers: int = 5,
    blocks: int = 4,
    steps: int = 6,
    previews: bool = False,
    **recipe: Any,
) -> Recording:
    """A recording of two branches, of which the negative one was computed at all but the last step."""
    acted = {"positive": (prompt, range(steps)), "negative": ("blurry", range(steps - 1))}
    routes, branches = {}, {}
    for name, (text, numbers) in acted.items():
        routes[name] = routes_of(len(numbers), blocks, len(tokens_of(text)), layers, seed)
        branches[name] = make_branch(text, tokens_of(text), numbers, routes[name], layers)
    sizes = {"width": 64, "height": 32, "steps": steps, "cfg": 3, "cfg_interval": "0,1", "precision": "fp32"}
    picture = Image.new("RGB", (64, 32), "teal")
    trace = Trace(
        schema=TRACE_SCHEMA,
        picture=pixels_hash(picture),
        recipe=make_recipe(prompt=prompt, negative="blurry", model="nano", seed=seed, **sizes, **recipe),
        made=Provenance(
            bundle_hash="0" * 64, mos="0", torch="0", diffusers="0", transformers="0", device="cpu", attention="native"
        ),
        layers=tuple(f"layer {m}" for m in range(layers)),
        blocks=blocks,
        top_k=2,
        times=tuple(1 - step / steps for step in range(steps)),
        branches=branches,
        regions=GRID,
    )
    path = folder / f"{seed}.json"
    picture.save(path.with_suffix(".png"))
    frames = [Image.new("RGB", (64, 32), (40 * step, 0, 0)) for step in range(steps)]
    if previews:
        frames[0].save(path.with_suffix(".steps.webp"), save_all=True, append_images=frames[1:], duration=100)
    film = path.with_suffix(".steps.webp") if previews else None
    return Recording(path, trace, routes, path.with_suffix(".png"), film)
