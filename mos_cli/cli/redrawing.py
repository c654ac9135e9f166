"""Drawing pictures again as they were made: with their model, its settings and their numbers of CPU threads."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mos_cli.cli.jobs import shortened
from mos_cli.cli.loading import find_server, fit_to_memory, load_with_progress
from mos_cli.cli.output import Report
from mos_cli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from PIL.Image import Image

    from mos_cli.bundles.bundle import Bundle
    from mos_cli.config.recipe import EarlierPicture, Provenance, Recipe
    from mos_cli.config.settings import RunSettings
    from mos_cli.images.inputs import Inputs
    from mos_cli.inference.pipeline import MoSPipeline
    from mos_cli.server.client import RemotePipeline


class Redrawer:
    """Loads the models that pictures were made with, one at a time, and draws what a picture was edited from.

    Args:
        settings: those of the run.
        compiled: whether blocks are compiled; None: as a picture was made.
        models: names, folders or hub ids of models that are looked at first.
        loras: files of LoRAs that are not found otherwise.
    """

    def __init__(
        self,
        settings: "RunSettings",
        report: Report,
        *,
        compiled: bool | None,
        models: Sequence[str],
        loras: Sequence[str],
    ) -> None:
        self.settings, self.report, self.compiled = settings, report, compiled
        self.models, self.loras = models, loras
        self._loaded: dict[tuple[Any, ...], MoSPipeline | RemotePipeline] = {}

    def compiles(self, made: "Provenance") -> bool:
        """Whether a picture is drawn again with compiled blocks."""
        return made.compiled if self.compiled is None else self.compiled

    def pipeline(self, bundle: "Bundle", recipe: "Recipe", made: "Provenance") -> "MoSPipeline | RemotePipeline":
        """What draws a picture again, here or in the server; the last one is kept.

        Raises:
            MosError: as `find_server`, `fit_to_memory` and `load_with_progress` do.
        """
        key = (
            *(bundle.hash, recipe.precision, recipe.quant, recipe.loras),
            *(made.tiled, made.batched_guidance, self.compiles(made)),
        )
        if key not in self._loaded:
            # One at a time: together two models might not fit.
            self._loaded.clear()
            self._loaded[key] = self._find(bundle, recipe, made) or self._load(bundle, recipe, made)
        return self._loaded[key]

    def _find(self, bundle: "Bundle", recipe: "Recipe", made: "Provenance") -> "RemotePipeline | None":
        as_made = {"tiled": made.tiled, "batched_guidance": made.batched_guidance, "compile": self.compiles(made)}
        settings = self.settings.model_copy(update=as_made | {"batch_size": 1})
        return find_server(settings, bundle, self.report, recipe)

    def _load(self, bundle: "Bundle", recipe: "Recipe", made: "Provenance") -> "MoSPipeline":
        from mos_cli.inference.requests import with_loras

        fitted = fit_to_memory(
            bundle,
            self.settings,
            recipe.working_size,
            self.report,
            quant=recipe.quant or "none",
            precision=recipe.precision,
            references=0 if recipe.edit is None else len(recipe.edit.sources),
        )
        # As it was made, where that fits: otherwise it would round differently, and only come out close.
        how = {
            "tiled": fitted.tiled or made.tiled,
            "batched_guidance": fitted.batched_guidance and made.batched_guidance,
            "compile": self.compiles(made),
        }
        settings = with_loras(fitted.model_copy(update=how), recipe, self.loras)
        return load_with_progress(bundle, settings, self.report, precision=recipe.precision, quant=recipe.quant)

    def redraw(self, earlier: "EarlierPicture", inputs: "Inputs | None") -> "Image":
        """A picture that another was edited from.

        Raises:
            MosError: its model is not found, or cannot draw it.
            UsageError: it took its routes from another run.
        """
        from mos_cli.bundles.bundle import edit_defaults, find_recorded
        from mos_cli.config.settings import check_size

        recipe, made = earlier.recipe, earlier.made
        subject = repr(shortened(recipe.prompt))
        if recipe.route_from is not None:
            raise UsageError(f"{subject} took its routes from another run: give the picture with --input FILE")
        otherwise = "name it with --model FOLDER, or give the picture with --input FILE"
        bundle = find_recorded(recipe.model, made.bundle_hash, subject, otherwise, self.models)
        check_size(*recipe.working_size, bundle.index.canvas)
        if inputs is not None:
            edit_defaults(bundle)
        pipeline = self.pipeline(bundle, recipe, made)
        with threads_of(pipeline, made) as follow:
            return pipeline.draw(recipe, [follow], inputs).image


def threads_of(
    pipeline: "MoSPipeline | RemotePipeline", made: "Provenance"
) -> "AbstractContextManager[Callable[[Any], None]]":
    """Sets the numbers of CPU threads that a picture was made with, here or in the server.

    Others would round differently: the picture would only come out close.
    """
    from mos_cli.server.client import RemotePipeline
    from mos_cli.utils.threads import cpu_threads

    set_threads = pipeline.cpu_threads if isinstance(pipeline, RemotePipeline) else cpu_threads
    return set_threads(made.threads, made.thread_changes)
