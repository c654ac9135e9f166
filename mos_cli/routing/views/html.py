"""The routes of one picture, or of two side by side, as a single HTML page that needs no network.

Shapes: S steps, J generation blocks, T context tokens, K kept layers, M understanding layers, W words, N patches.
"""

import base64
import zlib
from collections.abc import Sequence
from io import BytesIO
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from mos_cli.errors import InputError
from mos_cli.images.outputs import picture_format
from mos_cli.routing.alignment import keyed_words, shared_words
from mos_cli.routing.diff import compare
from mos_cli.routing.prompt_weights import branch_weights, token_weights
from mos_cli.routing.trace import Recording, Routes, Trace, TraceBranch, TraceToken
from mos_cli.routing.views.difference import headline
from mos_cli.utils.pages import fill_page

PARTS = Path(__file__).with_name("report")
SCRIPTS = ("routes.js", "charts.js", "page.js", "pictures.js", "story.js", "grid.js", "keys.js")


def html_report(first: Recording, second: Recording | None = None) -> str:
    """The page with all pictures and numbers; its content security policy forbids loading anything.

    With `second`, both are shown side by side, with the choices in which they differ.

    Raises:
        InputError: a recording holds a summary only, or the two cannot be compared.
    """
    recordings = [first] if second is None else [first, second]
    return fill_page(PARTS, SCRIPTS, report_data(recordings))


def report_data(recordings: Sequence[Recording]) -> dict[str, Any]:
    """The data of the page for one or two recordings, as plain values; arrays are packed by `pack`.

    `rows` has the words of a branch by its name: `texts` are the spellings of a word in each of the recordings, and
    `tokens` its tokens, None where it is not in the prompt. Words of two prompts are aligned as in `compare`, and have
    the tokens that both prompts have.

    Raises:
        InputError: a recording holds a summary only, or the two cannot be compared.
    """
    decisions = [_decisions(recording) for recording in recordings]
    traces = [recording.trace for recording in recordings]
    agreement = None
    if len(recordings) > 1:
        agreement = headline(compare(traces[0], decisions[0], traces[1], decisions[1]))
    names = dict.fromkeys(name for trace in traces for name in trace.branches)
    rows = {name: _rows([trace.branches.get(name) for trace in traces]) for name in names}
    return {
        "rows": rows,
        "agreement": agreement,
        "traces": [
            _trace(
                recording,
                routes,
                {name: [row["tokens"][index] for row in rows[name]] for name in recording.trace.branches},
            )
            for index, (recording, routes) in enumerate(zip(recordings, decisions, strict=True))
        ],
    }


def pack(array: np.ndarray) -> str:
    """An array of bytes, compressed by zlib, in base64."""
    assert array.dtype == np.uint8
    return base64.b64encode(zlib.compress(np.ascontiguousarray(array).tobytes(), 9)).decode()


def _decisions(recording: Recording) -> dict[str, Routes]:
    if recording.routes is None:
        raise InputError(f"{recording.path} holds a summary only: draw with --trace topk to record every decision")
    return recording.routes


def _trace(
    recording: Recording, routes: dict[str, Routes], rows: dict[str, list[Sequence[int] | None]]
) -> dict[str, Any]:
    trace = recording.trace
    fields = {"prompt", "model", "seed", "steps", "cfg", "cfg_interval", "width", "height", "precision"}
    return {
        "recipe": trace.recipe.model_dump(include=fields),
        "edit": trace.recipe.edit is not None,
        "rules": trace.recipe.routes or (),
        "feature_cache": trace.recipe.feature_cache,
        "adapter": None if trace.adapter is None else trace.adapter.line,
        "layers": trace.layers,
        "blocks": trace.blocks,
        "times": trace.times,
        "branches": {name: _branch(trace, name, routes[name], rows[name]) for name in trace.branches},
        "picture": None if recording.picture is None else _picture(recording.picture),
        "previews": None if recording.previews is None else _sprite(recording.previews),
    }


def _branch(trace: Trace, name: str, routes: Routes, rows: list[Sequence[int] | None]) -> dict[str, Any]:
    branch = trace.branches[name]
    # Steps are the last axis: neighbouring ones are similar, which compresses well.
    ids_JTKS, weights_JTKS = (array.transpose(1, 2, 3, 0) for array in (routes.ids_SJTK, routes.weights_SJTK))
    return {
        "prompt": branch.prompt,
        "steps": branch.steps,
        "tokens": [_name(token) for token in branch.tokens],
        "kept": routes.ids_SJTK.shape[3],
        "ids": pack(ids_JTKS),
        "weights": pack(_bytes(weights_JTKS.astype(np.float32))),
        "regions": None if trace.regions is None else _regions(trace, routes, rows),
        "scales": token_weights(branch_weights(trace.recipe, name), branch.tokens),
        "steered": [done.model_dump() for done in branch.steered or ()],
        "changed": branch.changed,
    }


def _picture(path: Path) -> str:
    return _uri(picture_format(path).lower(), path.read_bytes())


def _name(token: TraceToken) -> str:
    return token.text if token.patch is None else "row {1}, column {2}".format(*token.patch)


def _regions(trace: Trace, routes: Routes, rows: list[Sequence[int] | None]) -> dict[str, Any]:
    """Attention of every patch to every row's word, [W, N], each row relative to its largest value (`peaks`)."""
    assert trace.regions is not None
    assert routes.regions_JTN is not None
    regions_TN = routes.regions_JTN.mean(axis=0, dtype=np.float32)
    words_WN = np.stack([regions_TN[list(tokens or ())].sum(axis=0) for tokens in rows])
    peaks_W = words_WN.max(axis=1)
    parts_WN = words_WN / np.maximum(peaks_W, np.finfo(np.float32).tiny)[:, None]
    grid = trace.regions
    return {"rows": grid.rows, "columns": grid.columns, "peaks": peaks_W.tolist(), "parts": pack(_bytes(parts_WN))}


def _rows(branches: Sequence[TraceBranch | None]) -> list[dict[str, Any]]:
    """The words of a branch in all traces: first those of the prompts, then pictures, then special tokens."""
    words = [{} if branch is None else keyed_words(branch) for branch in branches]
    spelled = [{key: key.text for key in keyed} for keyed in words]
    shared = shared_words(words[0], words[1]) if len(words) > 1 else {}
    rows = []
    for side, keyed in enumerate(words):
        for key, pieces in keyed.items():
            if key not in shared:
                tokens: list[tuple[int, ...] | None] = [None] * len(words)
                tokens[side] = tuple(pieces.values())
            elif side == 0:
                tokens = list(zip(*shared[key], strict=True))
            else:
                continue
            texts = [texts.get(key) for texts in spelled]
            rows.append({"text": key.text, "texts": texts, "nth": key.nth, "kind": key.kind, "tokens": tokens})
    return sorted(rows, key=lambda row: ("word", "picture", "special").index(row["kind"]))


def _sprite(path: Path) -> dict[str, Any]:
    """The frames of an animation side by side in one picture, row by row."""
    from PIL import Image, ImageSequence

    try:
        with Image.open(path, formats=["WEBP"]) as animation:
            frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(animation)]
    except (OSError, ValueError, Image.DecompressionBombError):
        raise InputError(f"{path} is damaged: delete it, or draw again with --preview-steps") from None
    width, height = frames[0].size
    columns = ceil(sqrt(len(frames)))
    rows = ceil(len(frames) / columns)
    sheet, file = Image.new("RGB", (columns * width, rows * height)), BytesIO()
    for number, frame in enumerate(frames):
        sheet.paste(frame, (number % columns * width, number // columns * height))
    sheet.save(file, format="WEBP", quality=88)
    return {"sheet": _uri("webp", file.getvalue()), "columns": columns, "rows": rows, "count": len(frames)}


def _bytes(parts: np.ndarray) -> np.ndarray:
    """Values in 0..1 as bytes."""
    return np.rint(255 * parts).clip(0, 255).astype(np.uint8)


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
