"""Attention without maps: torch's fused attention with its log-sum-exp, and a way to record queries and keys.

A fused kernel computes softmax(q k) v without ever storing the map A [N,N]. It does compute one number per row, the
log-sum-exp Z_t of that row's scores. With queries, keys and Z, any entry of the map can be computed again later:

    A[t,s] = exp(q_t . k_s * scale - Z_t)

`recording(model, layers)` keeps queries, keys and Z of chosen layers during one ordinary forward pass. metrics.py
computes WAAD and FAI from them. It works with transformers models whose layers use the library's attention interface
(Qwen, Llama, Mistral, Gemma 3, ...), with grouped-query heads and sliding windows. Models with soft-capped scores,
attention sinks, position biases, or values of another width than their queries are refused.

Files to copy: attention.py, heads.py, metrics.py, credit.py, grpo.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask


class Recorded(NamedTuple):
    """One layer's attention without its map: A[b,h,t,s] = exp(query_t . key_s * scale - lse_t), 0 where not visible."""

    query: Tensor  # [B,H,N,D], after rotary embedding
    key: Tensor  # [B,H_kv,N,D]; query head h uses key head h // (H / H_kv)
    scale: float
    lse: Tensor  # [B,H,N] float32, the log-sum-exp Z_t of row t's scores
    visible: Tensor | None  # [B or 1,1,N,N] bool, for sliding-window layers; None means causal


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, visible: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Torch's fused attention, with the log-sum-exp that scaled_dot_product_attention computes but does not return.

    query [B,H,N,D]; key and value [B,H_kv,N,D]; visible as in Recorded. Returns (output [B,H,N,D], Z [B,H,N] float32).
    Memory is linear in N, except for `visible` and a copy of it. The CUDA branches have never been run.
    """
    if query.device.type == "cpu":
        bias = None if visible is None else _attention_bias(query, visible)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, visible is None, attn_mask=bias, scale=scale
        )

    # The CUDA kernels do not support grouped-query attention: repeat each key head for its query heads.
    heads_per_key = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(heads_per_key, 1), value.repeat_interleave(heads_per_key, 1)

    # Causal attention in 16 bits: the flash kernel.
    if visible is None and query.dtype in (torch.float16, torch.bfloat16):
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, scale=scale)[:2]

    # All else (float32, sliding windows): the memory-efficient kernel.
    bias = None
    if visible is not None:
        bias = _attention_bias(query, visible).expand(*query.shape[:3], key.shape[2])
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, 0.0, visible is None, scale=scale
    )
    return out, lse[..., : query.shape[2]]  # this kernel pads the rows to a multiple of 32


def _attention_bias(query: Tensor, visible: Tensor) -> Tensor:
    """0 where a row sees a column, -inf elsewhere. Rows are stored in multiples of 8, as the CUDA kernel requires."""
    n = visible.shape[-1]
    stored = query.new_zeros(*visible.shape[:-1], -(-n // 8) * 8)
    return stored[..., :n].masked_fill_(~visible, -torch.inf)


def attention_maps(layer: Recorded) -> Tensor:
    """One layer's maps A [B,H,N,N], float32. For inspection only: they take O(N²) memory, which WAAD and FAI avoid."""
    n = layer.query.shape[2]
    key = layer.key.repeat_interleave(layer.query.shape[1] // layer.key.shape[1], 1).float()  # [B,H,N,D]
    visible = layer.visible
    if visible is None:
        visible = torch.ones(n, n, dtype=torch.bool, device=key.device).tril()
    scores = layer.query.float() @ key.mT * layer.scale - layer.lse[..., None]  # [B,H,N,N]
    return scores.masked_fill(~visible, -torch.inf).exp()


# ---- recording ----
# transformers looks up a model's attention function by name. We register one more, "recording". While recording() is
# active the model uses it: in the chosen layers it runs fused attention and keeps query, key and Z; in the others it
# runs transformers' own sdpa attention. The output is the same in both cases.

_recorded: dict[int, Recorded | None] = {}  # by layer number; recording() says which layers, _attend fills them in


def _attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """The attention function that transformers calls in each layer while recording() is active."""
    plain = not any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
    if not plain or query.shape[-1] != value.shape[-1]:
        raise ValueError(
            f"{type(module).__name__} soft-caps its scores, or has attention sinks, position biases or values of "
            "another width than its queries. WAAD and FAI cannot be taken from it: only uniform credit is possible"
        )
    layer = getattr(module, "layer_idx", None)
    if layer not in _recorded:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, rotation makes these two float32
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out, lse = fused_attention(query, key, value, scale, attention_mask)
    _recorded[layer] = Recorded(query, key, scale, lse, attention_mask)
    return out.transpose(1, 2).contiguous(), None  # [B,N,H,D], and no map


AttentionInterface.register("recording", _attend)
# Without this line sliding-window layers would get no mask at all and attend to everything.
AttentionMaskInterface.register("recording", sdpa_mask)


@contextmanager
def recording(model, layers: list[int]) -> Iterator[dict[int, Recorded]]:
    """Record chosen layers: yields a dict {layer: None}, which a forward pass without gradient fills with Recorded.

    At exit the model gets its own attention back. Raises ValueError there if a layer was not recorded, because the
    model does not use transformers' attention interface in it.
    """
    global _recorded
    model = getattr(model, "module", model)  # DDP's own model
    own_attention, recorded = model.config._attn_implementation, dict.fromkeys(layers)
    try:
        model.set_attn_implementation("recording")
        _recorded = recorded
        yield recorded
        if missing := [layer for layer, r in recorded.items() if r is None]:
            raise ValueError(
                f"{type(model).__name__} showed no attention in layers {missing}. WAAD and FAI need softmax attention "
                "that goes through transformers' attention interface: only uniform credit is possible"
            )
    finally:
        _recorded = {}
        model.set_attn_implementation(own_attention)
