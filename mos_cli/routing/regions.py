"""Which patches of the picture read which word, joined with the layers the word was read from.

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
    """The share of its attention that each patch gives to a word, [rows, columns], mean over blocks.

    `layers` are those the word read most in these blocks, the strongest first, each with its share of the weight.
    """

    word: Word
    attention: np.ndarray
    layers: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class PatchSource:
    """What a patch had from a word.

    attention: the share of the patch's attention that went to the word, mean over blocks.
    of_words: its share of the attention that went to words; None for a special token, which is none.
    layer: the layer that brought most of it: the word's routed weights, each block's counted by the patch's attention.
    part: the part of the word's weight that came through this layer, counted in the same way.
    """

    word: Word
    attention: float
    of_words: float | None
    layer: int
    part: float


def word_maps(section: Section, words: Sequence[Word], layers: int = 2) -> tuple[WordMap, ...]:
    """One map a word, in the order given; attention to a word is the sum over its tokens.

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
    """What the patch at (row, column) had from each word, the most first; then what it had from special tokens.

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
    """The share of its weight that each token gave to each layer in each block, over steps, [J, T, M]."""
    _, blocks, tokens, _ = routes.ids_SJTK.shape
    cells = np.arange(blocks * tokens).reshape(1, blocks, tokens, 1) * layers + routes.ids_SJTK
    use_JTM = np.bincount(
        cells.ravel(), routes.weights_SJTK.ravel().astype(np.float64), minlength=blocks * tokens * layers
    ).reshape(blocks, tokens, layers)
    return use_JTM / use_JTM.sum(axis=-1, keepdims=True)


def special_share(section: Section) -> tuple[float, tuple[str, ...]]:
    """The part of all patches' attention to the prompt that special tokens get, and what these are.

    Raises:
        InputError: no regions were recorded.
    """
    _, _, regions_JTN = _recorded(section)
    per_token_T = regions_JTN.sum(axis=(0, 2), dtype=np.float64)
    apart = [word for word in section.words if word.special]
    tokens = [token for word in apart for token in word.tokens]
    return float(per_token_T[tokens].sum() / per_token_T.sum()), tuple(word.text for word in apart)
