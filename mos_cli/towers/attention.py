"""Attention of the router and the generation tower, and the backend that computes it.

Shapes: B batch, L sequence, T context tokens, N patches, D width, H heads, E width of a head.
"""

from functools import lru_cache
from importlib.util import find_spec
from typing import Literal

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor, nn

from mos_cli.errors import DeviceError
from mos_cli.towers.layers import EPS, Padding, Rotary, VariableLengths

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
    """Self-attention with QK-norm and rotary positions; keys and values of a context may be put before its own.

    A mask is used only for batches with a padding mask (training). With `VariableLengths` each row is computed alone.
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
        """Attends from x to [context; x]. `positions` and `padding` cover the keys; context_kv is [B, T, 2 D]."""
        return self.to_out(_attend(*self._qkv(x_BLD, positions, context_kv), padding, self.backend))

    def attention_weights(
        self, x_BLD: Tensor, positions: Rotary, context_kv: Tensor | None = None, padding: VariableLengths | None = None
    ) -> list[Tensor]:
        """The attention weights of `forward`, mean over heads: for each row of the batch [L, keys]."""
        return _attention_weights(*self._qkv(x_BLD, positions, context_kv)[:2], padding)

    def _qkv(self, x_BLD: Tensor, positions: Rotary, context_kv: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = _heads(self.to_qkv(x_BLD), 3, self.heads)
        if context_kv is not None:
            context_k, context_v = _heads(context_kv, 2, self.heads)
            k, v = torch.cat([context_k, k], dim=1), torch.cat([context_v, v], dim=1)
        return positions[-q.shape[1] :].rotate(self.norm_q(q)), positions.rotate(self.norm_k(k)), v

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
        """Attends from x to the context. `positions` and `padding` cover [context; x]."""
        return self.to_out(_attend(*self._qkv(x_BND, context_BTD, positions), padding, self.backend))

    def attention_weights(
        self, x_BND: Tensor, context_BTD: Tensor, positions: Rotary, padding: VariableLengths | None = None
    ) -> list[Tensor]:
        """The attention weights of `forward`, mean over heads: for each row of the batch [N, T]."""
        return _attention_weights(*self._qkv(x_BND, context_BTD, positions)[:2], padding)

    def _qkv(self, x_BND: Tensor, context_BTD: Tensor, positions: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        (q,) = _heads(self.to_q(x_BND), 1, self.heads)
        k, v = _heads(self.to_kv(context_BTD), 2, self.heads)
        q = positions[k.shape[1] :].rotate(self.norm_q(q))
        return q, positions[: k.shape[1]].rotate(self.norm_k(k)), v


def _heads(x: Tensor, parts: int, heads: int) -> list[Tensor]:
    """[B, L, parts * D] -> `parts` of [B, L, H, E]."""
    return [part.unflatten(-1, (heads, -1)) for part in x.chunk(parts, dim=-1)]


def _attend(q_BLHE: Tensor, k_BLHE: Tensor, v_BLHE: Tensor, padding: Padding, backend: AttentionBackendName) -> Tensor:
    """Attention, [B, L, D]. The first entries of a mask are those of the keys. xformers has another format of masks."""
    if isinstance(padding, VariableLengths):
        return _attend_rows(q_BLHE, k_BLHE, v_BLHE, padding, backend)
    mask = padding[:, None, None, : k_BLHE.shape[1]] if isinstance(padding, Tensor) else None
    # The backend is passed explicitly, so that no environment variable replaces it.
    backend = backend if mask is None else SDPA
    return dispatch_attention_fn(q_BLHE, k_BLHE, v_BLHE, attn_mask=mask, backend=backend).flatten(-2)


@torch.compiler.disable()
def _attend_rows(
    q_BLHE: Tensor, k_BLHE: Tensor, v_BLHE: Tensor, padding: VariableLengths, backend: AttentionBackendName
) -> Tensor:
    """Attention row by row, without masks. Not compiled: it would be compiled again for every length of a prompt."""
    if padding.equal:
        return _attend(q_BLHE, k_BLHE, v_BLHE, None, backend)
    rows = enumerate(q_BLHE.split(1))
    return torch.cat([_attend(q, padding.row(k_BLHE, b), padding.row(v_BLHE, b), None, backend) for b, q in rows])


def _attention_weights(q_BLHE: Tensor, k_BLHE: Tensor, padding: VariableLengths | None) -> list[Tensor]:
    """The attention weights of each row [queries, keys], without its padding, mean over heads.

    Computed head by head, to save memory.
    """
    scale, heads = q_BLHE.shape[-1] ** -0.5, q_BLHE.shape[2]
    rows = []
    for b, q_LHE in enumerate(q_BLHE):
        k_LHE = k_BLHE[b] if padding is None else padding.row(k_BLHE, b)[0]
        pairs = zip(q_LHE.unbind(1), k_LHE.unbind(1), strict=True)
        weights = ((q @ k.mT * scale).float().softmax(dim=-1) for q, k in pairs)
        rows.append(sum(weights, torch.zeros(())) / heads)
    return rows
