"""Building the art file: fetches the sets, names their pictures, draws the objects, writes pixels and manifest."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mos_cli.datasets.art.file import SCHEMA, ArtCounts, ArtManifest, ArtPackage, ArtPicture, ArtStyle
from mos_cli.datasets.art.names import Annotations, Concept
from mos_cli.datasets.art.rasterise import VISIBLE, rasterise_all, svg_document
from mos_cli.datasets.art.sets import EMOJIBASE, SETS, ArtSet, Package, fetch_package, read_members
from mos_cli.errors import InputError, UsageError
from mos_cli.utils.extras import require
from mos_cli.utils.files import atomic_file, atomic_write, check_writable, sha256_of
from mos_cli.utils.folders import cache_folder

if TYPE_CHECKING:
    import numpy as np

SIZES = (16, 256)
"""The smallest and the largest side of a picture, in pixels; the 3-D set has 256."""

Progress = Callable[[str, int, int], None]
"""Called with a stage, the number of items done and the total."""


def choose_sets(styles: Sequence[str]) -> tuple[ArtSet, ...]:
    """The sets of these styles in their usual order, all if none is named; UsageError for an unknown one."""
    known = [art.style for art in SETS]
    for style in styles:
        if style not in known:
            raise UsageError(f"no set is called {style!r}; there are {', '.join(known)}")
    return tuple(art for art in SETS if not styles or art.style in styles)


def build_art(
    out: Path,
    size: int = 128,
    sets: Sequence[ArtSet] = SETS,
    annotations: Package = EMOJIBASE,
    downloads: Path | None = None,
    overwrite: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> Path:
    """Fetches the sets, draws their objects at `size` pixels, writes art-SIZE.safetensors and art-SIZE.json.

    The same packages give the same bytes. Tarballs are kept in `downloads` (the cache if None). Returns the
    path of the manifest. Raises UsageError for a bad size or a missing resvg-py, InputError if the files are
    there already or cannot be written, and ModelError if a package cannot be fetched or is not the pinned one.
    """
    if not SIZES[0] <= size <= SIZES[1]:
        raise UsageError(f"the size of art is between {SIZES[0]} and {SIZES[1]} pixels, not {size}")
    manifest_path, pixels_path = out / f"art-{size}.json", out / f"art-{size}.safetensors"
    if not overwrite and (found := [path for path in (manifest_path, pixels_path) if path.exists()]):
        raise InputError(f"{found[0]} exists already; use --overwrite to build it again")
    require("drawing SVG", "train", "resvg_py")
    check_writable(out)
    downloads = cache_folder() / "downloads" if downloads is None else downloads
    packages = [annotations, *(art.package for art in sets)]
    tarballs = {}
    for done, package in enumerate(packages):
        progress("fetching packages", done, len(packages))
        tarballs[package] = fetch_package(package, downloads)
    progress("fetching packages", len(packages), len(packages))

    names = Annotations(tarballs[annotations])
    dropped: Counter[str] = Counter()
    chosen = [
        (concept, art.style, picture)
        for art in sets
        for concept, picture in _objects(art, tarballs[art.package], names, dropped)
    ]
    pixels, kept = _draw([picture for _, _, picture in chosen], size, progress)
    dropped["blank"] = len(chosen) - len(kept)
    pictures = tuple(
        _picture(index, concept, style)
        for index, (concept, style, _) in enumerate(chosen[position] for position in kept)
    )
    styles = Counter(picture.style for picture in pictures)

    with atomic_file(pixels_path, overwrite) as temporary:
        _save_pixels(pixels, temporary)
        sha256 = sha256_of(temporary)
        # Without a manifest nothing is read, so an interruption between the two writes is harmless.
        manifest_path.unlink(missing_ok=True)
    manifest = ArtManifest(
        schema=SCHEMA,
        size=size,
        sha256=sha256,
        sets=tuple(
            ArtStyle(**_pins(art.package), style=art.style, credit=art.credit, pictures=styles[art.style])
            for art in sets
        ),
        annotations=(ArtPackage(**_pins(annotations)),),
        counts=ArtCounts(
            pictures=len(pictures),
            concepts=len({picture.concept for picture in pictures}),
            dropped=dict(sorted(dropped.items())),
        ),
        pictures=pictures,
    )
    atomic_write(manifest_path, manifest.model_dump_json(by_alias=True, indent=1).encode(), overwrite)
    return manifest_path


def _objects(art: ArtSet, tarball: Path, names: Annotations, dropped: Counter[str]) -> list[tuple[Concept, bytes]]:
    """The pictures of objects in one set, one per concept, in the order of the annotations."""
    chosen: dict[str, tuple[Concept, bytes]] = {}
    for name, concept, picture in _named_pictures(tarball, names):
        if concept is None:
            dropped["unknown name"] += 1
        elif concept.left_out is not None:
            dropped[concept.left_out] += 1
        elif name in art.misnamed:
            dropped["misnamed"] += 1
        elif concept.hexcode in chosen:
            dropped["second picture"] += 1
        else:
            chosen[concept.hexcode] = concept, picture
    return sorted(chosen.values(), key=lambda item: item[0].order)


def _named_pictures(tarball: Path, names: Annotations) -> Iterator[tuple[str, Concept | None, bytes]]:
    """Every picture of a set: its name, its emoji if known, and its content."""
    files = read_members(tarball, lambda name: name.endswith((".webp", "/icons.json", "/chars.json")))
    for path in sorted(path for path in files if path.endswith(".webp")):
        name = Path(path).stem
        yield name, names.by_hexcode(name), files[path]
    if "package/icons.json" in files:
        icons = json.loads(files["package/icons.json"])
        chars = json.loads(files["package/chars.json"])
        # Sets with a table of code points are matched by it, the others by name. Aliases are not used: some are
        # the name of another object (noto-v1 calls the game "cricket").
        find = {name: names.by_hexcode(code) for code, name in chars.items()}.get if chars else names.by_name
        for name, icon in sorted(icons["icons"].items()):
            box = {key: icon.get(key, icons.get(key, 0)) for key in ("left", "top", "width", "height")}
            yield name, find(name), svg_document(icon["body"], **box)


def _draw(pictures: list[bytes], size: int, progress: Progress) -> "tuple[np.ndarray, list[int]]":
    """All pictures that are not blank, uint8 [n, size, size, 4], and their positions in `pictures`."""
    import numpy as np

    pixels = np.empty((len(pictures), size, size, 4), dtype=np.uint8)
    kept: list[int] = []
    for position, picture in enumerate(rasterise_all(pictures, size)):
        if picture[..., 3].mean() >= VISIBLE * 255:
            pixels[len(kept)] = picture
            kept.append(position)
        progress("drawing pictures", position + 1, len(pictures))
    return pixels[: len(kept)], kept


def _picture(index: int, concept: Concept, style: str) -> ArtPicture:
    return ArtPicture(
        index=index,
        concept=concept.hexcode,
        name=concept.label,
        keywords=concept.keywords,
        group=concept.group,
        subgroup=concept.subgroup,
        style=style,
    )


def _pins(package: Package) -> dict[str, str]:
    return {
        "package": package.name,
        "version": package.version,
        "sha256": package.sha256,
        "licence": package.licence,
    }


def _save_pixels(pixels: "np.ndarray", path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"pixels": pixels}, path, metadata={"schema": SCHEMA})
