"""Traces made of random routes."""

import re

import numpy as np

from mos_cli.config.recipe import Provenance, make_recipe
from mos_cli.images.companions import TRACE_SCHEMA
from mos_cli.routing.trace import Routes, Trace, TraceToken, make_branch

PROMPT, NEGATIVE = "a red apple", "blurry"
LAYERS, BLOCKS, STEPS, TOP_K = 5, 4, 6, 2
DEAD = 4


def tokens_of(prompt: str) -> list[TraceToken]:
    words = [TraceToken(text=m[0], start=m.start(), end=m.end()) for m in re.finditer(r"\S+", prompt)]
    return [TraceToken(text="[CLS]", start=0, end=0), *words, TraceToken(text="[SEP]", start=0, end=0)]


def routes_of(steps: int, tokens: int, *, layers: int = LAYERS, blocks: int = BLOCKS, seed: int = 0) -> Routes:
    """Routes as a router makes them, but that the last layer is never kept."""
    rng = np.random.default_rng(seed)
    logits_SJTM = rng.normal(size=(steps, blocks, tokens, layers - 1))
    shares_SJTM = np.exp(logits_SJTM) / np.exp(logits_SJTM).sum(axis=-1, keepdims=True)
    ids_SJTK = (-shares_SJTM).argsort(axis=-1)[..., :TOP_K]
    weights_SJTK = np.take_along_axis(shares_SJTM, ids_SJTK, axis=-1)
    return Routes(ids_SJTK.astype(np.uint8), weights_SJTK.astype(np.float16))


def make_trace(
    *, prompt: str = PROMPT, layers: int = LAYERS, blocks: int = BLOCKS, steps: int = STEPS
) -> tuple[Trace, dict[str, Routes]]:
    """A trace of two branches; guidance acted at all but the first and the last step."""
    prompts = {"positive": prompt, "negative": NEGATIVE}
    acted = {"positive": range(steps), "negative": range(1, steps - 1)}
    tokens = {name: tokens_of(text) for name, text in prompts.items()}
    routes = {name: routes_of(len(acted[name]), len(tokens[name]), layers=layers, blocks=blocks) for name in prompts}
    trace = Trace(
        schema=TRACE_SCHEMA,
        picture="0" * 64,
        recipe=make_recipe(
            prompt=prompt,
            negative=NEGATIVE,
            model="nano",
            seed=42,
            steps=steps,
            cfg=3,
            cfg_interval="0.2,0.9",
            width=64,
            height=64,
            precision="fp32",
        ),
        made=Provenance(
            bundle_hash="0" * 64,
            mos="0",
            torch="0",
            diffusers="0",
            transformers="0",
            device="cpu",
            attention="sdpa",
        ),
        layers=("embedding", *(f"layer {n}" for n in range(1, layers))),
        blocks=blocks,
        top_k=TOP_K,
        times=tuple(1 - step / steps for step in range(steps)),
        branches={
            name: make_branch(prompts[name], tokens[name], acted[name], routes[name], layers) for name in prompts
        },
    )
    return trace, routes
