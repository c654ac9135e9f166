"""What clients send, checked by the functions that `mos generate` and `mos edit` use."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from PIL import Image, ImageOps
from pydantic import Base64Bytes, BaseModel, Field, StringConstraints, ValidationError

from mos_cli.bundles.bundle import edit_defaults
from mos_cli.config.recipe import (
    MAX_SEED,
    MAX_STEPS,
    EarlierPicture,
    Recipe,
    ThreadChanges,
    Threads,
    check_guidance,
    make_recipe,
    pixels_hash,
)
from mos_cli.config.settings import (
    OF_LOADED,
    RunSettings,
    TraceLevel,
    check_size,
    list_presets,
    make_settings,
    parse_size,
    resolve,
)
from mos_cli.errors import InputError, UsageError
from mos_cli.images.expansion import parse_expansion
from mos_cli.images.inputs import Finder, Inputs, Redraw, make_inputs
from mos_cli.images.outputs import check_recipe_fits, read_drawing
from mos_cli.images.pictures import Picture, make_picture, opened_picture, read_picture
from mos_cli.inference.requests import (
    EditRequest,
    check_recipe,
    edit_fields,
    generation_fields,
    random_seed,
    vary_recipe,
)
from mos_cli.inference.wildcards import expand_prompt
from mos_cli.routing.prompt_weights import parse_weights
from mos_cli.routing.trace import Recording, RecordOptions, Trace, read_routes
from mos_cli.server.drawing import CheckedRequest, ServedModel
from mos_cli.utils.validation import Frozen, Interval, PlainName, RouteRules, Solver, first_problem

MAX_PROMPT = 10_000
"""Characters of a prompt; what a model reads of it is less."""
MAX_RULES = 200
MAX_PICTURES = 10
"""Pictures of one request, drawn or shown."""
MAX_EARLIER = 50
"""Pictures that a replay may draw again before the last one."""
Prompt = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_PROMPT)]
RuleTexts = Annotated[RouteRules, Field(max_length=MAX_RULES)]
_Body = TypeVar("_Body", bound=BaseModel)


class Upload(BytesIO):
    """A file of a form; `name` is what messages call it."""

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(data)
        self.name = name


class Answering(Frozen):
    """How a request is answered.

    `stream`: by server-sent events, the picture last. `wait` false: at once, by the numbers of the jobs.
    """

    stream: bool = False
    wait: bool = True
    output_format: Literal["png", "jpeg", "webp"] = "png"
    trace: TraceLevel = "topk"
    regions: bool = False
    previews: bool = False

    @property
    def record_options(self) -> RecordOptions:
        return RecordOptions(probabilities=self.trace == "full", regions=self.regions, previews=self.previews)

    @property
    def suffix(self) -> str:
        return {"jpeg": "jpg"}.get(self.output_format, self.output_format)


class GenerationBody(Answering):
    """A picture from a prompt: the fields of OpenAI's `images/generations`, and the options of `mos generate`.

    What has no effect here is only taken at its default. `user` is not read.
    """

    prompt: Prompt
    model: str | None = None
    n: int = Field(default=1, ge=1, le=MAX_PICTURES)
    size: Annotated[str, StringConstraints(max_length=20)] | None = None
    response_format: Literal["b64_json"] | None = None
    quality: Literal["auto"] | None = None
    background: Literal["auto"] | None = None
    moderation: Literal["auto"] | None = None
    partial_images: Literal[0] | None = None
    user: str | None = None
    preset: PlainName | None = None
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    steps: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    solver: Solver | None = None
    cfg: float | None = Field(default=None, ge=0, le=100)
    cfg_interval: Interval | None = None
    negative: Annotated[str, StringConstraints(max_length=MAX_PROMPT)] | None = None
    feature_cache: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    routes: RuleTexts | None = None

    @property
    def asked_size(self) -> str | None:
        return None if self.size == "auto" else self.size


class EditBody(GenerationBody):
    """An edit, without its pictures and its mask: the fields of `images/edits`, and the options of `mos edit`."""

    input_fidelity: Literal["high"] | None = None
    image_cfg: float | None = Field(default=None, ge=0, le=100)
    strength: float = Field(default=1.0, gt=0, le=1)
    invert_mask: bool = False
    feather: float = Field(default=0.0, ge=0)
    composite: bool = False
    keep_alpha: bool = False
    max_pixels: int | None = Field(default=None, ge=1)
    expand: Annotated[str, StringConstraints(max_length=100)] | None = None


class ReplayBody(Answering):
    """How a picture is drawn again; `changes` are those of `mos replay --set`, KEY=VALUE."""

    changes: tuple[str, ...] = ()


class TraceBody(Frozen):
    """The trace of another run: its head and its arrays."""

    head: Trace
    arrays: Base64Bytes


class DrawBody(Frozen):
    """A recipe that a command of this machine has made, with all that it is drawn from; see `client.py`.

    `model_hash` is that of the bundle. `pictures` and `mask` are PNGs of the pixels, as `mos edit` reads them; they are
    expanded here.
    """

    recipe: Recipe
    model_hash: str
    probabilities: bool = False
    regions: bool = False
    previews: bool = False
    threads: Threads | None = None
    thread_changes: ThreadChanges | None = None
    pictures: tuple[Base64Bytes, ...] = Field(default=(), max_length=MAX_PICTURES)
    mask: Base64Bytes | None = None
    earlier: tuple[EarlierPicture, ...] = ()
    route_from: TraceBody | None = None


def read_body(kind: type[_Body], data: bytearray) -> _Body:
    """A body of JSON; raises UsageError with the first thing wrong in it."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise UsageError(first_problem(error, kind)) from None


def read_fields(kind: type[_Body], fields: Mapping[str, Sequence[str]]) -> _Body:
    """A body of the text fields of a form; one that is given several times is a list."""
    lists = {"routes", "changes"}
    values = {name: list(given) if name in lists or len(given) > 1 else given[0] for name, given in fields.items()}
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UsageError(first_problem(error, kind)) from None


def check_generation(body: GenerationBody, served: ServedModel) -> list[CheckedRequest]:
    """The pictures of a request.

    Raises:
        MosError: they cannot be drawn.
    """
    settings = _settings(body, served)
    size = parse_size(body.asked_size or settings.size, served.bundle.index.canvas)
    fields = generation_fields(settings, served.bundle, size, cfg_interval=body.cfg_interval)
    return _checked(body, served, settings, fields, None)


def check_edit(
    body: EditBody, files: Sequence[BytesIO], mask: BytesIO | None, served: ServedModel
) -> list[CheckedRequest]:
    """The pictures of an edit; see `check_generation`.

    Args:
        files: the edited picture, and further ones to draw from.
        mask: where it has transparent pixels, these may change; else what is white.
    """
    edit_defaults(served.bundle)
    settings = _settings(body, served)
    request = EditRequest(
        size=body.asked_size,
        max_pixels=body.max_pixels,
        mask=None if mask is None else _mask(read_picture(mask)),
        invert_mask=body.invert_mask,
        feather=body.feather,
        composite=body.composite,
        keep_alpha=body.keep_alpha,
        strength=body.strength,
        image_cfg=settings.image_cfg,
        expand=None if body.expand is None else parse_expansion(body.expand),
    )
    inputs = request.with_mask(make_inputs([read_picture(file) for file in files]))
    fields = edit_fields(settings, served.bundle, request, inputs, cfg_interval=body.cfg_interval)
    return _checked(body, served, settings, fields, inputs)


def check_replay(
    body: ReplayBody, file: BytesIO, files: Sequence[BytesIO], masks: Sequence[BytesIO], served: ServedModel
) -> CheckedRequest:
    """A picture drawn again from the recipe in its file.

    Args:
        files, masks: what it was edited from, where mos did not make it.

    Raises:
        NotServedError: another model has drawn it.
        MosError: it has no recipe, or cannot be drawn.
    """
    record = read_drawing(file)[1]
    if len(record.earlier) > MAX_EARLIER:
        raise UsageError(
            f"the picture goes back to {len(record.earlier)} others: {MAX_EARLIER} at most are drawn again"
        )
    changed = {}
    for change in body.changes:
        key, equals, value = change.partition("=")
        if not equals or key.strip() in ("model", "edit", "route_from", "loras", "template"):
            raise UsageError(f"changes: {change} is none that is made here, such as seed=7")
        changed[key.strip()] = value.strip()
    recipe = vary_recipe(record.recipe, changed)
    if recipe.route_from is not None:
        raise UsageError("the picture takes its routes from another run: draw it with mos replay --route-from")
    served.check(recipe, record.made)
    edit = recipe.edit
    if edit is not None:
        edit_defaults(served.bundle)
    guidances = {key: changed.get(key) for key in ("negative", "cfg_interval")}
    check_guidance(recipe.cfg, guidances, 1.0 if edit is None else edit.image_cfg)

    def inputs(redraw: Redraw) -> Inputs | None:
        finder = Finder(files, masks, redraw)
        found = finder.inputs_of(recipe, record.earlier)
        finder.check_all_used()
        return found

    checked = CheckedRequest(
        recipe,
        body.suffix,
        body.trace,
        served.settings.metadata,
        body.record_options,
        inputs=inputs,
        threads=record.made.threads,
        thread_changes=record.made.thread_changes,
    )
    _check(checked, served)
    return checked


def check_drawing(body: DrawBody, served: ServedModel) -> CheckedRequest:
    """The picture of a recipe that a command has made; see `check_generation`."""
    recipe = body.recipe
    if body.model_hash != served.bundle.hash:
        served.check(recipe)
        raise UsageError(f"this server draws with another version of {recipe.model}")
    served.check(recipe)
    inputs = None
    if recipe.edit is not None:
        edit_defaults(served.bundle)
        pictures = tuple(read_picture(Upload(data, "a picture")) for data in body.pictures)
        mask = None if body.mask is None else _pixels(body.mask)
        hashes = [source.sha256 for source in recipe.edit.sources]
        if [pixels_hash(picture.image) for picture in pictures] != hashes:
            raise InputError("the pictures are not those of the recipe")
        if (None if mask is None else pixels_hash(mask)) != (recipe.edit.mask and recipe.edit.mask.sha256):
            raise InputError("the mask is not that of the recipe")
        inputs = Inputs(pictures, mask, body.earlier)
        if recipe.edit.expand is not None:
            inputs = inputs.expanded(recipe.edit.expand)
    elif body.pictures or body.mask:
        raise UsageError("the recipe is that of no edit, and there are pictures")
    recording = None
    if body.route_from is not None:
        head = body.route_from.head
        routes = read_routes(head, body.route_from.arrays, "the arrays of route_from", "its head")
        recording = Recording(Path("route_from"), head, routes, None, None)
    checked = CheckedRequest(
        recipe,
        record_options=RecordOptions(body.probabilities, body.regions, body.previews),
        logged=False,
        inputs=lambda _redraw: inputs,
        route_from=recording,
        threads=body.threads,
        thread_changes=body.thread_changes,
    )
    _check(checked, served)
    return checked


def presets_of_requests() -> dict[str, str]:
    """The presets that set nothing of the loaded model, by name: their descriptions."""
    return {
        preset.name: preset.description
        for preset in list_presets()
        if all(getattr(preset.settings, name, None) is None for name in OF_LOADED)
    }


def _settings(body: GenerationBody, served: ServedModel) -> RunSettings:
    """The settings of a request, then of its preset, of the config file, and of the loaded model."""
    served.check_name(body.model)
    names = {"steps", "solver", "cfg", "cfg_interval", "negative", "feature_cache", "routes", "seed", "image_cfg"}
    flags = make_settings(**body.model_dump(include=names, exclude_none=True))
    if body.preset is not None and body.preset not in presets_of_requests():
        names = ", ".join(presets_of_requests())
        raise UsageError(f"preset: a request takes {names}; others set how the model is loaded, or are not there")
    settings = resolve(flags, body.preset)
    return settings.model_copy(update={name: getattr(served.settings, name) for name in OF_LOADED})


def _checked(
    body: GenerationBody, served: ServedModel, settings: RunSettings, fields: dict[str, Any], inputs: Inputs | None
) -> list[CheckedRequest]:
    checked = []
    first = random_seed() if settings.seed is None else settings.seed
    for seed in range(first, first + body.n):
        expanded, template = expand_prompt(body.prompt, seed)
        prompt, weights = parse_weights(expanded)
        recipe = make_recipe(prompt=prompt, template=template, weights=weights, seed=seed, **fields)
        one = CheckedRequest(
            recipe,
            body.suffix,
            body.trace,
            settings.metadata,
            body.record_options,
            inputs=lambda _redraw: inputs,
        )
        check_recipe_fits(Path(one.file_name), recipe, inputs, with_earlier=True)
        _check(one, served)
        checked.append(one)
    return checked


def _check(request: CheckedRequest, served: ServedModel) -> None:
    recipe, options = request.recipe, request.record_options
    check_size(*recipe.working_size, served.bundle.index.canvas)
    if options.regions and request.trace not in ("topk", "full"):
        raise UsageError(f"regions are written into the trace's arrays, which trace {request.trace} leaves out")
    check_recipe(recipe, served.bundle, compiled=served.settings.compile, regions=options.regions, options=options)


def _mask(picture: Picture) -> Picture:
    """A mask as `EditRequest` takes it, white where it may change; OpenAI's are transparent there."""
    if picture.image.mode != "RGBA":
        return replace(picture, name="the mask")
    white = ImageOps.invert(picture.image.getchannel("A"))
    return make_picture(white, "the mask")


def _pixels(data: bytes) -> Image.Image:
    with opened_picture(Upload(data, "the mask")) as (opened, _):
        return opened.convert("L")
