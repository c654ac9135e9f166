"""Understanding towers with vision: vision-language models, whose vision part is loaded with the first picture.

A picture becomes tokens of the language model. State 0 of an image token is the projected output of the vision part;
the later states are the language model's, as for words. No chat template is used: the pictures come first, each between
the markers of its model, then the words, whose states so depend on the pictures.

Shapes: B batch, T context tokens, M layers (embedding output included), S width of a state, V pictures.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)

# The package's own name is a placeholder without torchvision, before 5.20.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.utils.import_utils import is_timm_available

from mos_cli.errors import InputError, ModelError
from mos_cli.quantization.method import Method
from mos_cli.towers.autoencoder import to_image
from mos_cli.towers.bank import Grid
from mos_cli.towers.tokens import SAFELY, ImageSpan
from mos_cli.towers.understanding import HiddenStates, ImageInput, UnderstandingTower

LANGUAGE = {r"^(model\.)?language_model\.(model\.)?": ""}
"""Names of the language part's weights in a checkpoint, and what replaces them where it is loaded alone."""


IMAGE_MARKERS = {
    "qwen3_vl": ("<|vision_start|>", "<|vision_end|>"),
    "internvl": ("<img>", "</img>"),
    "perception_lm": ("", ""),
}
"""The supported models, with the text that each expects before and after a picture."""
ONE_TILE = {"crop_to_patches": False}
"""InternVL can also cut a wide picture into squares. Here every picture is one grid of tokens."""


def load_understanding(
    folder: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu", quant: Method | None = None
) -> UnderstandingTower:
    """Loads the understanding tower in a folder, with vision if its model has it.

    Raises:
        ModelError: the folder holds no model that can be loaded, or a vision-language model that is not supported.
    """
    try:
        config = AutoConfig.from_pretrained(folder, **SAFELY)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder} is not an understanding tower that can be read: {error}") from None
    if config.model_type in IMAGE_MARKERS:
        return VisionLanguageTower(folder, dtype=dtype, device=device, quant=quant)
    if hasattr(config, "vision_config"):
        known = ", ".join(IMAGE_MARKERS)
        raise ModelError(f"{folder} holds a {config.model_type}: of vision-language models, only {known} are supported")
    return UnderstandingTower(folder, dtype=dtype, device=device, quant=quant)


class VisionLanguageTower(UnderstandingTower):
    """The language part of a vision-language model; its vision part is loaded with the first picture."""

    def _load(self, dtype: torch.dtype) -> PreTrainedModel:
        self.config = AutoConfig.from_pretrained(self.folder, **SAFELY)
        return _loaded(
            AutoModel, self.folder, self.config.text_config, dtype, key_mapping=LANGUAGE, **self._load_options
        )

    @property
    def vision_loaded(self) -> bool:
        return "_full_model" in vars(self)

    @torch.no_grad()
    def encode(self, prompts: list[str], pictures: Sequence[Sequence[ImageInput]] = ()) -> HiddenStates:
        """Encodes prompts with their pictures in one pass; the states of a prompt do not depend on the others.

        Args:
            pictures: those of each prompt, in order.

        Raises:
            InputError: a prompt with its pictures is too long, it contains the name of an image token, or the model
                does not support the shape of a picture.
            ModelError: the vision part cannot be loaded.
        """
        if not any(pictures):
            return super().encode(prompts)
        features, grids = self._image_features([_pillow(picture) for picture in chain.from_iterable(pictures)])
        remaining = iter(grids)
        grids_of = [[next(remaining) for _ in of_prompt] for of_prompt in pictures]
        prefixes = [self._prefix(grids) for grids in grids_of]
        batch = self.prompt_tokenizer(prefixes, prompts)
        ids_BT, mask_BT = (batch[name].to(self.model.device) for name in ("input_ids", "attention_mask"))
        is_image_BT = ids_BT == self.config.image_token_id
        image_spans = tuple(self._image_spans(*row) for row in zip(is_image_BT, grids_of, strict=True))
        if "image_grid_thw" in features:
            features["mm_token_type_ids"] = is_image_BT.int()
        states_BTMS = self._states(lambda: self._full_model(input_ids=ids_BT, attention_mask=mask_BT, **features))
        lengths = tuple(len(prefix) for prefix in prefixes)
        return HiddenStates(states_BTMS, mask_BT.bool(), tuple(prompts), batch.encodings, lengths, image_spans)  # type: ignore[arg-type]

    def _image_features(self, pictures: list[Image.Image]) -> tuple[dict[str, Any], list[Grid]]:
        """The output of the vision part as arguments of the full model, and the grid of each picture."""
        processor = self._processor
        try:
            processed = processor(images=pictures, return_tensors="pt").to(self.model.device)
        except ValueError as error:
            raise InputError(f"the understanding tower cannot take a picture: {error}") from None
        pixels = processed["pixel_values"]
        if "image_grid_thw" not in processed:
            tiled = pixels[:, None] if self.config.model_type == "perception_lm" else pixels
            features = self._full_model.get_image_features(tiled)
            side = isqrt(features.pooler_output.shape[1])
            return {"mm_encoder_outputs": {"image": features}}, [(side, side)] * len(pictures)
        cells_V3 = processed["image_grid_thw"]
        features = self._full_model.get_image_features(pixels, cells_V3)
        merged = self.config.vision_config.spatial_merge_size
        grids = [(rows // merged, columns // merged) for _, rows, columns in cells_V3.tolist()]
        return {"mm_encoder_outputs": {"image": features}, "image_grid_thw": cells_V3}, grids

    def _prefix(self, grids: list[Grid]) -> str:
        """The text before a prompt that stands for its pictures."""
        opening, closing = IMAGE_MARKERS[self.config.model_type]
        image = self.tokenizer.convert_ids_to_tokens(self.config.image_token_id)
        return "".join(opening + image * (rows * columns) + closing for rows, columns in grids)

    def _image_spans(self, is_image_T: Tensor, grids: list[Grid]) -> tuple[ImageSpan, ...]:
        """The positions of the pictures of a prompt among its tokens."""
        sizes = [rows * columns for rows, columns in grids]
        numbers = is_image_T.nonzero().flatten().tolist()
        if len(numbers) != sum(sizes):
            name = self.tokenizer.convert_ids_to_tokens(self.config.image_token_id)
            raise InputError(f"the prompt contains {name}, the token of a picture: leave it out")
        return tuple(ImageSpan(numbers[sum(sizes[:number])], *grid) for number, grid in enumerate(grids))

    @cached_property
    def _full_model(self) -> Any:
        """The full model: the vision part is loaded, the language part is the one loaded before."""
        vision = self.config.vision_config.model_type
        if vision == "timm_wrapper" and not is_timm_available():
            raise ModelError(f"{self.folder} needs timm for its vision part, which is not installed: pip install timm")
        kind: Any = MODEL_MAPPING[type(self.config)]

        class WithoutLanguage(kind):
            # The language part is created on the meta device and removed before weights are loaded.
            def __init__(self, config: PreTrainedConfig) -> None:
                super().__init__(config)
                self.language_model = None

        try:
            full = _loaded(WithoutLanguage, self.folder, self.config, self.model.dtype)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise ModelError(f"the vision part of {self.folder} cannot be loaded: {error}") from None
        full.eval().requires_grad_(False).to(self.model.device)
        full.language_model = self.model
        return full

    @cached_property
    def _processor(self) -> BaseImageProcessor:
        """Scales and normalises pictures as in the training of the model, with Pillow."""
        try:
            return self._load_processor()
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{self.folder} has no usable image processor: {error}") from None

    def _load_processor(self) -> BaseImageProcessor:
        if self.config.model_type != "perception_lm":
            return AutoImageProcessor.from_pretrained(self.folder, backend="pil", **ONE_TILE, **SAFELY)
        # transformers' own needs torchvision. For a picture in one tile this one is equivalent.
        settings = json.loads((self.folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        side = settings["tile_size"]
        kept = {name: settings[name] for name in ("image_mean", "image_std", "resample")}
        return GotOcr2ImageProcessorPil(size={"height": side, "width": side}, **kept)


def _loaded(kind: Any, folder: Path, config: PreTrainedConfig, dtype: torch.dtype, **how: Any) -> Any:
    """Loads a part of a checkpoint as a model; raises ValueError if weights are missing."""
    model, found = kind.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        **how,
        output_loading_info=True,
        **SAFELY,
    )
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{len(missing)} weights are missing, {missing[0]} among them")
    return model


def _pillow(picture: ImageInput) -> Image.Image:
    return picture if isinstance(picture, Image.Image) else to_image(picture[None])
