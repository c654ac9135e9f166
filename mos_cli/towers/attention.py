"""Attention of the router and the generation tower, and the backend that computes it.

Shapes: B batch, L sequence, T context tokens, N patches, D width, H heads, E width of a head.
"""

from functools import lru_cache
from importlib.util import find_spec
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor, nn

from mos_cli.errors import DeviceError
from mos_cli.towers.layers import EPS, Padding, Rotary, VariableLengths, mask_of

AttentionBackend = Literal["auto", "xformers", "sdpa"]
SDPA, XFORMERS = AttentionBackendName.NATIVE, AttentionBackendName.XFORMERS
"""PyTorch's own scaled dot product attention, and the memory-efficient one of xformers."""


def choose_attention(model: nn.Module, requested: AttentionBackend) -> str:
    """Sets the attention backend of every layer and returns the names of those used, joined by commas.

    The network must be on the device that it will run on. "auto" is xformers where it supports a layer's device, type
    and head width, else sdpa.

    Raises:
        DeviceError: xformers is requested and is not installed, or does not support one of the layers.
    """
    if requested == "xformers" and find_spec("xformers") is None:
        raise DeviceError("xformers is not installed: pip install 'mos-cli[cuda]', or use --attention auto or sdpa")
    used = {}
    for layer in model.modules():
        if not isinstance(layer, Attention | CrossAttention):
            continue
        weight = layer.norm_q.weight
        supported = requested != "sdpa" and xformers_supports(weight.device, weight.dtype, weight.shape[0])
        if requested == "xformers" and not supported:
            raise no_operator(weight.device, weight.dtype, weight.shape[0])
        layer.backend = XFORMERS if supported else SDPA
        used[layer.backend.value] = True
    return ", ".join(used)


def no_operator(device: torch.device, dtype: torch.dtype, head_width: int) -> DeviceError:
    """The error where xformers is requested and does not compute such attention."""
    return DeviceError(
        f"xformers has no operator for {dtype} heads of {head_width} on {device.type}: use --attention auto or sdpa"
    )


@lru_cache
def xformers_supports(device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """Whether xformers computes such attention, found by a trial: its tables of supported operators are not public."""
    if device.type != "cuda":
        return False
    try:
        from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports] (the extra `cuda`)

        probe = torch.zeros(1, 8, 1, head_width, device=device, dtype=dtype)
        memory_efficient_attention(probe, probe, probe)
    except (ImportError, OSError, NotImplementedError, ValueError, RuntimeError):
        return False
    return True


class Attention(nn.Module):
    """Self-attention with QK-norm and rotary positions; keys and values of a context may be put after its own.

    A mask is used only for batches with a padding mask (training, and prompts in buckets). With `VariableLengths`
    without a mask each row is computed alone.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.backend = heads, SDPA
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.norm_q = nn.RMSNorm(width // heads, eps=EPS)
        self.norm_k = nn.RMSNorm(width // heads, eps=EPS)

    def forward(
        self,
        x_BLD: Tensor,
        positions: Rotary,
        context_kv: Tensor | None = None,
        padding: Padding = None,
    ) -> Tensor:
        """Attends from x to [x; context]. `positions` and `padding` cover the keys; context_kv is [B, T, 2 D]."""
        return self.to_out(_attend(*self._qkv(x_BLD, positions, context_kv), padding, self.backend))

    def attention_weights(
        self, x_BLD: Tensor, positions: Rotary, context_kv: Tensor | None = None, padding: VariableLengths | None = None
    ) -> list[Tensor]:
        """The attention weights of `forward`, mean over heads: for each row of the batch [L, keys]."""
        return _attention_weights(*self._qkv(x_BLD, positions, context_kv)[:2], padding)

    def _qkv(self, x_BLD: Tensor, positions: Rotary, context_kv: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        q_BLD, kv_BL2D = self.to_qkv(x_BLD).split([x_BLD.shape[-1], 2 * x_BLD.shape[-1]], dim=-1)
        if context_kv is not None:
            kv_BL2D = torch.cat([kv_BL2D, context_kv], dim=1)
        q, (k, v) = _heads(q_BLD, self.heads), _keys_values(kv_BL2D, self.heads)
        q, k = self.norm_q(q).transpose(1, 2), self.norm_k(k).transpose(1, 2)
        return positions[: x_BLD.shape[1]].rotate(q), positions.rotate(k), v.transpose(1, 2)

    def keys_values(self, x_BLD: Tensor) -> Tensor:
        """Keys and values of x, [B, L, 2 D], for use as a `context_kv`."""
        # The queries are computed too and dropped: the weight of a quantised layer cannot be sliced.
        return self.to_qkv(x_BLD)[..., x_BLD.shape[-1] :]


class CrossAttention(nn.Module):
    """Attention from x to a context only; otherwise as `Attention`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.backend = heads, SDPA
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(width, 2 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.norm_q = nn.RMSNorm(width // heads, eps=EPS)
        self.norm_k = nn.RMSNorm(width // heads, eps=EPS)

    def forward(self, x_BND: Tensor, context_BTD: Tensor, positions: Rotary, padding: Padding = None) -> Tensor:
        """Attends from x to the context. `positions` covers [x; context], `padding` the context."""
        return self.to_out(_attend(*self._qkv(x_BND, context_BTD, positions), padding, self.backend))

    def attention_weights(
        self, x_BND: Tensor, context_BTD: Tensor, positions: Rotary, padding: VariableLengths | None = None
    ) -> list[Tensor]:
        """The attention weights of `forward`, mean over heads: for each row of the batch [N, T]."""
        return _attention_weights(*self._qkv(x_BND, context_BTD, positions)[:2], padding)

    def _qkv(self, x_BND: Tensor, context_BTD: Tensor, positions: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        q, (k, v) = _heads(self.to_q(x_BND), self.heads), _keys_values(self.to_kv(context_BTD), self.heads)
        q, k, patches = self.norm_q(q).transpose(1, 2), self.norm_k(k).transpose(1, 2), x_BND.shape[1]
        return positions[:patches].rotate(q), positions[patches:].rotate(k), v.transpose(1, 2)


def _heads(x_BLD: Tensor, heads: int) -> Tensor:
    """[B, L, D] -> [B, L, H, E]."""
    return x_BLD.unflatten(-1, (heads, -1))


def _keys_values(x_BL2D: Tensor, heads: int) -> tuple[Tensor, ...]:
    """[B, L, 2 D] -> keys and values, each [B, L, H, E]."""
    return x_BL2D.unflatten(-1, (2, heads, -1)).unbind(2)


def _attend(q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, padding: Padding, backend: AttentionBackendName) -> Tensor:
    """Attention, [B, L, D]. A mask covers the keys. xformers has another format of masks."""
    padding = mask_of(padding)
    if isinstance(padding, VariableLengths):
        return _attend_rows(q_BHLE, k_BHLE, v_BHLE, padding, backend)
    mask = padding[:, None, None] if isinstance(padding, Tensor) else None
    return _attend_all(q_BHLE, k_BHLE, v_BHLE, mask, backend)


def _attend_all(
    q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, mask: Tensor | None, backend: AttentionBackendName
) -> Tensor:
    if mask is not None or backend == SDPA:
        return F.scaled_dot_product_attention(q_BHLE, k_BHLE, v_BHLE, attn_mask=mask).transpose(1, 2).flatten(-2)
    q_BLHE, k_BLHE, v_BLHE = (x.transpose(1, 2) for x in (q_BHLE, k_BHLE, v_BHLE))
    # The backend is passed explicitly, so that no environment variable replaces it.
    return dispatch_attention_fn(q_BLHE, k_BLHE, v_BLHE, backend=backend).flatten(-2)


@torch.compiler.disable()
def _attend_rows(
    q_BHLE: Tensor, k_BHLE: Tensor, v_BHLE: Tensor, padding: VariableLengths, backend: AttentionBackendName
) -> Tensor:
    """Attention row by row, without masks. Not compiled: it would be compiled again for every length of a prompt."""
    if padding.equal:
        return _attend_all(q_BHLE, k_BHLE, v_BHLE, None, backend)
    rows = enumerate(zip(q_BHLE.split(1), k_BHLE.split(1), v_BHLE.split(1), strict=True))
    return torch.cat(
        [_attend_all(q, padding.without(k, b, 2), padding.without(v, b, 2), None, backend) for b, (q, k, v) in rows]
    )


def _attention_weights(q_BHLE: Tensor, k_BHLE: Tensor, padding: VariableLengths | None) -> list[Tensor]:
    """The attention weights of each row [queries, keys], without its padding, mean over heads.

    Computed head by head, to save memory.
    """
    scale, heads = q_BHLE.shape[-1] ** -0.5, q_BHLE.shape[1]
    rows = []
    for b, q_HLE in enumerate(q_BHLE):
        k_1HLE = k_BHLE[b : b + 1]
        k_HLE = (k_1HLE if padding is None else padding.without(k_1HLE, b, 2))[0]
        pairs = zip(q_HLE, k_HLE, strict=True)
        weights = ((q @ k.mT * scale).float().softmax(dim=-1) for q, k in pairs)
        rows.append(sum(weights, torch.zeros(())) / heads)
    return rows
