"""Regions: the attention of patches to words, and the layers that the words were read from.

Shapes: J generation blocks, T context tokens, M understanding layers, N patches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mos_cli.errors import InputError, UsageError
from mos_cli.routing.analysis import Word
from mos_cli.routing.section import Section, layer_use
from mos_cli.routing.trace import RegionGrid, Routes


@dataclass(frozen=True)
class WordMap:
    """The share of each patch's attention to a word, [rows, columns], mean over blocks.

    `layers` are the strongest layers of the word in these blocks, each with its share of the weight.
    """

    word: Word
    attention: np.ndarray
    layers: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class PatchSource:
    """The contribution of a word to a patch.

    attention: the share of the patch's attention that went to the word, mean over blocks.
    of_words: its share of the attention that went to words; None for a special token.
    layer: the strongest layer: by the word's routed weights, each block's multiplied by the patch's attention.
    part: the share of this layer, weighted in the same way.
    """

    word: Word
    attention: float
    of_words: float | None
    layer: int
    part: float


def word_maps(section: Section, words: Sequence[Word], layers: int = 2) -> tuple[WordMap, ...]:
    """One map per word, in order; attention to a word is the sum over its tokens.

    Raises:
        InputError: no regions were recorded.
    """
    grid, routes, regions_JTN = _recorded(section)
    regions_TN = regions_JTN.mean(axis=0, dtype=np.float32)
    maps = []
    for word in words:
        attention = regions_TN[list(word.tokens)].sum(axis=0).reshape(grid.rows, grid.columns)
        use_M = layer_use(routes, word.tokens, len(section.layers))
        strongest = tuple((int(layer), float(use_M[layer])) for layer in (-use_M).argsort(kind="stable")[:layers])
        maps.append(WordMap(word, attention, tuple((layer, share) for layer, share in strongest if share > 0)))
    return tuple(maps)


def patch_origins(section: Section, patch: tuple[int, int]) -> tuple[PatchSource, ...]:
    """The contributions of words to the patch at (row, column), in descending order; then those of special tokens.

    Raises:
        InputError: no regions were recorded.
        UsageError: there is no such patch.
    """
    grid, routes, regions_JTN = _recorded(section)
    row, column = patch
    if not (row < grid.rows and column < grid.columns):
        raise UsageError(
            f"--patch {row},{column} is out of range: there are rows 0 to {grid.rows - 1} and columns 0 to "
            f"{grid.columns - 1}"
        )
    attention_JT = regions_JTN[:, :, row * grid.columns + column].astype(np.float64)
    use_JTM = _use_by_token(routes, len(section.layers))
    worded = sum(float(attention_JT[:, word.tokens].sum()) for word in section.words if not word.special)
    origins = []
    for word in section.words:
        tokens = list(word.tokens)
        total = float(attention_JT[:, tokens].sum())
        through_M = np.einsum("jt,jtm->m", attention_JT[:, tokens], use_JTM[:, tokens])
        layer = int(through_M.argmax())
        origins.append(
            PatchSource(
                word,
                attention=total / len(attention_JT),
                of_words=None if word.special else total / worded if worded else 0.0,
                layer=layer,
                part=float(through_M[layer] / total) if total else 0.0,
            )
        )
    return tuple(sorted(origins, key=lambda origin: (origin.word.special, -origin.attention)))


def _recorded(section: Section) -> tuple[RegionGrid, Routes, np.ndarray]:
    grid, routes = section.recording.trace.regions, section.routes
    if grid is None or routes is None or routes.regions_JTN is None:
        raise InputError(f"{section.recording.path} has no regions: draw with --regions to record them")
    return grid, routes, routes.regions_JTN


def _use_by_token(routes: Routes, layers: int) -> np.ndarray:
    """The share of each layer in the weights of each token in each block, over steps, [J, T, M]."""
    _, blocks, tokens, _ = routes.ids_SJTK.shape
    cells = np.arange(blocks * tokens).reshape(1, blocks, tokens, 1) * layers + routes.ids_SJTK
    use_JTM = np.bincount(
        cells.ravel(), routes.weights_SJTK.ravel().astype(np.float64), minlength=blocks * tokens * layers
    ).reshape(blocks, tokens, layers)
    return use_JTM / use_JTM.sum(axis=-1, keepdims=True)


def special_share(section: Section) -> tuple[float, tuple[str, ...]]:
    """The share of special tokens in the attention of all patches to the prompt, and their names.

    Raises:
        InputError: no regions were recorded.
    """
    _, _, regions_JTN = _recorded(section)
    per_token_T = regions_JTN.sum(axis=(0, 2), dtype=np.float64)
    special = [word for word in section.words if word.special]
    tokens = [token for word in special for token in word.tokens]
    return float(per_token_T[tokens].sum() / per_token_T.sum()), tuple(word.text for word in special)
