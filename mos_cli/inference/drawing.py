"""A finished picture with its record and its trace, and the files it is written to. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mos_cli.config.recipe import PictureRecord
from mos_cli.config.settings import Metadata, TraceLevel
from mos_cli.images.companions import animation, check_name, companions, write_picture
from mos_cli.images.outputs import Encoded, check_fits, encode, metadata_length, picture_format
from mos_cli.routing.trace import Routes, Trace, trace_files
from mos_cli.utils.files import expand


@dataclass(frozen=True)
class Drawing:
    """A finished picture, its record (recipe and versions), and its trace: a head, and the routes of each branch."""

    image: Image.Image
    record: PictureRecord
    trace: Trace
    routes: dict[str, Routes]
    previews: tuple[Image.Image, ...] = ()
    """The predicted clean pictures of the steps, where they were requested."""

    def __repr__(self) -> str:
        recipe = self.record.recipe
        return f"<Drawing of {recipe.prompt!r}, seed {recipe.seed}, {self.image.width}x{self.image.height}>"

    def _repr_png_(self) -> bytes | None:
        """What a notebook shows."""
        return self.image._repr_png_()

    def save(
        self, path: str | Path, *, trace: TraceLevel = "topk", metadata: Metadata = "full", overwrite: bool = False
    ) -> list[Path]:
        """Writes the picture with its recipe, and its trace and previews beside it: all of them or none.

        The suffix of the name says the format: .png, .jpg (quality 95, not transparent) or .webp (without loss).

        Args:
            trace: "off" for none, "summary" for the head alone; otherwise also all arrays that were recorded.
            metadata: "recipe" leaves out the recipes of what the picture was edited from and the text for other tools;
                "none" leaves out everything, and the picture cannot be replayed.

        Returns:
            The files written, the picture first.

        Raises:
            UsageError: the name ends in another suffix, or the format cannot hold the picture.
            NameTakenError: a file is there already that may not be replaced. With `overwrite` that is any file beside
                the picture that was not made with it.
            InputError: the folder cannot be written.
        """
        path = expand(path)
        check_name(path, overwrite)
        return write_picture(self.files(path, trace=trace, metadata=metadata), overwrite)

    def files(self, path: Path, *, trace: TraceLevel, metadata: Metadata) -> dict[Path, bytes]:
        """The files that `save` writes, by their paths, the picture first; raises UsageError as it does."""
        data, sha256 = self.encode(path, metadata)
        files = {path: data}
        if trace != "off":
            head = self.trace.model_copy(update={"picture": sha256})
            files |= trace_files(head, None if trace == "summary" else self.routes, path)
        if self.previews:
            files[companions(path).previews] = animation(self.previews, sha256)
        return files

    def encode(self, name: Path, metadata: Metadata = "full") -> Encoded:
        """The picture as a file of the format of a name; raises UsageError if that cannot hold it."""
        short = self.record.model_copy(update={"earlier": ()})
        record = {"full": self.record, "recipe": short, "none": None}[metadata]
        parameters = metadata == "full"
        length = 0 if record is None else metadata_length(record, parameters=parameters)
        check_fits(name, self.image.size, transparent=self.image.mode == "RGBA", metadata=length)
        return encode(self.image, picture_format(name), record, parameters=parameters)
