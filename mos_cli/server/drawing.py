"""What a server draws with: its model, and the checked requests from which `MoSPipeline.draw` makes pictures."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mos_cli.bundles.adapters import AdapterBundle
from mos_cli.bundles.bundle import Bundle
from mos_cli.bundles.shapes import read_generation
from mos_cli.config.recipe import EarlierPicture, Provenance, Recipe
from mos_cli.config.settings import OF_LOADED, Metadata, RunSettings, TraceLevel
from mos_cli.errors import MosError, UsageError
from mos_cli.images.inputs import Inputs, Redraw
from mos_cli.routing.trace import Recording, RecordOptions
from mos_cli.server.queue import StepLike
from mos_cli.utils.heap import return_freed_memory

if TYPE_CHECKING:
    from PIL.Image import Image

    from mos_cli.inference.pipeline import MoSPipeline

NAME = "picture"
"""The name that the files of a picture have in answers, without their suffixes."""


class NotServedError(MosError):
    """What is asked for belongs to another model than that of the server."""


def no_inputs(_redraw: Redraw) -> Inputs | None:
    return None


@dataclass(frozen=True)
class CheckedRequest:
    """A picture that is asked for, checked before it is queued.

    Attributes:
        suffix: the format of its file.
        logged: it is told when the picture is drawn; not where the command that asks for it writes a file.
        inputs: gives the pictures of an edit; in a replay they may have to be drawn again.
        threads, thread_changes: the number of CPU threads, as in a `Provenance`; None: as many as are free.
    """

    recipe: Recipe
    suffix: str = "png"
    trace: TraceLevel = "topk"
    metadata: Metadata = "full"
    record_options: RecordOptions = field(default_factory=RecordOptions)
    logged: bool = True
    inputs: Callable[[Redraw], Inputs | None] = no_inputs
    route_from: Recording | None = None
    threads: int | None = None
    thread_changes: tuple[tuple[int, int], ...] | None = None

    @property
    def file_name(self) -> str:
        return f"{NAME}.{self.suffix}"


@dataclass(frozen=True)
class Result:
    """The files of a picture by their names, the picture first, and the previews of its steps as PNGs."""

    files: dict[str, bytes]
    frames: tuple[bytes, ...]


class ServedModel:
    """The model of a server; loaded when it is needed, and released.

    Args:
        settings: those that it is loaded with, fitted to the memory.
        asked: those that were asked for, before they were fitted: a run with equal ones may draw here.
        precision, quant: as recipes have them.
        load: loads the pipeline.
        log: told of every picture that is drawn for a client, but for those without metadata.
    """

    def __init__(
        self,
        bundle: Bundle,
        settings: RunSettings,
        asked: RunSettings,
        *,
        precision: str,
        quant: str | None,
        loras: tuple[Any, ...] | None,
        load: "Callable[[], MoSPipeline]",
        log: Callable[[Recipe], object] = lambda recipe: None,
    ) -> None:
        self.bundle, self.settings = bundle, settings
        self.precision, self.quant, self.loras = precision, quant, loras
        self.asked = loaded_settings(asked, loras)
        self._load, self._log = load, log
        self.pipeline: MoSPipeline | None = None
        self._adapt_threads: Any = None

    @property
    def layers_and_blocks(self) -> tuple[int, int]:
        if isinstance(self.bundle, AdapterBundle):
            return self.bundle.index.layers, self.bundle.index.blocks
        tower = read_generation(self.bundle.folder / "generation")
        return tower.states_layers, tower.depth

    def load(self) -> "MoSPipeline":
        """The pipeline, loaded if it is not yet."""
        from mos_cli.utils.threads import AdaptiveThreads

        if self.pipeline is None:
            self._adapt_threads = AdaptiveThreads()
            self.pipeline = self._load()
        return self.pipeline

    def release(self) -> None:
        """Gives the memory of the model back to the system."""
        import torch

        self.pipeline = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return_freed_memory()

    def check_name(self, model: str | None) -> None:
        """Raises NotServedError if a request names another model; None names none."""
        if model not in (None, self.bundle.ref, self.bundle.index.name):
            raise NotServedError(f"this server draws with {self.bundle.ref}, not with {model}")

    def check(self, recipe: Recipe, made: Provenance | None = None) -> None:
        """Raises NotServedError if a recipe, or a picture made so, needs another model than the loaded one."""
        if recipe.model != self.bundle.ref or (made is not None and made.bundle_hash != self.bundle.hash):
            raise NotServedError(
                f"this server draws with {self.bundle.ref}, not with {recipe.model} or another version"
            )
        loaded = {"precision": self.precision, "quant": self.quant, "loras": self.loras}
        for name, value in loaded.items():
            if getattr(recipe, name) != value:
                raise NotServedError(f"{name} of the recipe is not that of this server: draw it with mos")

    def draw(self, request: CheckedRequest, on_step: Callable[[StepLike], None]) -> Result:
        """Draws what is asked for, and makes its files.

        Raises:
            MosError: as `MoSPipeline.draw` does.
        """
        from mos_cli.utils.threads import cpu_threads

        pipeline = self.load()
        if request.threads is None:
            self._adapt_threads()
        adapted = request.threads is None and pipeline.device.type == "cpu" and not pipeline.compiled
        adapting = (self._adapt_threads,) if adapted else ()

        def redraw(earlier: EarlierPicture, inputs: Inputs | None) -> "Image":
            self.check(earlier.recipe, earlier.made)
            if earlier.recipe.route_from is not None:
                raise UsageError("an earlier picture took its routes from another run: give the picture itself")
            with cpu_threads(earlier.made.threads, earlier.made.thread_changes) as follow:
                return pipeline.draw(earlier.recipe, [on_step, follow], inputs).image

        inputs = request.inputs(redraw)
        with cpu_threads(request.threads, request.thread_changes) as follow:
            drawing = pipeline.draw(
                request.recipe,
                [on_step, *adapting, follow],
                inputs,
                record_options=request.record_options,
                route_from=request.route_from,
            )
        files = drawing.files(Path(request.file_name), trace=request.trace, metadata=request.metadata)
        if request.logged and request.metadata != "none":
            self._log(drawing.record.recipe)
        return Result({path.name: data for path, data in files.items()}, tuple(map(_png, drawing.previews)))


def loaded_settings(settings: RunSettings, loras: tuple[Any, ...] | None) -> dict[str, Any]:
    """The settings of a loaded model as plain values, LoRAs by their hashes."""
    values = settings.model_dump(mode="json", include=set(OF_LOADED) - {"loras"})
    return values | {"loras": [lora.model_dump(mode="json") for lora in loras or ()]}


def _png(image: "Image") -> bytes:
    file = BytesIO()
    image.save(file, format="PNG", compress_level=1)
    return file.getvalue()
