"""Understanding towers that see: vision-language models, whose vision part is loaded when the first picture is shown.

A picture becomes tokens of the language model: what entered its first layer, state 0, is the projected output of the
vision part, and every later state is the language model's, as a word's. The form is plain, without a chat template: the
pictures first, each between the marks its model knows, then the words, which so are understood in sight of them.

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
    AutoImageProcessor,
    AutoModel,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.utils.import_utils import is_timm_available

from mos_cli.errors import InputError, ModelError
from mos_cli.quantization.method import Method
from mos_cli.towers.autoencoder import to_image
from mos_cli.towers.bank import Grid
from mos_cli.towers.understanding import SAFELY, HiddenStates, ImageInput, ImageSpan, UnderstandingTower

LANGUAGE = {r"^(model\.)?language_model\.(model\.)?": ""}
"""From the names of the language part's weights in a checkpoint to those it has on its own."""


MARKS = {"qwen3_vl": ("<|vision_start|>", "<|vision_end|>"), "internvl": ("<img>", "</img>"), "perception_lm": ("", "")}
"""The models that are known, and what each has in front of and behind a picture."""
ONE_TILE = {"crop_to_patches": False}
"""InternVL can also cut a wide picture into squares, seen one by one. Here every picture is one grid of tokens."""


def load_understanding(
    folder: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu", quant: Method | None = None
) -> UnderstandingTower:
    """The understanding tower in a folder, one that sees if its model does.

    Raises:
        ModelError: the folder holds no model that can be read, or one that sees in a way that is not known here.
    """
    try:
        config = AutoConfig.from_pretrained(folder, **SAFELY)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder} is not an understanding tower that can be read: {error}") from None
    if config.model_type in MARKS:
        return VisionLanguageTower(folder, dtype=dtype, device=device, quant=quant)
    if hasattr(config, "vision_config"):
        known = ", ".join(MARKS)
        raise ModelError(f"{folder} holds a {config.model_type}: of models that see, only {known} can be read")
    return UnderstandingTower(folder, dtype=dtype, device=device, quant=quant)


class VisionLanguageTower(UnderstandingTower):
    """The language part of a vision-language model; its vision part joins it when the first picture is shown."""

    def _load(self, dtype: torch.dtype) -> PreTrainedModel:
        self.config = AutoConfig.from_pretrained(self.folder, **SAFELY)
        return _loaded(AutoModel, self.folder, self.config.text_config, dtype, key_mapping=LANGUAGE, **self._placed)

    @property
    def vision_loaded(self) -> bool:
        return "_whole" in vars(self)

    @torch.no_grad()
    def encode(self, prompts: list[str], pictures: Sequence[Sequence[ImageInput]] = ()) -> HiddenStates:
        """Reads prompts, each in sight of its pictures, in one pass; a prompt's states do not depend on the others.

        Args:
            pictures: those shown with each prompt, in their order.

        Raises:
            InputError: a prompt is too long with its pictures, or holds the name of their tokens, or a picture has a
                shape that the model does not take.
            ModelError: the vision part cannot be loaded.
        """
        if not any(pictures):
            return super().encode(prompts)
        seen, grids = self._look([_pillow(picture) for picture in chain.from_iterable(pictures)])
        remaining = iter(grids)
        shown = [[next(remaining) for _ in of_prompt] for of_prompt in pictures]
        leads = [self._lead(grids) for grids in shown]
        batch = self._tokenized(leads, prompts)
        ids_BT, mask_BT = (batch[name].to(self.model.device) for name in ("input_ids", "attention_mask"))
        is_image_BT = ids_BT == self.config.image_token_id
        image_spans = tuple(self._sights(*each) for each in zip(is_image_BT, shown, strict=True))
        if "image_grid_thw" in seen:
            seen["mm_token_type_ids"] = is_image_BT.int()
        states_BTMS = self._states(lambda: self._whole(input_ids=ids_BT, attention_mask=mask_BT, **seen))
        lengths = tuple(len(lead) for lead in leads)
        return HiddenStates(states_BTMS, mask_BT.bool(), tuple(prompts), batch.encodings, lengths, image_spans)  # type: ignore[arg-type]

    def _look(self, pictures: list[Image.Image]) -> tuple[dict[str, Any], list[Grid]]:
        """What the vision part makes of pictures, as the whole model takes it in, and the grid of each."""
        processor = self._processor
        try:
            processed = processor(images=pictures, return_tensors="pt").to(self.model.device)
        except ValueError as error:
            raise InputError(f"a picture cannot be shown to the understanding tower: {error}") from None
        pixels = processed["pixel_values"]
        if "image_grid_thw" not in processed:
            tiled = pixels[:, None] if self.config.model_type == "perception_lm" else pixels
            features = self._whole.get_image_features(tiled)
            side = isqrt(features.pooler_output.shape[1])
            return {"mm_encoder_outputs": {"image": features}}, [(side, side)] * len(pictures)
        cells_V3 = processed["image_grid_thw"]
        features = self._whole.get_image_features(pixels, cells_V3)
        merged = self.config.vision_config.spatial_merge_size
        grids = [(rows // merged, columns // merged) for _, rows, columns in cells_V3.tolist()]
        return {"mm_encoder_outputs": {"image": features}, "image_grid_thw": cells_V3}, grids

    def _lead(self, grids: list[Grid]) -> str:
        """What stands in front of a prompt for the pictures shown with it."""
        opening, closing = MARKS[self.config.model_type]
        image = self.tokenizer.convert_ids_to_tokens(self.config.image_token_id)
        return "".join(opening + image * (rows * columns) + closing for rows, columns in grids)

    def _sights(self, is_image_T: Tensor, grids: list[Grid]) -> tuple[ImageSpan, ...]:
        """Where the pictures of a prompt are among its tokens."""
        sizes = [rows * columns for rows, columns in grids]
        places = is_image_T.nonzero().flatten().tolist()
        if len(places) != sum(sizes):
            name = self.tokenizer.convert_ids_to_tokens(self.config.image_token_id)
            raise InputError(f"the prompt holds {name}, which stands for a picture: leave it out")
        return tuple(ImageSpan(places[sum(sizes[:number])], *grid) for number, grid in enumerate(grids))

    @cached_property
    def _whole(self) -> Any:
        """The whole model: its vision part is loaded, its language part is the one that is there."""
        vision = self.config.vision_config.model_type
        if vision == "timm_wrapper" and not is_timm_available():
            raise ModelError(f"{self.folder} sees through timm, which is not installed: pip install timm")
        kind: Any = MODEL_MAPPING[type(self.config)]

        class Seeing(kind):
            # Made without memory, as from_pretrained makes a model, and dropped before weights are looked for.
            def __init__(self, config: PreTrainedConfig) -> None:
                super().__init__(config)
                self.language_model = None

        try:
            whole = _loaded(Seeing, self.folder, self.config, self.model.dtype)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise ModelError(f"the vision part of {self.folder} cannot be loaded: {error}") from None
        whole.eval().requires_grad_(False).to(self.model.device)
        whole.language_model = self.model
        return whole

    @cached_property
    def _processor(self) -> BaseImageProcessor:
        """Scales and cuts pictures as the model was trained to see them, with Pillow."""
        try:
            return self._load_processor()
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{self.folder} does not say how pictures are prepared for it: {error}") from None

    def _load_processor(self) -> BaseImageProcessor:
        if self.config.model_type != "perception_lm":
            return AutoImageProcessor.from_pretrained(self.folder, backend="pil", **ONE_TILE, **SAFELY)
        # transformers has this one for torchvision alone. Of a picture in one tile it does what this does.
        settings = json.loads((self.folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        side = settings["tile_size"]
        kept = {name: settings[name] for name in ("image_mean", "image_std", "resample")}
        return GotOcr2ImageProcessorPil(size={"height": side, "width": side}, **kept)


def _loaded(kind: Any, folder: Path, config: PreTrainedConfig, dtype: torch.dtype, **how: Any) -> Any:
    """A part of a checkpoint as a model of its own; raises ValueError if weights of it are not there."""
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
