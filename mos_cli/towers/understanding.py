"""The understanding tower: a frozen transformers model that hands over the hidden states of all its layers.

Shapes: B batch, T context tokens, M layers (embedding output included), S width of a state.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from tokenizers import Encoding
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from mos_cli.errors import InputError, ModelError


@dataclass(frozen=True)
class Token:
    """A context token and the characters of the prompt it stands for (an empty span for special tokens)."""

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Reading:
    """What the tower understood of a batch of prompts: states_BTMS, mask_BT (True = a real token), and its tokens."""

    states_BTMS: Tensor
    mask_BT: Tensor
    prompts: tuple[str, ...]
    encodings: list[Encoding]

    @cached_property
    def tokens(self) -> tuple[tuple[Token, ...], ...]:
        """The tokens of every prompt, without padding. Made when asked for: training never does."""
        return tuple(
            tuple(
                Token(text, *span) if prompt else Token(text, 0, 0)
                for text, span, real in zip(encoding.tokens, encoding.offsets, encoding.attention_mask, strict=True)
                if real
            )
            for prompt, encoding in zip(self.prompts, self.encodings, strict=True)
        )


class UnderstandingTower:
    """An encoder or decoder that transformers' AutoModel loads, run once per prompt; its layers are a module list.

    The states are the embedding output and the raw output of every layer: for decoders transformers reports the last
    state after the final norm, so the last layer is hooked.

    Args:
        folder: the model in transformers' format, with a fast tokenizer and safetensors weights.

    Raises:
        ModelError: the folder does not hold such a model; one that brings code of its own is not run.
    """

    def __init__(self, folder: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        safely = {"local_files_only": True, "trust_remote_code": False}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, **safely)
            self.model = AutoModel.from_pretrained(folder, dtype=dtype, use_safetensors=True, **safely)
            self._last_layer = _layers(self.model)[-1]
        except (OSError, ValueError, KeyError, StopIteration) as error:
            raise ModelError(f"{folder} is not an understanding tower that can be read: {error}") from None
        self.model.eval().requires_grad_(False).to(device)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        # Decoders without a start token make nothing of an empty prompt; one end token stands for "no words".
        self._no_words = "" if self.tokenizer("")["input_ids"] else self.tokenizer.eos_token

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
    def read(self, prompts: list[str]) -> Reading:
        """Reads a batch of prompts in one pass; padding is masked, so a prompt's states do not depend on the others.

        Raises:
            InputError: a prompt is longer than the tower can read.
        """
        batch = self.tokenizer(
            [prompt or self._no_words for prompt in prompts],
            return_tensors="pt",
            padding=True,
            padding_side="right",
            verbose=False,
        )
        if batch["input_ids"].shape[1] > self.max_tokens:
            raise InputError(
                f"the prompt has {batch['input_ids'].shape[1]} tokens, the model reads {self.max_tokens}: shorten it"
            )
        ids_BT = batch["input_ids"].to(self.model.device)
        mask_BT = batch["attention_mask"].to(self.model.device)
        raw_last: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            raw_last.append(output if isinstance(output, Tensor) else output[0])

        hook = self._last_layer.register_forward_hook(keep)
        try:
            hidden = self.model(input_ids=ids_BT, attention_mask=mask_BT, output_hidden_states=True).hidden_states
        finally:
            hook.remove()
        states_BTMS = torch.stack([*hidden[:-1], raw_last[0]], dim=2)
        return Reading(states_BTMS, mask_BT.bool(), tuple(prompts), batch.encodings)


def _layers(model: nn.Module) -> nn.ModuleList:
    """The stack of transformer layers: the module list as long as the config says the model is deep."""
    depth = model.config.num_hidden_layers  # type: ignore[union-attr]
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
