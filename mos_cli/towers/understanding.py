"""The understanding tower: a frozen transformers model that hands over the hidden states of all its layers.

Shapes: B batch, T context tokens, M layers (embedding output included), S width of a state.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Encoding
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, BatchEncoding, PreTrainedModel

from mos_cli.errors import InputError, ModelError
from mos_cli.quantization.method import Method
from mos_cli.towers.quantized import understanding_config

SAFELY = {"local_files_only": True, "trust_remote_code": False}
ImageInput = Image.Image | Tensor
"""A picture to be shown: of Pillow, or [3, H, W] in -1..1."""


@dataclass(frozen=True)
class Token:
    """A context token and the characters of the prompt it stands for (an empty span for special tokens).

    An image token stands for a cell of a picture instead: `patch` is (picture, row, column), all counted from 0.
    """

    text: str
    start: int
    end: int
    patch: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class ImageSpan:
    """A picture as the tower sees it: a grid of image tokens, row by row, from token `first` of its prompt on."""

    first: int
    rows: int
    columns: int


@dataclass(frozen=True)
class HiddenStates:
    """The hidden states of a batch of prompts, with mask_BT (True = a real token) and the tokens.

    The text that was encoded is `leads` characters, which stand for the images shown with the prompt, and then the
    prompt; `image_spans` says where the image tokens are.
    """

    states_BTMS: Tensor
    mask_BT: Tensor
    prompts: tuple[str, ...]
    encodings: list[Encoding]
    leads: tuple[int, ...]
    image_spans: tuple[tuple[ImageSpan, ...], ...]

    @cached_property
    def tokens(self) -> tuple[tuple[Token, ...], ...]:
        """The tokens of every prompt, without padding. Made when asked for: training never does."""
        every = zip(self.prompts, self.encodings, self.leads, self.image_spans, strict=True)
        return tuple(tuple(_tokens(*each)) for each in every)


def _tokens(prompt: str, encoding: Encoding, lead: int, image_spans: tuple[ImageSpan, ...]) -> list[Token]:
    real = sum(encoding.attention_mask)
    tokens = [
        Token(text, start - lead, end - lead) if prompt and start >= lead else Token(text, 0, 0)
        for text, (start, end) in zip(encoding.tokens[:real], encoding.offsets[:real], strict=True)
    ]
    for picture, sight in enumerate(image_spans):
        for cell in range(sight.rows * sight.columns):
            index = sight.first + cell
            tokens[index] = Token(tokens[index].text, 0, 0, (picture, *divmod(cell, sight.columns)))
    return tokens


class UnderstandingTower:
    """An encoder or decoder that transformers' AutoModel loads, run once per prompt; its layers are a module list.

    The states are what enters each layer, the embedding output first, and what leaves the last: before the final norm
    of a decoder, which transformers would report in its place.

    Args:
        folder: the model in transformers' format, with a fast tokenizer and safetensors weights.
        quant: how its weights are quantised while they are loaded.

    Raises:
        ModelError: the folder does not hold such a model; one that brings code of its own is not run.
    """

    def __init__(
        self, folder: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu", quant: Method | None = None
    ) -> None:
        self.folder = folder
        # Quantised layers are made on the device, and cannot be moved to it.
        self._placed = (
            {}
            if quant is None
            else {
                "quantization_config": understanding_config(folder, quant),
                "device_map": {"": device},
            }
        )
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, **SAFELY)
            self.model = self._load(dtype)
            self._layers = _layers(self.model)
        except (OSError, ValueError, KeyError, StopIteration) as error:
            raise ModelError(f"{folder} is not an understanding tower that can be read: {error}") from None
        self.model.eval().requires_grad_(False)
        if quant is None:
            self.model.to(device)  # type: ignore[arg-type]
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        # Decoders without a start token make nothing of an empty prompt; one end token stands for "no words".
        self._no_words = "" if self.tokenizer("")["input_ids"] else self.tokenizer.eos_token

    def _load(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model whose layers are read."""
        return AutoModel.from_pretrained(self.folder, dtype=dtype, use_safetensors=True, **self._placed, **SAFELY)

    @property
    def layers(self) -> int:
        """Number of states per token, M."""
        return self.model.config.num_hidden_layers + 1

    @property
    def width(self) -> int:
        """Width of a state, S."""
        return self.model.config.hidden_size

    @property
    def max_tokens(self) -> int:
        return min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)

    @torch.no_grad()
    def encode(self, prompts: list[str], pictures: Sequence[Sequence[ImageInput]] = ()) -> HiddenStates:
        """Reads a batch of prompts in one pass; padding is masked, so a prompt's states do not depend on the others.

        Args:
            pictures: those shown with each prompt, for a tower that sees.

        Raises:
            InputError: a prompt is longer than the tower can read, or it cannot be shown a picture.
        """
        if any(pictures):
            raise InputError("the understanding tower reads words alone: it cannot be shown a picture")
        batch = self._tokenized([""] * len(prompts), prompts)
        ids_BT, mask_BT = (batch[name].to(self.model.device) for name in ("input_ids", "attention_mask"))
        states_BTMS = self._states(lambda: self.model(input_ids=ids_BT, attention_mask=mask_BT))
        unseen = tuple(() for _ in prompts)
        return HiddenStates(states_BTMS, mask_BT.bool(), tuple(prompts), batch.encodings, (0,) * len(prompts), unseen)  # type: ignore[arg-type]

    def _tokenized(self, leads: list[str], prompts: list[str]) -> BatchEncoding:
        """Each prompt behind what leads it, padded at its end."""
        batch = self.tokenizer(
            [lead + (prompt or self._no_words) for lead, prompt in zip(leads, prompts, strict=True)],
            return_tensors="pt",
            padding=True,
            padding_side="right",
            verbose=False,
        )
        if (tokens := batch["input_ids"].shape[1]) > self.max_tokens:
            pictures = ", its pictures included" if any(leads) else ""
            raise InputError(
                f"the prompt has {tokens} tokens{pictures}, the model reads {self.max_tokens}: shorten it"
                + (", or show fewer or smaller pictures" if pictures else "")
            )
        return batch

    def _states(self, run: Callable[[], object]) -> Tensor:
        """What enters each layer while `run` runs the model, and what leaves the last: [B, T, M, S]."""
        states: list[Tensor] = []

        def enter(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            states.append(inputs[0])

        def leave(_layer: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            states.append(output if isinstance(output, Tensor) else output[0])

        hooks = [layer.register_forward_pre_hook(enter) for layer in self._layers]
        hooks.append(self._layers[-1].register_forward_hook(leave))
        try:
            run()
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(states, dim=2)


def _layers(model: nn.Module) -> nn.ModuleList:
    """The stack of transformer layers: the module list as long as the config says the model is deep."""
    depth = model.config.num_hidden_layers  # type: ignore[union-attr]
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
