"""What a trace says was read is what entered the blocks: computed from trace and bank alone, and compared.
`check_read` does it, for every pass, row and block.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mos_cli.adapters.pipeline import AdapterPipeline
from mos_cli.sampling.guidance import NEGATIVE, POSITIVE
from tests.helpers.adapted import check_read, recipe_of, recorded_text, trained_adapter, with_adapter

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
    largest = check_read(pipeline, blocks, picture, {POSITIVE: recipe.prompt})
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
    assert check_read(pipeline, blocks, picture, {POSITIVE: recipe.prompt, NEGATIVE: negative}) > 0.01


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
