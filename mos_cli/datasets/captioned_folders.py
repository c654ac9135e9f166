"""The captioned pictures of a folder, or of webdataset shards.

The content of the folder decides among three layouts:
- `*.tar`: webdataset shards, with `KEY.jpg` (png, webp, ...) and `KEY.txt`;
- `metadata.jsonl` or `metadata.csv`: entries with `file_name` and `text` (Hugging Face's imagefolder);
- else pictures anywhere below the folder, with `NAME.txt` beside `NAME.jpg`.

An edit has the picture it starts from as well, and its caption is the instruction: `KEY.before.jpg`, `before` in the
index, or `NAME.before.jpg`. Everything is checked when the folder is loaded: what cannot be used is left out with its
reason.
"""

import csv
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from mos_cli.datasets.captioned import Blob, Captioned, Example, Unused, caption_of, open_blob, text_of
from mos_cli.errors import InputError
from mos_cli.images.pictures import FORMATS
from mos_cli.utils.counts import counted
from mos_cli.utils.files import atomic_write
from mos_cli.utils.folders import cache_folder

BEFORE = ".before"
CAPTIONS = (".txt", ".caption")
INDEXES = ("metadata.jsonl", "metadata.csv")
COLUMNS = {
    "picture": ("file_name", "image", "edited_image", "after"),
    "caption": ("text", "caption", "prompt", "edit_prompt", "instruction"),
    "before": ("before", "input_image", "original_image"),
}
"""The names of columns of an index, as data sets in the field have them."""
OF_SYSTEMS = {".ds_store", "thumbs.db", "desktop.ini", ".gitattributes", ".gitignore"}
"""Files that systems put into folders, which nobody misses."""
MOST_HELD_OUT = 64
"""Pictures that are held out at most: their loss is measured again and again."""


def load_captioned(
    folder: Path,
    *,
    caption: str | None = None,
    background: str = "white",
    flip: bool = False,
    repeats: Mapping[str, int] | None = None,
    held_out: float = 0.0,
    smallest: int = 1,
    problem_of: Callable[[str], str | None] = lambda _: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Captioned:
    """Finds and checks the pictures and captions of a folder; sorted by name.

    What was found of a picture is remembered in the cache by its size and time.

    Args:
        caption: that of pictures without one; {folder} and {name} are the names of its folder and its file.
        background, flip, repeats: see `Captioned`.
        held_out: share of the pictures, and of the edits, that are held out; at least one of two.
        smallest: least pixels along the shorter side of a picture.
        problem_of: why a caption cannot be used; None if it can.
        progress: called with the number of examples that are checked, and of all.

    Raises:
        InputError: there are none that can be used, an index or a shard cannot be read, or there is no folder of a name
            in `repeats`.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: [data] path is where the pictures with captions lie")
    unused: list[Unused] = []
    if shards := sorted(folder.glob("*.tar")):
        examples = [example for shard in shards for example in _in_shard(shard, caption, unused)]
    else:
        files = _files(folder, unused)
        index = next((folder / name for name in INDEXES if (folder / name).is_file()), None)
        examples = _in_index(index, files, unused) if index else _beside(files, folder, caption, unused)
    kept = []
    for example, reason in _checked(examples, folder, smallest, problem_of, progress):
        if isinstance(reason, Example):
            kept.append(reason)
        else:
            unused.append(Unused(example.picture.name, reason))
    if not kept:
        why = f" ({counted(len(unused), 'file')} left out: {unused[0].name}: {unused[0].reason})" if unused else ""
        raise InputError(
            f"no pictures in {folder} that can be used{why}: put pictures with captions there, or *.tar shards"
        )
    repeats = repeats or {}
    folders = {example.folder for example in kept}
    if unknown := sorted(repeats.keys() - folders):
        raise InputError(
            f"[data] repeats names {unknown[0]}, and {folder} has pictures in {', '.join(sorted(folders))}"
        )
    chosen = {
        example
        for edits in (False, True)
        for example in _held_out([one for one in kept if (one.before is not None) == edits], held_out, folder)
    }
    return Captioned(
        tuple(example for example in kept if example not in chosen),
        tuple(unused),
        tuple(example for example in kept if example in chosen),
        background,
        flip,
        repeats,
    )


def _held_out(examples: list[Example], share: float, folder: Path) -> list[Example]:
    """A share of the examples, by the hashes of their names: new pictures hardly change which ones."""
    if not share or len(examples) < 2:
        return []
    count = min(max(1, round(share * len(examples))), MOST_HELD_OUT, len(examples) - 1)

    def order(example: Example) -> str:
        return hashlib.sha256(example.picture.name.replace(str(folder), "").encode()).hexdigest()

    return sorted(examples, key=order)[:count]


def _files(folder: Path, unused: list[Unused]) -> list[Path]:
    """All files below a folder, sorted; linked folders and those of other programs are not entered."""
    files = []
    for place, folders, names in os.walk(folder):
        for name in sorted(folders):
            if (Path(place) / name).is_symlink():
                unused.append(Unused(str(Path(place) / name), "a linked folder is not followed: name it as the folder"))
            elif name.startswith("."):
                unused.append(Unused(str(Path(place) / name), "a hidden folder"))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.lower() in OF_SYSTEMS:
                continue
            if name.startswith("."):
                reason = "a resource file of macOS" if name.startswith("._") else "a hidden file"
                unused.append(Unused(str(Path(place) / name), reason))
            else:
                files.append(Path(place) / name)
    return sorted(files)


def _is_picture(name: str) -> bool:
    """Whether a file has the suffix of a format that is read."""
    return Image.registered_extensions().get(PurePosixPath(name).suffix.lower()) in FORMATS


def _other(name: str) -> Unused:
    """A file that is neither picture nor caption."""
    suffix = PurePosixPath(name).suffix
    if suffix.lower() in CAPTIONS:
        return Unused(name, "a caption without a picture of its name")
    if suffix.lower() in Image.registered_extensions():
        return Unused(name, f"pictures of the format {suffix} are not read: save it as PNG or JPEG")
    return Unused(name, "not a picture")


def _beside(files: list[Path], folder: Path, template: str | None, unused: list[Unused]) -> list[Example]:
    pictures = [path for path in files if _is_picture(path.name)]
    captions = {path.with_suffix(""): path for path in files if path.suffix.lower() in CAPTIONS}
    befores = {path.with_suffix("").with_suffix(""): path for path in pictures if path.stem.endswith(BEFORE)}
    examples, used = [], set[Path]()
    for path in pictures:
        if path.stem.endswith(BEFORE):
            continue
        before = befores.get(path.with_suffix(""))
        if before is not None:
            used.add(before)
        if (caption := captions.get(path.with_suffix(""))) is not None:
            used.add(caption)
            examples.append(_example(path, Blob(str(caption), caption), before))
        elif template is not None:
            examples.append(_example(path, _filled(template, path.parent.name or folder.name, path.stem), before))
        else:
            text = path.with_suffix(".txt").name
            unused.append(Unused(str(path), f"it has no caption: write one into {text}, or give one with --caption"))
    unused += [
        Unused(str(path), "there is no picture after it beside it") for path in befores.values() if path not in used
    ]
    known = {*pictures, *used}
    unused += [_other(str(path)) for path in files if path not in known]
    return examples


def _filled(template: str, folder: str, name: str) -> str:
    return template.replace("{folder}", folder).replace("{name}", name)


def _example(path: Path, caption: Blob | str, before: Path | None) -> Example:
    beside = None if before is None else Blob(str(before), before)
    return Example(Blob(str(path), path), caption, beside, path.absolute().parent.name)


def _in_index(index: Path, files: list[Path], unused: list[Unused]) -> list[Example]:
    examples, named = [], {index}
    entries = _lines if index.suffix == ".jsonl" else _rows
    for number, entry in entries(index):
        fields = {what: next((entry[n] for n in names if entry.get(n)), None) for what, names in COLUMNS.items()}
        where = f"{index}, line {number}"
        if not all(isinstance(fields[what], str) for what in ("picture", "caption")):
            raise InputError(f"{where}: no {COLUMNS['picture'][0]} and {COLUMNS['caption'][0]}")
        paths = []
        for what in ("picture", "before"):
            if fields[what] is None:
                continue
            path = Path(os.path.normpath(index.parent / str(fields[what])))
            if not path.is_relative_to(index.parent):
                raise InputError(f"{where}: {fields[what]} is outside of the folder")
            paths.append(path)
        named |= set(paths)
        if missing := [path for path in paths if not path.is_file()]:
            unused.append(Unused(str(missing[0]), f"line {number} of {index.name} names it, and it is not there"))
            continue
        examples.append(_example(paths[0], str(fields["caption"]), paths[1] if len(paths) > 1 else None))
    rest = [path for path in files if path not in named]
    unused += [Unused(str(path), f"{index.name} does not name it") for path in rest]
    return examples


def _lines(index: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON Lines file with the numbers of their lines."""
    for number, line in enumerate(text_of(Blob(str(index), index)).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            raise InputError(f"{index}, line {number}: not a JSON object with file_name and text")
        yield number, entry


def _rows(index: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a CSV file with the numbers of their lines."""
    reader = csv.DictReader(io.StringIO(text_of(Blob(str(index), index)), newline=""), skipinitialspace=True)
    for row in reader:
        yield reader.line_num, {str(name).strip(): value for name, value in row.items()}


def _in_shard(shard: Path, template: str | None, unused: list[Unused]) -> list[Example]:
    pictures: dict[str, Blob] = {}
    befores: dict[str, Blob] = {}
    captions: dict[str, Blob] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if not member.isfile():
                    continue
                # The key ends at the first dot of the file's name, as in webdataset.
                parent, _, name = member.name.rpartition("/")
                key, _, suffix = name.partition(".")
                key, kind = f"{parent}/{key}", f".{suffix.lower()}"
                blob = Blob(f"{member.name} in {shard}", shard, member.offset_data, member.size)
                if kind.count(".") == 1 and _is_picture(name):
                    pictures[key] = blob
                elif kind.startswith(BEFORE) and _is_picture(f"x{kind.removeprefix(BEFORE)}"):
                    befores[key] = blob
                elif kind in CAPTIONS:
                    captions[key] = blob
                elif _is_picture(name):
                    unused.append(Unused(blob.name, "a name in a shard ends at its first dot: rename it"))
                elif kind not in (".json", ".cls"):
                    unused.append(Unused(blob.name, _other(member.name).reason))
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"cannot read the shard {shard}: {error}") from None
    examples = []
    for key, picture in pictures.items():
        if (caption := captions.pop(key, None)) is None and template is None:
            unused.append(Unused(picture.name, "it has no caption: a .txt of the same name belongs beside it"))
            continue
        parent, _, name = key.rpartition("/")
        place = PurePosixPath(parent).name or shard.stem
        text = caption or _filled(template or "", place, name)
        examples.append(Example(picture, text, befores.pop(key, None), place))
    unused += [Unused(blob.name, "there is no picture after it beside it") for blob in befores.values()]
    unused += [
        Unused(blob.name, "a caption without a picture of its name")
        for key, blob in captions.items()
        if key not in pictures
    ]
    return examples


def _checked(
    examples: list[Example],
    folder: Path,
    smallest: int,
    problem_of: Callable[[str], str | None],
    progress: Callable[[int, int], None],
) -> Iterable[tuple[Example, Example | str]]:
    """Every example, with its caption as text if it can be used, or else the reason why it cannot."""
    cache = cache_folder() / "checked" / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]}.json"
    remembered, found = _remembered(cache), dict[str, Any]()

    def size_of(blob: Blob) -> list[int] | str:
        """Width and height of a picture that can be decoded, or why it cannot."""
        key = f"{blob.path}:{blob.offset}"
        try:
            status = blob.path.stat()
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        state = [status.st_size, status.st_mtime_ns, list(FORMATS)]
        if (known := remembered.get(key)) and known[0] == state:
            found[key] = known
            return known[1]
        try:
            result: list[int] | str = list(open_blob(blob, "white").size)
        except InputError as error:
            result = str(error).removeprefix(f"{blob.name} ").removeprefix("is ")
        found[key] = [state, result]
        return result

    def check(example: Example) -> Example | str:
        sizes = []
        for blob in (example.picture, example.before):
            if blob is None:
                continue
            size = size_of(blob)
            if isinstance(size, str):
                return size if blob is example.picture else f"the picture before it: {size}"
            sizes.append(size)
        if len(sizes) > 1 and sizes[0] != sizes[1]:
            return "it and the picture before it are of different sizes"
        if min(sizes[0]) < smallest:
            return f"too small: {sizes[0][0]}x{sizes[0][1]}, at least {smallest} pixels are needed along each side"
        try:
            caption = caption_of(example)
        except InputError as error:
            return str(error)
        if not caption:
            return "its caption is empty"
        return replace(example, caption=caption, size=(sizes[0][0], sizes[0][1]))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for done, (example, result) in enumerate(zip(examples, pool.map(check, examples), strict=True), start=1):
                progress(done, len(examples))
                # A tokenizer is for one thread at a time.
                problem = problem_of(str(result.caption)) if isinstance(result, Example) else None
                yield example, problem or result
        finally:
            pool.shutdown(cancel_futures=True)
    if found != remembered:
        # Where the cache cannot be written, the next run checks again.
        with suppress(InputError):
            atomic_write(cache, json.dumps(found).encode(), overwrite=True)


def _remembered(cache: Path) -> dict[str, Any]:
    """What an earlier check found; nothing if that cannot be read."""
    try:
        known = json.loads(cache.read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
