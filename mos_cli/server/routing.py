"""What the page and the report show of the routes of a picture.

Shapes: S steps, J generation blocks, T context tokens, K kept layers, M understanding layers.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mos_cli.errors import InputError
from mos_cli.images.companions import companions
from mos_cli.routing.analysis import split_words
from mos_cli.routing.trace import Recording, Trace, load_recording, read_routes
from mos_cli.routing.views.html import html_report
from mos_cli.sampling.guidance import POSITIVE
from mos_cli.server.drawing import Result


def routing(result: Result) -> dict[str, Any]:
    """The layers that every word of the prompt reads, for each block: shares of the weight, mean over steps and tokens.

    `shares` of a word is [J, M]; special tokens are left out, and the pictures of an edit are words.

    Raises:
        InputError: the picture was drawn without a trace of every decision.
    """
    beside = companions(Path(next(iter(result.files))))
    head, arrays = result.files.get(beside.head.name), result.files.get(beside.arrays.name)
    if head is None or arrays is None:
        raise InputError("the picture was drawn without its routes: draw it with trace topk")
    trace = Trace.model_validate_json(head)
    routes = read_routes(trace, arrays, beside.arrays.name, beside.head.name)[POSITIVE]
    branch = trace.branches[POSITIVE]
    shares_JTM = np.zeros((*routes.ids_SJTK.shape[1:3], len(trace.layers)))
    layers_MM = np.eye(len(trace.layers))
    for ids_JTK, weights_JTK in zip(routes.ids_SJTK, routes.weights_SJTK, strict=True):
        shares_JTM += (layers_MM[ids_JTK] * weights_JTK[..., None]).sum(axis=2)
    shares_JTM /= shares_JTM.sum(axis=-1, keepdims=True)
    words = []
    for word in split_words(branch.prompt, branch.tokens):
        if not word.special:
            shares_JM = shares_JTM[:, list(word.tokens)].mean(axis=1)
            picture = branch.tokens[word.tokens[0]].patch is not None
            words.append({"text": word.text, "picture": picture, "shares": shares_JM.round(3).tolist()})
    return {
        "layers": list(trace.layers),
        "blocks": trace.blocks,
        "words": words,
        "rules": list(trace.recipe.routes or ()),
    }


def report(results: Sequence[Result]) -> str:
    """The page of `mos inspect-routing --html` for one picture or two.

    Raises:
        InputError: one was drawn without a trace of every decision.
    """
    with tempfile.TemporaryDirectory() as folder:
        return html_report(*(_recording(result, Path(folder) / str(number)) for number, result in enumerate(results)))


def _recording(result: Result, folder: Path) -> Recording:
    folder.mkdir()
    for name, data in result.files.items():
        (folder / name).write_bytes(data)
    return load_recording(folder / next(iter(result.files)))
