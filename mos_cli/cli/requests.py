"""What is asked for, and the checked jobs that are made of it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mos_cli.cli.jobs import Job, RefusedJob, check_format, shortened
from mos_cli.cli.loading import fit_to_memory
from mos_cli.cli.options import DrawOptions
from mos_cli.cli.output import Report
from mos_cli.errors import InputError, MosError, UsageError

if TYPE_CHECKING:
    from mos_cli.bundles.bundle import Bundle
    from mos_cli.config.recipe import BatchRecipe, Recipe
    from mos_cli.config.settings import RunSettings, Settings
    from mos_cli.images.inputs import Inputs
    from mos_cli.images.manifest import Manifest
    from mos_cli.images.naming import Naming
    from mos_cli.images.pictures import PictureFile
    from mos_cli.inference.requests import EditRequest
    from mos_cli.routing.trace import RecordOptions

VARIED = ("seed", "steps", "cfg", "solver", "feature_cache", "size", "image_cfg", "strength")
"""What --vary takes: settings of a picture, not of the loaded model."""
MOST_WORDS = 10
"""The most words that are named in one note."""
Variation = tuple[tuple[str, str], ...]
"""Settings of one cell of a matrix, by name, in the order of the options."""


@dataclass(frozen=True)
class Request:
    """A prompt, or an instruction for pictures, with its settings; `count` pictures are drawn.

    Attributes:
        subject: what messages call it.
        flags: its settings, over those of the preset.
        sources: the pictures that are edited; none to draw from the prompt alone.
        edit: what else an edit needs, but for its guidance towards the picture, which is a setting.
        output: where its pictures go, instead of where those of the run do.
        own: its settings are its own, a line of a jobs file: if they are wrong, the others are drawn.
        variation: its place in a matrix.
    """

    prompt: str
    subject: str
    flags: "Settings"
    count: int = 1
    sources: "tuple[PictureFile, ...]" = ()
    edit: "EditRequest | None" = None
    output: str | None = None
    own: bool = False
    variation: Variation = ()


def vary(requests: Sequence[Request | RefusedJob], options: Sequence[str]) -> list[Request | RefusedJob]:
    """Every request with every combination of the values of --vary, such as "cfg=2,4" and "steps=12,24".

    Raises:
        UsageError: an option is not understood, or a value is out of range.
    """
    axes: dict[str, list[tuple[str, str]]] = {}
    for option in options:
        name, equals, values = option.partition("=")
        name = name.strip().replace("-", "_")
        listed = [value.strip() for value in values.split(",")]
        if name not in VARIED or not equals or not all(listed):
            raise UsageError(f"--vary {option}: write NAME=VALUE,VALUE with one of {', '.join(VARIED)}")
        if name in axes or len(set(listed)) < len(listed):
            raise UsageError(f"--vary {option}: name each setting once, and each of its values")
        axes[name] = [(name, value) for value in listed]
    varied = []
    for request in requests:
        if isinstance(request, RefusedJob):
            varied.append(request)
            continue
        for variation in product(*axes.values()):
            varied.append(_with(request, variation))
    return varied


def _with(request: Request, variation: Variation) -> Request:
    from mos_cli.config.settings import make_settings

    values, edit = dict(variation), request.edit
    if edit is None and (wrong := values.keys() & {"strength", "image_cfg"}):
        raise UsageError(f"--vary {wrong.pop()}: this is for edits of pictures")
    if edit is not None:
        if "strength" in values:
            try:
                edit = replace(edit, strength=float(values.pop("strength")))
            except ValueError:
                raise UsageError(f"--vary strength: {dict(variation)['strength']} is no number") from None
        if "size" in values:
            edit = replace(edit, size=values.pop("size"))
    try:
        flags = make_settings(**request.flags.model_dump(exclude_none=True) | values)
    except UsageError as error:
        raise UsageError(f"--vary {str(error).removeprefix('--')}") from None
    return replace(request, flags=flags, edit=edit, variation=variation)


class JobMaker:
    """Turns requests into jobs."""

    def __init__(
        self,
        requests: Sequence[Request | RefusedJob],
        bundle: "Bundle",
        options: DrawOptions,
        record_options: "RecordOptions",
        names: "Naming",
        report: Report,
    ) -> None:
        self.requests, self.bundle, self.options, self.record_options = requests, bundle, options, record_options
        self.names, self.report = names, report
        self._read = lru_cache(maxsize=1)(_read)
        self._noted: set[str] = set()
        self._naming = lru_cache(maxsize=None)(self._names_of)
        self._settings_of: dict[str, RunSettings] = {}
        self._batches: dict[tuple[int, int], tuple[int, BatchRecipe]] = {}
        asked = [request for request in requests if isinstance(request, Request)]
        self._prompts = len({request.prompt for request in asked}) > 1
        self._sources = len({request.sources for request in asked}) > 1

    def fit(self, settings: "RunSettings") -> "RunSettings":
        """The settings of the run, fitted to the memory for the largest picture."""
        if settings.max_vram is None and settings.offload == "none":
            return settings
        sizes, references = [self.bundle.index.canvas.native], 0
        for request in self.requests:
            if isinstance(request, Request):
                try:
                    inputs = self._inputs(request)
                    sizes.append(self._working_size(request, self._settings(request, settings), inputs))
                except MosError:
                    # It is told when the jobs are made.
                    continue
                references = max(references, 0 if inputs is None else len(inputs.pictures))
        size = max(sizes[1:] or sizes, key=lambda size: size[0] * size[1])
        fetch = not self.options.dry_run
        return fit_to_memory(self.bundle, settings, size, self.report, fetch=fetch, references=references)

    def jobs(
        self, settings: "RunSettings", manifest: "Manifest", seed: int, shared: dict[str, Any]
    ) -> list[Job | RefusedJob]:
        """The jobs of all requests, in order.

        Args:
            settings: those of the run, fitted.
            seed: of the first picture of a request that has none.
            shared: further fields of all recipes.

        Raises:
            MosError: a setting of the run is wrong, or pictures cannot be written.
        """
        jobs: list[Job | RefusedJob] = []
        self._batches = self._divided(settings, seed, shared)
        for request in self.requests:
            if isinstance(request, RefusedJob):
                jobs.append(request)
                continue
            try:
                self._add(jobs, request, settings, manifest, seed, shared)
            except _UnreadableError as unreadable:
                jobs.append(RefusedJob(request.subject, unreadable.error))
            except MosError as error:
                if not request.own:
                    raise
                jobs.append(RefusedJob(request.subject, error))
        self._note_unknown(jobs)
        return jobs

    def _note_unknown(self, jobs: Sequence[Job | RefusedJob]) -> None:
        """Says which words of the prompts the model was not taught, and which prompts name none of its objects."""
        from mos_cli.bundles.taught import taught_scenes

        taught = taught_scenes(self.bundle)
        if taught is None or not taught.alone:
            return
        from mos_cli.datasets.scenes.known_words import KnownWords

        known, model = KnownWords(taught), self.bundle.ref
        unknown: dict[str, bool] = {}
        nameless: list[str] = []
        # A LoRA was taught words of its own.
        recipes = [job.recipe for job in jobs if isinstance(job, Job) and not job.recipe.loras]
        for prompt, edit in dict.fromkeys((recipe.prompt, recipe.edit is not None) for recipe in recipes):
            words = known.unknown(prompt, edit=edit)
            unknown |= dict.fromkeys(words, edit)
            if not (words or edit or known.names_object(prompt)):
                nameless.append(prompt)
        if unknown:
            told = list(unknown.items())[:MOST_WORDS]
            listed = ", ".join(word + _guess(known.nearest(word, edit=edit)) for word, edit in told)
            more = f" and {len(unknown) - MOST_WORDS} more" if len(unknown) > MOST_WORDS else ""
            self._note(f"{model} was not taught: {listed}{more}")
        if nameless:
            first, guess = repr(shortened(nameless[0])), _guess(known.name_with(nameless[0]))
            which = f"{first} names" if len(nameless) == 1 else f"{len(nameless)} prompts, such as {first}, name"
            objects = f"none of the {len(taught.words)} objects that {model} was taught{guess}"
            self._note(f"{which} {objects}: mos models show {model} lists them")

    def _add(
        self,
        jobs: list[Job | RefusedJob],
        request: Request,
        run: "RunSettings",
        manifest: "Manifest",
        seed: int,
        shared: dict[str, Any],
    ) -> None:
        from mos_cli.bundles.bundle import edit_defaults
        from mos_cli.inference.requests import check_recipe, edit_fields, generation_fields

        settings = self._settings(request, run)
        if request.edit is not None:
            edit_defaults(self.bundle)
        with _unreadable():
            inputs = self._inputs(request)
        interval = request.flags.cfg_interval
        size = self._working_size(request, settings, inputs)
        with self.report.stage("libraries"):
            if request.edit is None or inputs is None:
                fields = generation_fields(settings, self.bundle, size, cfg_interval=interval)
            else:
                edit = replace(request.edit, image_cfg=settings.image_cfg)
                fields = edit_fields(settings, self.bundle, edit, inputs, cfg_interval=interval)
                lost = edit.lost(inputs, (fields["width"], fields["height"]))
                self._note(*inputs.notes, *([] if lost is None else [lost]))
        names = self.names if request.output is None else self._naming(request.output)
        source = next((file for file in request.sources if isinstance(file, Path)), None)
        for number, recipe in self._recipes(request, seed if settings.seed is None else settings.seed, fields | shared):
            if isinstance(recipe, MosError):
                jobs.append(RefusedJob(request.subject, recipe))
                continue
            of_batch, batch = self._batches.get((id(request), number), (None, None))
            recipe = recipe.model_copy(update={"batch": batch})
            check_recipe(
                recipe,
                self.bundle,
                compiled=settings.compile,
                regions=self.options.regions,
                options=self.record_options,
            )
            key = manifest.key(recipe)
            path = manifest.finished(key)
            if path is None and self.options.skip_existing:
                if names.numbered:
                    raise UsageError("--skip-existing looks for names, and {number} always makes a new one: drop it")
                path = names.existing(recipe, source)
            done = path is not None
            if path is None:
                path = names.path(recipe, source)
                check_format(path, recipe, inputs, settings.metadata)
            again = None if inputs is None else partial(self._unchanged, request, recipe)
            jobs.append(Job(recipe, path, names, again, source, key, self._cell(request, number), done, of_batch))

    def _recipes(
        self, request: Request, first: int, fields: dict[str, Any]
    ) -> "Iterator[tuple[int, Recipe | MosError]]":
        """The recipe of every picture of a request, or what is wrong with its prompt, with its seed."""
        from mos_cli.config.recipe import make_recipe
        from mos_cli.inference.wildcards import expand_prompt
        from mos_cli.routing.prompt_weights import parse_weights

        for number in range(first, first + request.count):
            try:
                expanded, template = expand_prompt(request.prompt, number)
                prompt, weights = parse_weights(expanded)
            except MosError as error:
                yield number, error
                continue
            yield number, make_recipe(prompt=prompt, template=template, weights=weights, seed=number, **fields)

    def _divided(
        self, run: "RunSettings", seed: int, shared: dict[str, Any]
    ) -> "dict[tuple[int, int], tuple[int, BatchRecipe]]":
        """The batch of every picture that is not drawn alone, with its number, by its request and its seed.

        Pictures whose recipes differ in their prompts and seeds alone are divided in their order, whatever is done
        already: a run that is resumed makes the same batches.
        """
        from mos_cli.bundles.adapters import AdapterBundle
        from mos_cli.cli.progress import fetch_with_progress
        from mos_cli.config.recipe import BatchRecipe
        from mos_cli.inference.requests import batch_size, generation_fields

        if run.batch_size == 1:
            return {}
        if run.batch_size == "auto" and not self.options.dry_run and not isinstance(self.bundle, AdapterBundle):
            # What fits depends on its size.
            with self.report.stage("fetching"):
                fetch_with_progress(self.bundle.index.understanding, quiet=self.report.quiet)
        if any(isinstance(request, Request) and request.edit is not None for request in self.requests):
            self._note("edits are drawn alone, whatever --batch-size is")
        alike: dict[Recipe, list[tuple[int, int]]] = {}
        for request in self.requests:
            if isinstance(request, RefusedJob) or request.edit is not None:
                continue
            try:
                settings = self._settings(request, run)
                interval = request.flags.cfg_interval
                fields = generation_fields(
                    settings, self.bundle, self._working_size(request, settings, None), cfg_interval=interval
                )
                first = seed if settings.seed is None else settings.seed
                for number, recipe in self._recipes(request, first, fields | shared):
                    if not isinstance(recipe, MosError):
                        own = {"prompt": "x", "seed": 0, "negative": "", "template": None}
                        own |= {"weights": None, "negative_weights": None}
                        alike.setdefault(recipe.model_copy(update=own), []).append((id(request), number))
            except MosError:
                # It is told when the jobs are made.
                continue
        batches = []
        for recipe, pictures in alike.items():
            size = recipe.working_size
            most = batch_size(run, self.bundle, size, precision=recipe.precision, quant=recipe.quant)
            batches += [pictures[start : start + most] for start in range(0, len(pictures), most)]
        return {
            picture: (number, BatchRecipe(size=len(batch), place=place))
            for number, batch in enumerate(batches)
            for place, picture in enumerate(batch)
            if len(batch) > 1
        }

    def _settings(self, request: Request, run: "RunSettings") -> "RunSettings":
        """The settings of a request, with what concerns the loaded model from the run."""
        from mos_cli.config.settings import OF_LOADED

        settings = self._resolved(request.flags)
        return settings.model_copy(update={name: getattr(run, name) for name in (*OF_LOADED, "batch_size")})

    def _resolved(self, flags: "Settings") -> "RunSettings":
        """The settings of flags; the preset and the config file are read once for equal ones."""
        from mos_cli.config.settings import resolve

        key = flags.model_dump_json()
        if key not in self._settings_of:
            self._settings_of[key] = resolve(flags, self.options.preset)
        return self._settings_of[key]

    def _working_size(self, request: Request, settings: "RunSettings", inputs: "Inputs | None") -> tuple[int, int]:
        from mos_cli.config.settings import parse_size

        canvas = self.bundle.index.canvas
        if request.edit is None or inputs is None:
            return parse_size(settings.size, canvas)
        return request.edit.working_size(inputs, canvas)

    def _inputs(self, request: Request) -> "Inputs | None":
        return None if request.edit is None else self._read(request.sources, request.edit)

    def _unchanged(self, request: Request, recipe: "Recipe") -> "Inputs":
        """The pictures of an edit, when it is drawn; raises InputError if they are not those of the recipe any more."""
        from mos_cli.config.recipe import pixels_hash
        from mos_cli.images.pictures import name_of

        assert request.edit is not None
        assert recipe.edit is not None
        inputs = self._read(request.sources, request.edit)
        for image, source, file in zip(inputs.sources, recipe.edit.sources, request.sources, strict=True):
            if pixels_hash(image) != source.sha256:
                raise InputError(f"{name_of(file)} was changed after the run began: run it again")
        return inputs

    def _names_of(self, output: str) -> "Naming":
        from mos_cli.images.naming import naming

        names = naming(output, suffix=self._resolved(self.options.settings()).format)
        if names.template == "-":
            raise UsageError('output "-" is for one picture, without a jobs file: name a file or folder')
        names.returned, names.overwrite = self.names.returned, self.options.overwrite and not names.numbered
        return names

    def _cell(self, request: Request, seed: int) -> tuple[str, str]:
        values = [f"{name} {value}" for name, value in request.variation]
        row = [request.subject] if self._sources else []
        row += [shortened(request.prompt)] if self._prompts else []
        row += values[1:] + ([f"seed {seed}"] if request.count > 1 else [])
        return ", ".join(row), values[0] if values else ""

    def _note(self, *notes: str) -> None:
        for note in notes:
            if note not in self._noted:
                self._noted.add(note)
                self.report.note("note", note, note=note)


def _guess(name: str | None) -> str:
    return f" (did you mean {name}?)" if name else ""


class _UnreadableError(Exception):
    """A picture or a prompt of one request is wrong, and not a setting of the run."""

    def __init__(self, error: MosError) -> None:
        self.error = error


@contextmanager
def _unreadable() -> Iterator[None]:
    try:
        yield
    except MosError as error:
        raise _UnreadableError(error) from None


def _read(sources: "tuple[PictureFile, ...]", edit: "EditRequest") -> "Inputs":
    from mos_cli.images.inputs import read_inputs

    return edit.with_mask(read_inputs(sources))
