"""What differs between base models: where their blocks read text, and how their pipelines are called.

Shapes: T text tokens, E width of an embedding, D width of the transformer, N patches, P values of a patch, C channels
of the latent, H x W its size.
"""

import inspect
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from PIL.Image import Image
from torch import Tensor, nn

from mos_cli.bundles.base_models import PipelineClass
from mos_cli.config.recipe import Recipe
from mos_cli.sampling.guidance import NEGATIVE, POSITIVE
from mos_cli.towers.layers import TokenGrid, patchify


@dataclass(frozen=True)
class TextSite:
    """A list of blocks of the transformer, and where their text is.

    Args:
        blocks: the name of the list.
        argument, position: the argument that holds the text, or the whole sequence.
        joint: whether the text is at the head or the tail of that sequence; None: the argument is the text alone.
    """

    blocks: str
    argument: str
    position: int
    joint: Literal["head", "tail"] | None = None


@dataclass(frozen=True)
class Prompts:
    """The embeddings of a picture's prompts as their pipeline made them, and the mask of each where it has one."""

    embeds: Mapping[str, Tensor]
    masks: Mapping[str, Tensor | None]


class BaseModel:
    """The facts of a pipeline of diffusers.

    Attributes:
        sites: the blocks that read text, in their order.
        evolves: whether the blocks change the text that they read.
        rows: the branches of a guided pass in the order of its rows; empty where each branch has a pass of its own,
            the positive one first.
        refines: whether tokens see one another before the first block.
    """

    pipeline: ClassVar[PipelineClass]
    sites: ClassVar[tuple[TextSite, ...]]
    evolves: ClassVar[bool]
    rows: ClassVar[tuple[str, ...]]
    refines: ClassVar[bool] = False

    def encode(self, pipe: Any, prompt: str) -> tuple[Tensor, Tensor | None]:
        """The embedding of a prompt [T, E], by the pipeline's own `encode_prompt`, and its mask [T] or None."""
        raise NotImplementedError

    def first_text(self, transformer: nn.Module, embeds_TE: Tensor) -> Tensor:
        """The text that enters the first block, [T, D]; where nothing is refined, of any of the tokens."""
        raise NotImplementedError

    def time(self, arguments: Mapping[str, Any]) -> float:
        """The time t of a pass (1 = noise) from the transformer's arguments."""
        return float(arguments["timestep"].flatten()[0])

    def patches(self, arguments: Mapping[str, Any], grid: TokenGrid) -> Tensor:
        """The noised patches of a pass, [B, N, P], from the transformer's arguments."""
        return patchify(arguments["hidden_states"], 2)

    def text_start(self, grid: TokenGrid) -> int:
        """The position of the text in the sequence of a block with `joint` "tail"."""
        raise NotImplementedError

    def draw_arguments(self, recipe: Recipe, prompts: Prompts) -> dict[str, Any]:
        """The arguments of the pipeline's call for a picture from a prompt."""
        raise NotImplementedError

    def edit(
        self, pipe: Any, recipe: Recipe, pictures: Sequence[Image], mask: Image | None
    ) -> tuple[Any, dict[str, Any]]:
        """The pipeline of an edit, made of the same networks, and the arguments that it takes beside the others."""
        raise NotImplementedError

    def latents(self, pipe: Any, picture_13HW: Tensor) -> Tensor:
        """The latent of a picture in -1..1, as the transformer is trained on, [1, C, H, W]."""
        encoded = pipe.vae.encode(picture_13HW).latent_dist.mode()
        return (encoded - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor

    def unpack(self, latents: Tensor, grid: TokenGrid) -> Tensor:
        """The latents of the pipeline's loop as [1, C, H, W]."""
        return latents

    def decode(self, pipe: Any, z_1CHW: Tensor) -> Tensor:
        """The picture of a latent in -1..1, [1, 3, H, W], as the pipeline decodes it."""
        config = pipe.vae.config
        # AutoencoderDC has no shift.
        shift = getattr(config, "shift_factor", 0.0)
        return pipe.vae.decode(z_1CHW.to(pipe.vae.dtype) / config.scaling_factor + shift).sample

    def velocity(self, pipe: Any, z_1CHW: Tensor, t: float, embeds_TE: Tensor, mask_T: Tensor | None) -> Tensor:
        """The prediction of z_1 - z_0 at time t, [1, C, H, W]."""
        raise NotImplementedError


class Klein(BaseModel):
    """FLUX.2-klein: text and picture attend together, and the text evolves. It reads three layers at once."""

    pipeline = "Flux2KleinPipeline"
    sites = (
        TextSite("transformer_blocks", "encoder_hidden_states", 1),
        TextSite("single_transformer_blocks", "hidden_states", 0, "head"),
    )
    evolves = True
    rows = ()

    def encode(self, pipe: Any, prompt: str) -> tuple[Tensor, Tensor | None]:
        return pipe.encode_prompt(prompt, device=pipe.text_encoder.device)[0][0], None

    def first_text(self, transformer: nn.Module, embeds_TE: Tensor) -> Tensor:
        return transformer.context_embedder(embeds_TE)  # type: ignore[operator]

    def patches(self, arguments: Mapping[str, Any], grid: TokenGrid) -> Tensor:
        # The patches of references come after the noised ones.
        return arguments["hidden_states"][:, : grid.count]

    def draw_arguments(self, recipe: Recipe, prompts: Prompts) -> dict[str, Any]:
        negative = prompts.embeds.get(NEGATIVE)
        return {
            "prompt_embeds": prompts.embeds[POSITIVE][None],
            "negative_prompt_embeds": None if negative is None else negative[None],
            "guidance_scale": recipe.cfg,
        }

    def edit(
        self, pipe: Any, recipe: Recipe, pictures: Sequence[Image], mask: Image | None
    ) -> tuple[Any, dict[str, Any]]:
        from diffusers.pipelines.flux2.pipeline_flux2_klein_inpaint import Flux2KleinInpaintPipeline
        from PIL import Image as Images

        assert recipe.edit is not None
        if mask is None and recipe.edit.strength == 1:
            return pipe, {"image": list(pictures)}
        inpaint = Flux2KleinInpaintPipeline(**pipe.components, is_distilled=pipe.config.is_distilled)
        everything = Images.new("L", pictures[0].size, 255)
        arguments = {"image": pictures[0], "mask_image": mask or everything, "strength": recipe.edit.strength}
        return inpaint, arguments | ({"image_reference": list(pictures[1:])} if len(pictures) > 1 else {})

    def latents(self, pipe: Any, picture_13HW: Tensor) -> Tensor:
        return pipe._encode_vae_image(picture_13HW, None)

    def unpack(self, latents: Tensor, grid: TokenGrid) -> Tensor:
        return latents.transpose(1, 2).unflatten(2, (grid.rows, grid.columns))

    def decode(self, pipe: Any, z_1CHW: Tensor) -> Tensor:
        norm, epsilon = pipe.vae.bn, pipe.vae.config.batch_norm_eps
        scale_C11 = (norm.running_var + epsilon).sqrt()[:, None, None]
        scaled_1CHW = z_1CHW * scale_C11 + norm.running_mean[:, None, None]
        return pipe.vae.decode(pipe._unpatchify_latents(scaled_1CHW).to(pipe.vae.dtype)).sample

    def velocity(self, pipe: Any, z_1CHW: Tensor, t: float, embeds_TE: Tensor, mask_T: Tensor | None) -> Tensor:
        predicted_1NP = pipe.transformer(
            hidden_states=pipe._pack_latents(z_1CHW),
            timestep=z_1CHW.new_tensor([t]),
            guidance=None,
            encoder_hidden_states=embeds_TE[None],
            txt_ids=pipe._prepare_text_ids(embeds_TE[None]).to(z_1CHW.device),
            img_ids=pipe._prepare_latent_ids(z_1CHW).to(z_1CHW.device),
            return_dict=False,
        )[0]
        return predicted_1NP.transpose(1, 2).unflatten(2, z_1CHW.shape[2:])


class _StopError(Exception):
    """Ends a pass of the transformer at its first block."""


class ZImage(BaseModel):
    """Z-Image: one sequence of the picture and the text, which two blocks of its own refine first."""

    pipeline = "ZImagePipeline"
    sites = (TextSite("layers", "x", 0, "tail"),)
    evolves = True
    rows = (POSITIVE, NEGATIVE)
    refines = True

    def encode(self, pipe: Any, prompt: str) -> tuple[Tensor, Tensor | None]:
        device = pipe.text_encoder.device
        return pipe.encode_prompt(prompt, device=device, do_classifier_free_guidance=False)[0][0], None

    def first_text(self, transformer: nn.Module, embeds_TE: Tensor) -> Tensor:
        found: list[Tensor] = []

        def stop(_block: nn.Module, inputs: tuple[Any, ...]) -> None:
            # The picture of 2 x 2 latents is one patch, padded as every sequence.
            found.append(inputs[0][0, self.text_start(TokenGrid(1, 1)) :][: embeds_TE.shape[0]])
            raise _StopError

        handle = transformer.layers[0].register_forward_pre_hook(stop)  # type: ignore[index, union-attr]
        picture = embeds_TE.new_zeros(transformer.in_channels, 1, 2, 2)  # type: ignore[arg-type]
        try:
            transformer([picture], embeds_TE.new_zeros(1), [embeds_TE], return_dict=False)
        except _StopError:
            pass
        finally:
            handle.remove()
        return found[0]

    def time(self, arguments: Mapping[str, Any]) -> float:
        return 1 - float(arguments["t"].flatten()[0])

    def patches(self, arguments: Mapping[str, Any], grid: TokenGrid) -> Tensor:
        return patchify(torch.stack([z_C1HW[:, 0] for z_C1HW in arguments["x"]]), 2)

    def text_start(self, grid: TokenGrid) -> int:
        return -(-grid.count // 32) * 32

    def draw_arguments(self, recipe: Recipe, prompts: Prompts) -> dict[str, Any]:
        negative = prompts.embeds.get(NEGATIVE)
        return {
            "prompt_embeds": [prompts.embeds[POSITIVE]],
            "negative_prompt_embeds": [] if negative is None else [negative],
            # Its guidance adds this much of the difference; 0 turns it off.
            "guidance_scale": recipe.cfg - 1,
        }

    def edit(
        self, pipe: Any, recipe: Recipe, pictures: Sequence[Image], mask: Image | None
    ) -> tuple[Any, dict[str, Any]]:
        from diffusers.pipelines.z_image.pipeline_z_image_img2img import ZImageImg2ImgPipeline
        from diffusers.pipelines.z_image.pipeline_z_image_inpaint import ZImageInpaintPipeline

        assert recipe.edit is not None
        arguments: dict[str, Any] = {"image": pictures[0], "strength": recipe.edit.strength}
        if mask is None:
            return ZImageImg2ImgPipeline(**pipe.components), arguments
        return ZImageInpaintPipeline(**pipe.components), arguments | {"mask_image": mask}

    def velocity(self, pipe: Any, z_1CHW: Tensor, t: float, embeds_TE: Tensor, mask_T: Tensor | None) -> Tensor:
        (predicted_C1HW,) = pipe.transformer(
            [z_1CHW[0][:, None]], z_1CHW.new_tensor([1 - t]), [embeds_TE], return_dict=False
        )[0]
        return -predicted_C1HW[None, :, 0]


class PRX(BaseModel):
    """PRX: its text gives keys and values to every block, and stays as it is."""

    pipeline = "PRXPipeline"
    sites = (TextSite("blocks", "encoder_hidden_states", 1),)
    evolves = False
    rows = (NEGATIVE, POSITIVE)

    def encode(self, pipe: Any, prompt: str) -> tuple[Tensor, Tensor | None]:
        device = pipe.text_encoder.device
        embeds, mask, *_ = pipe.encode_prompt(prompt, device, do_classifier_free_guidance=False)
        return embeds[0], mask[0]

    def first_text(self, transformer: nn.Module, embeds_TE: Tensor) -> Tensor:
        return transformer.txt_in(embeds_TE)  # type: ignore[operator]

    def draw_arguments(self, recipe: Recipe, prompts: Prompts) -> dict[str, Any]:
        def row(values: Mapping[str, Tensor | None], branch: str) -> Tensor | None:
            value = values.get(branch)
            return None if value is None else value[None]

        return {
            "prompt_embeds": row(prompts.embeds, POSITIVE),
            "prompt_attention_mask": row(prompts.masks, POSITIVE),
            "negative_prompt_embeds": row(prompts.embeds, NEGATIVE),
            "negative_prompt_attention_mask": row(prompts.masks, NEGATIVE),
            # A negative prompt of its own would be encoded again.
            "negative_prompt": None,
            "guidance_scale": recipe.cfg,
            "use_resolution_binning": False,
        }

    def velocity(self, pipe: Any, z_1CHW: Tensor, t: float, embeds_TE: Tensor, mask_T: Tensor | None) -> Tensor:
        return pipe.transformer(
            hidden_states=z_1CHW,
            timestep=z_1CHW.new_tensor([t]),
            encoder_hidden_states=embeds_TE[None],
            attention_mask=None if mask_T is None else mask_T[None],
            return_dict=False,
        )[0]


BASE_MODELS: dict[PipelineClass, BaseModel] = {model.pipeline: model for model in (Klein(), ZImage(), PRX())}


def arguments_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a module's `forward` by name."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return dict(zip(names, args, strict=False)) | dict(kwargs)


@contextmanager
def replaced(owner: Any, name: str, value: Any):
    """Within the context, an attribute of an object is another value."""
    had, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
