"""The understanding tower: a frozen transformers model of which the hidden states of all layers are kept.

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
from transformers import AutoModel, PreTrainedModel

from mos_cli.errors import InputError, ModelError
from mos_cli.quantization.method import Method
from mos_cli.towers.quantized import understanding_config
from mos_cli.towers.tokens import SAFELY, ImageSpan, PromptTokenizer, Token, tokens_of_encoding

ImageInput = Image.Image | Tensor
"""A picture of a prompt: of Pillow, or [3, H, W] in -1..1."""


@dataclass(frozen=True)
class HiddenStates:
    """The hidden states of a batch of prompts, with `mask_BT` (True = a real token) and the tokens.

    The text that was encoded is a prefix of `prefixes` characters, the placeholders of the prompt's pictures, and then
    the prompt. `image_spans` are the positions of the image tokens.
    """

    states_BTMS: Tensor
    mask_BT: Tensor
    prompts: tuple[str, ...]
    encodings: list[Encoding]
    prefixes: tuple[int, ...]
    image_spans: tuple[tuple[ImageSpan, ...], ...]

    @cached_property
    def tokens(self) -> tuple[tuple[Token, ...], ...]:
        """The tokens of every prompt, without padding. Computed on first use; training does not need them."""
        rows = zip(self.prompts, self.encodings, self.prefixes, self.image_spans, strict=True)
        return tuple(tuple(tokens_of_encoding(*row)) for row in rows)


class UnderstandingTower:
    """An encoder or decoder that transformers' AutoModel loads, run once per prompt. Its layers must be a module list.

    The states are the input of each layer, the embedding output first, and the output of the last, before the final
    norm of a decoder.

    Args:
        folder: the model in transformers' format, with a fast tokenizer and safetensors weights.
        quant: the method by which its weights are quantised while they are loaded.

    Raises:
        ModelError: the folder does not hold such a model. Code that comes with a model is never run.
    """

    def __init__(
        self, folder: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu", quant: Method | None = None
    ) -> None:
        self.folder = folder
        # Quantised layers are created on the device and cannot be moved to it.
        self._load_options = (
            {}
            if quant is None
            else {
                "quantization_config": understanding_config(folder, quant),
                "device_map": {"": device},
            }
        )
        self.prompt_tokenizer = PromptTokenizer(folder)
        self.tokenizer = self.prompt_tokenizer.tokenizer
        try:
            self.model = self._load(dtype)
            self._layers = _layers(self.model)
        except (OSError, ValueError, KeyError, StopIteration) as error:
            raise ModelError(f"{folder} is not an understanding tower that can be read: {error}") from None
        self.model.eval().requires_grad_(False)
        if quant is None:
            self.model.to(device)  # type: ignore[arg-type]

    def _load(self, dtype: torch.dtype) -> PreTrainedModel:
        """Loads the model whose states are used."""
        return AutoModel.from_pretrained(self.folder, dtype=dtype, use_safetensors=True, **self._load_options, **SAFELY)

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
        return self.prompt_tokenizer.max_tokens

    @torch.no_grad()
    def encode(self, prompts: list[str], pictures: Sequence[Sequence[ImageInput]] = ()) -> HiddenStates:
        """Encodes a batch of prompts in one pass; padding is masked, so the states of a prompt do not depend on it.

        Args:
            pictures: those of each prompt, for a tower with vision.

        Raises:
            InputError: a prompt is too long, or the tower has no vision and there is a picture.
        """
        if any(pictures):
            raise InputError("the understanding tower has no vision: it takes no pictures")
        batch = self.prompt_tokenizer([""] * len(prompts), prompts)
        ids_BT, mask_BT = (batch[name].to(self.model.device) for name in ("input_ids", "attention_mask"))
        states_BTMS = self.states(ids_BT, mask_BT)
        none = tuple(() for _ in prompts)
        return HiddenStates(states_BTMS, mask_BT.bool(), tuple(prompts), batch.encodings, (0,) * len(prompts), none)  # type: ignore[arg-type]

    @torch.no_grad()
    def states(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """The hidden states [B, T, M, S] of the tokens of `prompt_tokenizer`, on the device of the model."""
        return self._states(lambda: self.model(input_ids=ids_BT, attention_mask=mask_BT))

    def _states(self, run: Callable[[], object]) -> Tensor:
        """The input of each layer while `run` runs the model, and the output of the last: [B, T, M, S]."""
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
    """The transformer layers: the module list with as many modules as the config has layers."""
    depth = model.config.num_hidden_layers  # type: ignore[union-attr]
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
