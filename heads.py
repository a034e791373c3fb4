"""Which heads look near and which look far, and how a model's queries and keys are recorded (Eq. 7-8).

Works with any transformers model whose layers go through the library's attention interface: Qwen, Llama, Mistral,
Gemma, ... Grouped-query heads and sliding windows are included. To copy: heads.py, metrics.py, credit.py, grpo.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask


class Heads(NamedTuple):
    """A head split: the sampled layers' numbers; [layers,H] spans in tokens; the two groups of heads as bool masks."""

    layers: list[int]
    spans: Tensor
    is_local: Tensor  # H_loc, the heads that look near
    is_global: Tensor  # H_glob, the heads that look far


class Recorded(NamedTuple):
    """One layer's attention without its map.

    A[b,h,t,s] = exp(query_t . key_s * scale - lse_t) where row t sees key s, else 0.
    """

    query: Tensor  # [B,H,N,D], after rotary embedding
    key: Tensor  # [B,H_kv,N,D]; query head h uses key head h // (H / H_kv)
    scale: float
    lse: Tensor  # [B,H,N] float32, the log-sum-exp of row t's scores
    visible: Tensor | None  # [B or 1,1,N,N] bool for sliding-window layers; None is plain causal


def layer_range(num_layers: int, where: str = "middle", count: int = 5) -> list[int]:
    """Up to count evenly spaced layers of the model's bottom, middle or top third, or of all of it; sorted, distinct.

    >>> layer_range(36), layer_range(12, "top"), layer_range(12, "all"), layer_range(2)
    ([12, 15, 18, 21, 24], [8, 9, 10, 11], [0, 3, 6, 8, 11], [0, 1])
    """
    third, last = num_layers / 3, num_layers - 1
    ends = {"bottom": (0, third), "middle": (third, 2 * third), "top": (2 * third, last), "all": (0, last)}
    if where not in ends:
        raise ValueError(f"unknown layer range {where!r}: choose one of {', '.join(ends)}")
    low, high = (min(int(end), last) for end in ends[where])
    steps = max(count - 1, 1)
    return sorted({low + (i * (high - low) + steps // 2) // steps for i in range(count)})


def middle_layers(num_layers: int, count: int = 5) -> list[int]:
    """The paper's choice: count evenly spaced layers from floor(L/3) to floor(2L/3)."""
    return layer_range(num_layers, "middle", count)


def head_spans(maps: Tensor, mask: Tensor) -> Tensor:
    """Eq. 7, the definition: how many tokens back each head looks, mean over all response rows of the batch.

    maps [B,H,N,N] (row t, column s), mask [B,N] bool. Returns [H] float32.

    >>> look_back_one = torch.eye(3).roll(1, 0)[None, None]  # rows 1 and 2 attend to the token before
    >>> head_spans(look_back_one, torch.tensor([[False, True, True]]))
    tensor([1.])
    """
    t = torch.arange(maps.shape[-1], device=maps.device)
    back = (t[:, None] - t).clamp(min=0)  # [N,N]
    rows = (maps.float() * back).sum(-1)  # [B,H,N]
    return (rows * mask[:, None]).sum((0, 2)) / mask.sum()


def split_heads(spans: Tensor, quantile: float = 0.3) -> tuple[Tensor, Tensor]:
    """The heads of lowest span (H_loc) and of highest span (H_glob), as bool masks shaped like spans; Eq. 8's groups.

    Each group has floor(quantile * heads) members, at least one; they are disjoint.

    >>> split_heads(torch.tensor([[3.0, 9.0], [1.0, 5.0]]))
    (tensor([[False, False],
            [ True, False]]), tensor([[False,  True],
            [False, False]]))
    """
    if not 0 < quantile <= 0.5:
        raise ValueError(f"quantile {quantile}: the two groups are disjoint, so it lies in (0, 0.5]")
    if spans.numel() < 2:
        raise ValueError(f"{spans.numel()} sampled head: a split into local and global needs two")
    size = max(1, int(quantile * spans.numel() + 1e-6))  # 1e-6: 0.3 * 10 must not floor to 2
    order = spans.flatten().argsort(stable=True)
    is_local, is_global = torch.zeros(2, spans.numel(), dtype=torch.bool, device=spans.device)
    is_local[order[:size]] = True
    is_global[order[-size:]] = True
    return is_local.view_as(spans), is_global.view_as(spans)


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, visible: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Torch's fused attention, with the log-sum-exp that scaled_dot_product_attention computes but does not return.

    query [B,H,N,D], key and value [B,H_kv,N,D], visible as in Recorded. Returns ([B,H,N,D], [B,H,N] float32). Memory is
    linear in N but for `visible`, which transformers makes for sliding-window layers, and its copy. The CUDA branches
    have not been run.
    """
    causal, bias = visible is None, None
    if not causal:  # rows of a multiple of 8, as CUDA's kernel wants them
        n = visible.shape[-1]
        padded = query.new_zeros(*visible.shape[:-1], -(-n // 8) * 8)
        bias = padded[..., :n].masked_fill_(~visible, -torch.inf)
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=bias, scale=scale
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)  # CUDA's know no grouped heads
    if causal and query.dtype in (torch.float16, torch.bfloat16):
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, scale=scale)[:2]
    if not causal:
        bias = bias.expand(*query.shape[:3], key.shape[2])
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, 0.0, causal, scale=scale
    )
    return out, lse[..., : query.shape[2]]  # this kernel pads the rows to a multiple of 32


def attention_maps(layer: Recorded) -> Tensor:
    """One layer's maps A [B,H,N,N], float32. For looking at: they take the memory that the signals do without."""
    n = layer.query.shape[2]
    key = layer.key.repeat_interleave(layer.query.shape[1] // layer.key.shape[1], 1).float()
    seen = layer.visible
    if seen is None:
        seen = torch.ones(n, n, dtype=torch.bool, device=key.device).tril()
    scores = layer.query.float() @ key.mT * layer.scale - layer.lse[..., None]
    return scores.masked_fill(~seen, -torch.inf).exp()


_recording: dict[int, Recorded | None] = {}  # by layer number; record() says which layers, _attend fills them in


def _attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """The attention function that transformers calls within record(): fused, and it keeps queries and keys."""
    plain = not any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
    if not plain or query.shape[-1] != value.shape[-1]:
        raise ValueError(
            f"{type(module).__name__} soft-caps its scores or has attention sinks, position biases or values of "
            "another width than its queries: no WAAD and FAI can be taken from it, so only uniform credit is possible"
        )
    layer = getattr(module, "layer_idx", None)
    if layer not in _recording:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, rotation makes these two float32
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out, lse = fused_attention(query, key, value, scale, attention_mask)
    _recording[layer] = Recorded(query, key, scale, lse, attention_mask)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("recording", _attend)
AttentionMaskInterface.register("recording", sdpa_mask)  # without a mask sliding-window layers would see everything


@contextmanager
def record(model, layers: list[int]) -> Iterator[dict[int, Recorded]]:
    """Yields a dict {layer: None}, which a forward pass without gradient within the context fills with Recorded.

    On leaving, the model attends as it did before. Raises ValueError then if the pass recorded nothing for a layer (a
    model without such attention).
    """
    global _recording
    model = getattr(model, "module", model)  # DDP's own model
    own_attention, recorded = model.config._attn_implementation, dict.fromkeys(layers)
    try:
        model.set_attn_implementation("recording")
        _recording = recorded
        yield recorded
        if missing := [layer for layer, r in recorded.items() if r is None]:
            raise ValueError(
                f"{type(model).__name__} showed no attention in layers {missing}: WAAD and FAI need softmax attention "
                "that goes through transformers' attention interface, so only uniform credit is possible"
            )
    finally:
        _recording = {}
        model.set_attn_implementation(own_attention)
