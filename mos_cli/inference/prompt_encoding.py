"""What is understood of a prompt, alone or in sight of pictures: its state bank and its tokens.

Shapes: T context tokens, M layers, S width of a state, Z widest state of an image token, V image tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from mos_cli.bundles.shapes import IMAGE_GRID
from mos_cli.errors import ModelError
from mos_cli.routing.trace import TraceToken
from mos_cli.towers.bank import StateBank
from mos_cli.towers.generation import GenerationTower
from mos_cli.towers.image_encoder import ImageEncoder
from mos_cli.towers.understanding import HiddenStates, Token, UnderstandingTower
from mos_cli.towers.vision_language import VisionLanguageTower


@dataclass(frozen=True)
class PromptEncoding:
    """A prompt, its state bank and its tokens, image tokens behind those of words."""

    prompt: str
    bank: StateBank
    tokens: tuple[TraceToken, ...]


class PromptEncoder:
    """The understanding tower, its eyes if they are apart, and the part of the generation tower that takes its states.

    Args:
        encode: encodes as the understanding tower does, where something else decides when it does.

    Raises:
        ModelError: they do not fit together.
    """

    def __init__(
        self,
        understanding: UnderstandingTower,
        eyes: ImageEncoder | None,
        tower: GenerationTower,
        name: str,
        *,
        encode: Callable[..., HiddenStates] | None = None,
    ) -> None:
        self.eyes, self.tower, self._states_of = eyes, tower, encode or understanding.encode
        handed = (understanding.layers, understanding.width)
        if handed != tower.states_shape:
            raise ModelError(
                f"{name} expects {tower.states_shape} layers and values of a state, "
                f"its understanding tower hands over {handed}"
            )
        if tower.sight_widths != (() if eyes is None else eyes.widths):
            raise ModelError(f"the eyes of {name} do not fit its generation tower")
        if tower.sees and not isinstance(understanding, VisionLanguageTower):
            raise ModelError(f"{name} needs an understanding tower that sees pictures")
        # The prompts of a batch share the negative; a picture needs two at a time.
        self._encodings = lru_cache(maxsize=4)(self._encode)

    def encode(self, prompt: str) -> PromptEncoding:
        """Reads a prompt, once however many pictures are drawn; raises InputError if it is too long."""
        return self._encodings(prompt, torch.get_num_threads())

    def forget(self) -> None:
        """Lets go of what was read, so that the next prompt is read anew."""
        self._encodings.cache_clear()

    def encode_with_images(
        self, encodings: dict[str, PromptEncoding], pictures: Sequence[Tensor], latents: Sequence[Tensor]
    ) -> dict[str, PromptEncoding]:
        """The prompts in sight of pictures, whose image tokens stand behind the words.

        Args:
            pictures: each [1, 3, height, width] in -1..1, the one that is edited first.
            latents: the same pictures, encoded.
        """
        if self.eyes is None:
            return self._encode_in_sight(encodings, pictures, latents)
        cells = [(n, *divmod(cell, IMAGE_GRID)) for n in range(len(pictures)) for cell in range(IMAGE_GRID**2)]
        seen = tuple(_traced(Token("", 0, 0, cell)) for cell in cells)
        with torch.inference_mode():
            references = self.tower.cache_references(latents)
            sight_BVMZ = torch.cat([self.eyes.encode_images(picture) for picture in pictures], dim=1)
            return {
                name: PromptEncoding(
                    encoding.prompt,
                    self.tower.add_image_tokens(encoding.bank, sight_BVMZ, references),
                    (*encoding.tokens, *seen),
                )
                for name, encoding in encodings.items()
            }

    def _encode(self, prompt: str, _threads: int) -> PromptEncoding:
        """The number of threads, by which the states are rounded, tells readings apart."""
        encoding = self._states_of([prompt])
        with torch.inference_mode():
            return PromptEncoding(
                prompt, self.tower.project_states(encoding.states_BTMS), tuple(map(_traced, encoding.tokens[0]))
            )

    def _encode_in_sight(
        self, encodings: dict[str, PromptEncoding], pictures: Sequence[Tensor], latents: Sequence[Tensor]
    ) -> dict[str, PromptEncoding]:
        """By a tower that sees, which also understands the words in sight of the pictures."""
        seen, references = {}, None
        for name, encoding in encodings.items():
            states = self._states_of([encoding.prompt], [[picture[0] for picture in pictures]])
            tokens = states.tokens[0]
            order = _words_first(tokens)
            with torch.inference_mode():
                if references is None:
                    grids = [(sight.rows, sight.columns) for sight in states.image_spans[0]]
                    references = self.tower.cache_references(latents, grids)
                bank = replace(self.tower.project_states(states.states_BTMS[:, order]), references=references)
            seen[name] = PromptEncoding(encoding.prompt, bank, tuple(_traced(tokens[n]) for n in order))
        return seen


def _words_first(tokens: tuple[Token, ...]) -> list[int]:
    """The numbers of the tokens, those of words before those of pictures, as the bank holds them."""
    return sorted(range(len(tokens)), key=lambda number: tokens[number].patch is not None)


def _traced(token: Token) -> TraceToken:
    text = token.text if token.patch is None else f"picture {token.patch[0] + 1}"
    return TraceToken(text=text, start=token.start, end=token.end, patch=token.patch)
