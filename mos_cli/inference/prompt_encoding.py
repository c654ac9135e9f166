"""Encoding prompts, with or without pictures: from text to a state bank and tokens.

Shapes: T context tokens, M layers, S width of a state, Z widest state of an image token, V image tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from mos_cli.bundles.shapes import IMAGE_GRID
from mos_cli.config.recipe import Recipe
from mos_cli.errors import ModelError
from mos_cli.routing.prompt_weights import branch_weights, check_weights, token_weights
from mos_cli.routing.trace import TraceToken
from mos_cli.towers.bank import StateBank
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.image_encoder import ImageEncoder
from mos_cli.towers.tokens import Token
from mos_cli.towers.understanding import HiddenStates, UnderstandingTower
from mos_cli.towers.vision_language import VisionLanguageTower


@dataclass(frozen=True)
class PromptEncoding:
    """A prompt, its state bank and its tokens, those of words before image tokens."""

    prompt: str
    bank: StateBank
    tokens: tuple[TraceToken, ...]


class PromptEncoder:
    """Encodes prompts and pictures with the towers of a model.

    Args:
        name: the model's, for errors.
        encode: replaces `understanding.encode`, with the same result; for offloading.

    Raises:
        ModelError: the networks do not fit together.
    """

    def __init__(
        self,
        understanding: UnderstandingTower,
        image_encoder: ImageEncoder | None,
        tower: GenerationTower,
        name: str,
        *,
        encode: Callable[..., HiddenStates] | None = None,
    ) -> None:
        self.image_encoder, self.tower, self._states_of = image_encoder, tower, encode or understanding.encode
        self.max_tokens = understanding.max_tokens
        shape = (understanding.layers, understanding.width)
        if shape != tower.states_shape:
            raise ModelError(
                f"{name} expects {tower.states_shape} layers and values of a state, its understanding tower has {shape}"
            )
        if tower.image_state_widths != (() if image_encoder is None else image_encoder.widths):
            raise ModelError(f"the image encoder of {name} does not fit its generation tower")
        if tower.has_vision and not isinstance(understanding, VisionLanguageTower):
            raise ModelError(f"{name} needs an understanding tower with vision")
        # A picture needs two prompts; the negative one is often that of the next picture, too.
        self._encodings = lru_cache(maxsize=4)(self._encode)

    def encode(self, prompt: str) -> PromptEncoding:
        """Encodes a prompt; the last ones are cached. Raises InputError if it is too long."""
        return self._encodings(prompt, torch.get_num_threads())

    def clear_cache(self) -> None:
        """Empties the cache of encoded prompts."""
        self._encodings.cache_clear()

    def encode_with_images(
        self, encodings: dict[str, PromptEncoding], pictures: Sequence[Tensor], latents: Sequence[Tensor]
    ) -> dict[str, PromptEncoding]:
        """The prompts with pictures, whose image tokens come after the words.

        Args:
            encodings: the prompts without pictures, by guidance branch.
            pictures: each [1, 3, height, width] in -1..1, the edited one first.
            latents: the same pictures, encoded by the autoencoder.
        """
        if self.image_encoder is None:
            return self._encode_with_vision(encodings, pictures, latents)
        cells = [(n, *divmod(cell, IMAGE_GRID)) for n in range(len(pictures)) for cell in range(IMAGE_GRID**2)]
        image_tokens = tuple(_traced(Token("", 0, 0, cell)) for cell in cells)
        with torch.inference_mode():
            references = self.tower.cache_references(latents)
            image_states_BVMZ = torch.cat([self.image_encoder.encode_images(picture) for picture in pictures], dim=1)
            return {
                name: PromptEncoding(
                    encoding.prompt,
                    self.tower.add_image_tokens(encoding.bank, image_states_BVMZ, references),
                    (*encoding.tokens, *image_tokens),
                )
                for name, encoding in encodings.items()
            }

    def _encode(self, prompt: str, _threads: int) -> PromptEncoding:
        """The number of threads is a part of the cache's key, since the rounding of the states depends on it."""
        encoding = self._states_of([prompt])
        with torch.inference_mode():
            return PromptEncoding(
                prompt, self.tower.project_states(encoding.states_BTMS), tuple(map(_traced, encoding.tokens[0]))
            )

    def _encode_with_vision(
        self, encodings: dict[str, PromptEncoding], pictures: Sequence[Tensor], latents: Sequence[Tensor]
    ) -> dict[str, PromptEncoding]:
        """By a tower with vision, in which the states of words depend on the pictures, too."""
        encoded, references = {}, None
        for name, encoding in encodings.items():
            states = self._states_of([encoding.prompt], [[picture[0] for picture in pictures]])
            tokens = states.tokens[0]
            order = _words_first(tokens)
            with torch.inference_mode():
                if references is None:
                    grids = [(span.rows, span.columns) for span in states.image_spans[0]]
                    references = self.tower.cache_references(latents, grids)
                bank = replace(self.tower.project_states(states.states_BTMS[:, order]), references=references)
            encoded[name] = PromptEncoding(encoding.prompt, bank, tuple(_traced(tokens[n]) for n in order))
        return encoded


def weigh(encodings: dict[str, PromptEncoding], recipe: Recipe) -> dict[str, PromptEncoding]:
    """The encodings of the guidance branches, those of prompts with weights scaled by them.

    Raises:
        UsageError: the understanding tower reads no token of weighted words.
    """
    weighed = {}
    for name, encoding in encodings.items():
        if weights := branch_weights(recipe, name):
            check_weights(weights, encoding.prompt, encoding.tokens)
            scale_T = torch.tensor(token_weights(weights, encoding.tokens), device=encoding.bank.bank_BTMD.device)
            encoding = replace(encoding, bank=replace(encoding.bank, scale_BT=scale_T[None]))
        weighed[name] = encoding
    return weighed


def filler(encodings: Mapping[str, PromptEncoding], tokens: Sequence[int]) -> dict[str, PromptEncoding]:
    """Encodings with other numbers of tokens, in the place of those of another picture of a batch.

    A row of a product does not depend on the values of the others, but may on how many there are, and how long.
    """
    filled = {}
    for (name, encoding), count in zip(encodings.items(), tokens, strict=True):
        bank = encoding.bank
        index_T = torch.arange(count, device=bank.bank_BTMD.device) % bank.bank_BTMD.shape[1]
        router_BTR = None if bank.router_BTR is None else bank.router_BTR[:, index_T]
        filled[name] = PromptEncoding(encoding.prompt, StateBank(bank.bank_BTMD[:, index_T], router_BTR), ())
    return filled


def _words_first(tokens: tuple[Token, ...]) -> list[int]:
    """The numbers of the tokens in the order of the bank: words before image tokens."""
    return sorted(range(len(tokens)), key=lambda number: tokens[number].patch is not None)


def _traced(token: Token) -> TraceToken:
    text = token.text if token.patch is None else f"picture {token.patch[0] + 1}"
    return TraceToken(text=text, start=token.start, end=token.end, patch=token.patch)
