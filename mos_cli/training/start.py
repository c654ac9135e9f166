"""The network at the start of a run: with random weights, or with those of a bundle.

Shapes: D width, C channels, p side of a patch.
"""

import torch
from torch import Tensor

from mos_cli.bundles.bundle import find_bundle, verify_bundle
from mos_cli.bundles.shapes import GenerationShape, read_generation
from mos_cli.errors import UsageError
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.quantized import load_generation
from mos_cli.training.recipe import TrainRecipe


def start_tower(recipe: TrainRecipe) -> GenerationTower:
    """The recipe's network, with the weights of the bundle that it starts from, if there is one.

    The patches may be larger than the bundle's by a whole factor. The network then draws the bundle's pictures
    enlarged, with the same number of tokens (progressive resolution at equal cost).

    Raises:
        ModelError: the bundle is missing or damaged.
        UsageError: the network cannot be built, or the bundle's weights do not fit into it.
    """
    try:
        tower = GenerationTower(**recipe.generation)
    except (TypeError, ValueError) as error:
        raise UsageError(f"the recipe's [generation] is wrong: {error}") from None
    if recipe.start_from is not None:
        bundle = find_bundle(recipe.start_from)
        verify_bundle(bundle)
        _check_shape(recipe, read_generation(bundle.folder / "generation"))
        start = load_generation(bundle.folder / "generation", device=torch.device("cpu"), dtype=torch.float32)
        weights = enlarged_weights(start, tower.patch)
        # A bundle that draws from words alone has no weights for pictures: the network keeps its fresh ones. So it does
        # for an input that only distillation adds.
        inputs = [] if start.image_state_widths else ["image_states_in", "reference_in"]
        if start.guidance_in is None:
            inputs.append("guidance_in")
        weights |= {n: fresh for n, fresh in tower.state_dict().items() if any(part in n for part in inputs)}
        try:
            tower.load_state_dict(weights)
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1].strip()[:200]
            raise UsageError(f"the network cannot start from {recipe.start_from}: {reason}") from None
    return tower


def guidance_teacher(recipe: TrainRecipe) -> GenerationTower | None:
    """The frozen network whose guidance the recipe distils, that of the bundle it starts from; None if it does not.

    Raises:
        UsageError: guidance is distilled into that one already.
    """
    if recipe.distil is None or recipe.start_from is None:
        return None
    folder = find_bundle(recipe.start_from).folder / "generation"
    teacher = load_generation(folder, device=torch.device("cpu"), dtype=torch.float32)
    if teacher.guidance_in is not None:
        raise UsageError(f"guidance is distilled into {recipe.start_from} already: start from the model before that")
    return teacher.requires_grad_(False)


def _check_shape(recipe: TrainRecipe, start: GenerationShape) -> None:
    """Raises UsageError if the recipe's network is another than that of the bundle, apart from what may differ."""
    own = GenerationShape.model_validate(recipe.generation)
    may_differ = {"patch", "top_k", "renormalise", "rope_theta"}
    if recipe.distil is not None:
        may_differ.add("guidance_max")
    if not start.image_state_widths and not start.has_vision:
        may_differ |= {"image_state_widths", "has_vision"}
    for name in GenerationShape.model_fields:
        wanted, there = getattr(own, name), getattr(start, name)
        if name not in may_differ and wanted != there:
            raise UsageError(
                f"the network cannot start from {recipe.start_from}: [generation] says {name} = {wanted}, and that of "
                f"the model is {there}: leave [generation] out, and the network is the model's"
            )


def enlarged_weights(start: GenerationTower, patch: int) -> dict[str, Tensor]:
    """The weights of `start` for larger patches: inputs are averaged over the larger patch, outputs repeated.

    Raises:
        ValueError: `patch` is no multiple of the start's.
    """
    factor, rest = divmod(patch, start.patch)
    if rest:
        raise ValueError(f"patches of {patch} are no multiple of patches of {start.patch}")
    weights = dict(start.state_dict())
    for name in ("patches_in.weight", "reference_in.weight", "router.patches_in.weight"):
        if name in weights:
            weights[name] = _enlarged(weights[name], start.patch, factor) / factor**2
    weights["patches_out.weight"] = _enlarged(weights["patches_out.weight"].T, start.patch, factor).T
    weights["patches_out.bias"] = _enlarged(weights["patches_out.bias"], start.patch, factor)
    return weights


def _enlarged(values: Tensor, patch: int, factor: int) -> Tensor:
    """[..., C p p] -> [..., C (f p) (f p)], every value repeated in a square."""
    squares = values.unflatten(-1, (-1, patch, patch))
    return squares.repeat_interleave(factor, -1).repeat_interleave(factor, -2).flatten(-3)
