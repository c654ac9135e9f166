"""A run's captioned pictures: read and checked as its recipe says, and shown as the network sees them."""

from collections.abc import Callable
from functools import partial

from PIL import Image

from mos_cli.bundles.bundle import find_bundle
from mos_cli.datasets.captioned import Captioned, bucket_shape
from mos_cli.datasets.captioned_folders import load_captioned
from mos_cli.datasets.tables import CaptionedTable
from mos_cli.errors import UsageError
from mos_cli.images.sheets import contact_sheet
from mos_cli.towers.understanding import PromptTokenizer
from mos_cli.training.recipe import TrainRecipe
from mos_cli.training.references import understanding_of
from mos_cli.training.stages import Stage, curriculum
from mos_cli.utils.files import expand

ShapeOf = Callable[[tuple[int, int]], tuple[int, int]]
"""The width and height that a picture gets, by its own."""
TOKEN_LINES = 6
"""Lines under a picture of a sheet for its tokens."""


def read_pictures(
    recipe: TrainRecipe,
    data: CaptionedTable,
    stage: Stage,
    tokenizer: PromptTokenizer,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Captioned:
    """The captioned pictures of a stage; raises InputError as `load_captioned` does."""
    limit = min(recipe.train.context_tokens, tokenizer.max_tokens)

    def problem_of(caption: str) -> str | None:
        tokens = len(tokenizer.tokenizer(caption, verbose=False)["input_ids"])  # type: ignore[arg-type]
        if tokens <= limit:
            return None
        return f"its caption has {tokens} tokens, {limit} are read: shorten it, or raise context_tokens in the recipe"

    return load_captioned(
        expand(data.path),
        caption=data.caption,
        background=data.background,
        flip=data.flip,
        repeats=data.repeats,
        held_out=data.held_out,
        smallest=stage.canvas // 4,
        problem_of=problem_of,
        progress=progress,
    )


def shape_in(recipe: TrainRecipe, stage: Stage) -> ShapeOf:
    """The shapes that pictures get in a stage with buckets."""
    canvas = recipe.bundle.canvas
    # A stage on a smaller canvas has smaller shapes.
    limits = {"smallest": min(canvas.min, stage.canvas), "largest": max(canvas.max, stage.canvas)}
    return partial(bucket_shape, canvas=stage.canvas, multiple=canvas.multiple, **limits)


def look(
    recipe: TrainRecipe, count: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[Captioned, dict[tuple[int, int], int], Image.Image]:
    """What the network sees in the last stage of a recipe: the pictures, how many have each shape, and a sheet.

    The sheet has `count` pictures from all over the data, an edit after the picture before it, with the tokens of
    their captions.

    Raises:
        UsageError: the recipe has no captioned pictures.
        InputError: there are none that can be used.
        ModelError: the model or its understanding tower is not found.
    """
    stage = curriculum(recipe).stages[-1]
    data = stage.data
    if not isinstance(data, CaptionedTable):
        raise UsageError("the recipe has no captioned pictures to look at")
    start = None if recipe.start_from is None else find_bundle(recipe.start_from)
    tokenizer = PromptTokenizer(understanding_of(recipe, start)[1])
    captioned = read_pictures(recipe, data, stage, tokenizer, progress)
    square = (stage.canvas, stage.canvas)
    shape_of = shape_in(recipe, stage) if data.buckets else lambda _: square
    everything = (*captioned.examples, *captioned.held_out)
    shapes: dict[tuple[int, int], int] = {}
    for example in everything:
        shapes[shape_of(example.size)] = shapes.get(shape_of(example.size), 0) + 1
    shown = everything[:: max(1, len(everything) // count)][:count]
    cells = []
    for example in shown:
        pixels, caption = captioned.load(example, shape_of(example.size))
        held_out = "held out: " if example in captioned.held_out else ""
        tokens = tokenizer.tokenizer.convert_ids_to_tokens(tokenizer.tokenizer(caption)["input_ids"])  # type: ignore[arg-type]
        cells += [(Image.fromarray(before), "before") for before in pixels[1:]]
        cells.append((Image.fromarray(pixels[0]), held_out + " ".join(tokens)))
    return captioned, dict(sorted(shapes.items())), contact_sheet(cells, lines=TOKEN_LINES)
