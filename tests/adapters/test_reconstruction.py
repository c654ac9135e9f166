"""What a trace says was read is what entered the blocks: computed from trace and bank alone, and compared.

Shapes: S steps, J blocks, Q tokens of the prompt, K kept layers, T text tokens, D width of the transformer.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mos_cli.adapters.facts import TextSite
from mos_cli.adapters.pipeline import AdapterPipeline
from mos_cli.routing.trace import load_recording
from mos_cli.sampling.guidance import NEGATIVE, POSITIVE
from tests.helpers.adapted import BlockText, recipe_of, recorded_text, text_of, trained_adapter, with_adapter

Load = Callable[..., AdapterPipeline]
RULES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "pin": {"routes": ("fox=2,3",)},
    "pins in slots and blocks": {"routes": ("fox=2 slots 0", "dog=5 blocks 1-2 steps 0")},
    "ban": {"routes": ("*!=0-3",)},
    "bias": {"routes": ("dog+=3@1",)},
    "baseline": {"routes": ("uniform",)},
    "shuffle": {"routes": ("shuffle:3",)},
}


def told(pipeline: AdapterPipeline, files: Path, branch: str, prompt: str) -> Tensor:
    """What the blocks add to their text by the trace and the bank, [S, J, Q, D]; the trace is read from its files."""
    recording = load_recording(files)
    assert recording.routes is not None
    routes, bank = recording.routes[branch], pipeline.bank(pipeline.encode(prompt))
    assert routes.slots_SJTK is not None
    slots = len(pipeline.own_layers)
    own_Z = torch.tensor(pipeline.own_layers)
    ids, places, weights = (
        torch.from_numpy(array.copy()) for array in (routes.ids_SJTK, routes.slots_SJTK, routes.weights_SJTK)
    )
    ids, places, weights = ids.long(), places.long(), weights.float() * slots
    rows_QZMD = bank.rows_QZMD
    tokens_Q1 = torch.arange(rows_QZMD.shape[0])[:, None].expand(ids.shape[2:])
    read_SJQKD = rows_QZMD[tokens_Q1, places, ids] - rows_QZMD[tokens_Q1, places, own_Z[places]]
    return (weights[..., None] * read_SJQKD).sum(-2)


def check(pipeline: AdapterPipeline, blocks: BlockText, files: Path, branches: dict[str, str]) -> float:
    """Compares every block of every pass with what the trace tells; returns the largest change of a block's text."""
    base, sites = pipeline.base, [site for site in pipeline.base.sites for _ in blocks_of(pipeline, site)]
    names = list(base.rows) if base.rows and len(branches) > 1 else list(branches)
    largest = 0.0
    changes = {
        name: told(pipeline, files, name, prompt) if pipeline.encode(prompt).tokens else None
        for name, prompt in branches.items()
    }
    for number, (entered, left) in enumerate(zip(blocks.entered, blocks.left, strict=True)):
        rows = names if len(entered[0]) > 1 else [names[number % len(names)]]
        step = number * len(rows) // len(names)
        for row, name in enumerate(rows):
            encoded = pipeline.encode(branches[name])
            places_Q, length = encoded.positions_Q, len(encoded.embeds_TE)
            plain_TD = base.first_text(pipeline.pipe.transformer, encoded.embeds_TE)
            for block, site in enumerate(sites):
                expected_TD = plain_TD.clone()
                if base.evolves and block:
                    expected_TD = text_of(pipeline, left[block - 1][row], sites[block - 1], length).clone()
                if (change := changes[name]) is not None:
                    before = change[step, block - 1] if base.evolves and block else 0.0
                    expected_TD[places_Q] += change[step, block] - before
                    largest = max(largest, change[step, block].abs().max().item())
                seen_TD = text_of(pipeline, entered[block][row], site, length)
                torch.testing.assert_close(seen_TD, expected_TD, rtol=1e-5, atol=1e-5)
    return largest


def blocks_of(pipeline: AdapterPipeline, site: TextSite) -> Any:
    return pipeline.pipe.transformer.get_submodule(site.blocks)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("gates", [None, 0.0, 0.37, 1.0], ids=["untrained", "closed", "half open", "open"])
@pytest.mark.parametrize("name", ["klein", "z-image", "prx"])
def test_trace_and_bank_tell_what_entered_the_blocks(
    loaded: Load, tmp_path: Path, name: str, gates: float | None, rules: str
) -> None:
    pipeline = loaded(name)
    recipe = recipe_of(pipeline, steps=2, **RULES[rules])
    adapter = None if gates is None else trained_adapter(pipeline, gates)
    with with_adapter(pipeline, adapter), torch.no_grad(), recorded_text(pipeline) as blocks:
        drawing = pipeline.draw(recipe)
    picture, *_ = drawing.save(tmp_path / "picture.png")
    largest = check(pipeline, blocks, picture, {POSITIVE: recipe.prompt})
    opens = bool(gates) or rules not in ("as it is", "ban")
    banned = rules == "ban" and set(range(4)) & set(pipeline.own_layers)
    assert (largest > 0.01) == bool(opens or banned)


@pytest.mark.parametrize("negative", ["", "a green dog", "a red fox and a blue dog"])
@pytest.mark.parametrize("name", ["klein-base", "z-image", "prx"])
def test_the_branches_of_guidance_are_told_apart(loaded: Load, tmp_path: Path, name: str, negative: str) -> None:
    """Also where the negative prompt is the prompt."""
    pipeline = loaded(name)
    recipe = recipe_of(pipeline, steps=2, cfg=3.0, negative=negative, routes=("dog#1=2",))
    with (
        with_adapter(pipeline, trained_adapter(pipeline, 0.6)),
        torch.no_grad(),
        recorded_text(pipeline) as blocks,
    ):
        drawing = pipeline.draw(recipe)
    picture, *_ = drawing.save(tmp_path / "picture.png")
    assert set(drawing.trace.branches) == ({POSITIVE, NEGATIVE} if negative else {POSITIVE})
    assert check(pipeline, blocks, picture, {POSITIVE: recipe.prompt, NEGATIVE: negative}) > 0.01


@pytest.mark.parametrize("name", ["klein", "z-image", "prx"])
def test_own_layers_change_nothing(loaded: Load, name: str) -> None:
    """A route to the layers that the base model reads itself gives the same pixels, with every gate open."""
    pipeline = loaded(name)
    own = ",".join(map(str, pipeline.own_layers))
    plain = pipeline.draw(recipe_of(pipeline)).image
    with with_adapter(pipeline, trained_adapter(pipeline, 0.0)):
        pinned = pipeline.draw(recipe_of(pipeline, routes=(f"*={own}",)))
    assert pinned.image.tobytes() == plain.tobytes()
    assert pinned.trace.branches[POSITIVE].changed == 0
