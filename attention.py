"""Attention without maps: torch's fused attention with its log-sum-exp, and a way to record queries and keys.

A fused kernel computes softmax(q k) v without ever storing the map A [N,N]. It does compute one number per row, the
log-sum-exp Z_t of that row's scores. With queries, keys and Z, any entry of the map can be computed again later:

    A[t,s] = exp(q_t . k_s * scale - Z_t)

`recording(model)` keeps queries, keys and Z of each layer, or of chosen ones, during one ordinary forward pass.
metrics.py computes WAAD and FAI from them. This file has three parts:

    1. fused_attention, Recorded, map_block   attention with its log-sum-exp, and entries of the map from it
    2. attend and below                       the same for models that change their scores: soft-caps, sinks
    3. recording                              the hook into transformers; what it relies on is checked once per model

It works with transformers models whose layers use the library's attention interface: nearly all of today's. Those it
cannot work with are refused with a sentence that says why. Files to copy: attention.py, heads.py, metrics.py,
credit.py, grpo.py.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface

# ---- 1. Attention with its log-sum-exp ----


class Recorded(NamedTuple):
    """One layer's attention without its map: A[b,h,t,s] = exp(query_t . key_s * scale - lse_t), 0 where not visible."""

    query: Tensor  # [B,H,N,D], after rotary embedding
    key: Tensor  # [B,H_kv,N,D]; query head h uses key head h // (H / H_kv)
    scale: float
    lse: Tensor | None  # [B,H,N] float32, the log-sum-exp Z_t of row t's scores
    # As scaled_dot_product_attention takes it. None: causal. bool [B or 1,1,N,N]: true where a row sees a column, for
    # sliding windows. Float [B or 1,H or 1,N,N]: added to the scores, for position biases.
    attn_mask: Tensor | None
    softcap: float | None = None  # scores become softcap * tanh(score / softcap), in Gemma 2
    sinks: Tensor | None = None  # [H], one more score in each row, whose attention goes nowhere, in gpt-oss
    position_ids: Tensor | None = None  # [B or 1,N], as the model was given them; not part of A


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, attn_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Torch's fused attention, with the log-sum-exp that scaled_dot_product_attention computes but does not return.

    query [B,H,N,D]; key [B,H_kv,N,D]; value [B,H_kv,N,V]; attn_mask as in Recorded. Returns (output [B,H,N,V],
    Z [B,H,N] float32). Memory is linear in N, except for attn_mask and a copy of it. The CUDA branch has never been
    run.
    """
    # The kernels want values as wide as keys, and on CUDA widths in multiples of 8. Columns of zeros change no score.
    value_width = value.shape[-1]
    width = max(query.shape[-1], value_width)
    if query.device.type == "cuda":
        width = -(-width // 8) * 8
    query, key, value = (_as_kernels_read(x, width) for x in (query, key, value))

    if query.device.type == "cpu":
        bias = None if attn_mask is None else _score_bias(query, attn_mask)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, attn_mask is None, attn_mask=bias, scale=scale
        )
    else:
        out, lse = _fused_attention_on_cuda(query, key, value, scale, attn_mask)
    return out[..., :value_width], lse


def _as_kernels_read(x: Tensor, width: int) -> Tensor:
    """x with zeros up to this width, each head's numbers side by side: the CPU kernel misreads all else, silently."""
    if x.shape[-1] < width:
        x = pad(x, (0, width - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


def _fused_attention_on_cuda(
    query: Tensor, key: Tensor, value: Tensor, scale: float, attn_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    # The CUDA kernels do not support grouped-query attention: repeat each key head for its query heads.
    heads_per_key = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(heads_per_key, 1), value.repeat_interleave(heads_per_key, 1)

    # Causal attention in 16 bits, up to a width of 256: the flash kernel.
    if attn_mask is None and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, scale=scale)[:2]

    # All else (float32, sliding windows, wider heads): the memory-efficient kernel.
    bias = None
    if attn_mask is not None:
        bias = _score_bias(query, attn_mask).expand(*query.shape[:3], key.shape[2])
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, 0.0, attn_mask is None, scale=scale
    )
    return out, lse[..., : query.shape[2]]  # this kernel pads the rows to a multiple of 32


def _score_bias(query: Tensor, attn_mask: Tensor) -> Tensor:
    """What attn_mask adds to the scores: -inf where bool is false. Rows are stored in multiples of 8, as CUDA needs."""
    n = attn_mask.shape[-1]
    bias = query.new_zeros(*attn_mask.shape[:-1], -(-n // 8) * 8)[..., :n]
    return bias.masked_fill_(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else bias.copy_(attn_mask)


def map_block(layer: Recorded, head: Tensor, rows: slice, columns: slice) -> Tensor:
    """A rectangle of some heads' maps, A[b,h,t,s]: [B,heads,rows,columns] float32.

    head: [heads], their numbers; rows, columns: slices with a start and a stop.
    """
    return _score_block(layer, head, rows, columns).sub_(layer.lse[:, head, rows, None]).exp_()


def _score_block(layer: Recorded, head: Tensor, rows: slice, columns: slice) -> Tensor:
    """The scores that the softmax is taken of, -inf where a row does not see a column. As map_block otherwise."""
    query = layer.query[:, :, rows][:, head]  # [B,heads,rows,D]: copies of a block, never of all N
    key = layer.key[:, :, columns][:, head // (layer.query.shape[1] // layer.key.shape[1])]  # [B,heads,columns,D]
    with torch.autocast(query.device.type, enabled=False):  # bfloat16 is not precise enough here
        scores = (query.float() @ key.float().mT).mul_(layer.scale)
    if layer.softcap is not None:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)

    if layer.attn_mask is None:
        t = torch.arange(rows.start, rows.stop, device=scores.device)
        s = torch.arange(columns.start, columns.stop, device=scores.device)
        return scores.masked_fill_(t[:, None] < s, -torch.inf)
    mask = layer.attn_mask[:, :, rows, columns]
    if mask.shape[1] > 1:
        mask = mask[:, head]
    return scores.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else scores.add_(mask)


def attention_maps(layer: Recorded) -> Tensor:
    """One layer's maps A [B,H,N,N], float32. For inspection only: they take O(N²) memory, which WAAD and FAI avoid."""
    everything = slice(0, layer.query.shape[2])
    return map_block(layer, torch.arange(layer.query.shape[1], device=layer.query.device), everything, everything)


# ---- 2. The same for models that change their scores ----


def attend(layer: Recorded, value: Tensor) -> tuple[Tensor, Tensor]:
    """fused_attention with a layer's queries, keys, soft-cap and sinks. Returns (output [B,H,N,V], Z [B,H,N]).

    layer.lse is not read. value [B,H_kv,N,V].
    """
    if layer.softcap is None:
        out, lse = fused_attention(layer.query, layer.key, value, layer.scale, layer.attn_mask)
    else:
        out, lse = _capped_attention(layer, value)
    if layer.sinks is not None:
        # A sink is one more score in the softmax, whose value is 0: all other weights shrink by the same factor.
        with_sink = torch.logaddexp(lse, layer.sinks.float()[:, None])
        out = out * (lse - with_sink).exp()[..., None].to(out.dtype)
        lse = with_sink
    return out, lse


def _capped_attention(layer: Recorded, value: Tensor, height: int = 256) -> tuple[Tensor, Tensor]:
    """attend for soft-capped scores, in blocks of `height` rows: no fused kernel soft-caps and returns Z."""
    n, head = layer.query.shape[2], torch.arange(layer.query.shape[1], device=value.device)
    value = value.repeat_interleave(len(head) // value.shape[1], 1)
    out, lse = [], []
    for top in range(0, n, height):
        scores = _score_block(layer, head, slice(top, min(top + height, n)), slice(0, n))  # [B,H,rows,N]
        lse.append(scores.logsumexp(-1))
        out.append(scores.softmax(-1).to(value.dtype) @ value)
    return torch.cat(out, 2), torch.cat(lse, 2)


def row_sums(layer: Recorded, head: Tensor, rows: slice = slice(None)) -> Tensor:
    """What rows of some heads' maps sum to: 1, or less with sinks, which take the rest. [B,heads,rows]"""
    lse = layer.lse[:, head, rows]
    if layer.sinks is None:
        return torch.ones_like(lse)
    return 1 - (layer.sinks.float()[head, None] - lse).exp()


def choose_heads(layer: Recorded, head: Tensor) -> Recorded:
    """The layer with only these heads, [heads] numbers, each with keys of its own."""
    mask = layer.attn_mask
    return layer._replace(
        query=layer.query[:, head],
        key=layer.key[:, head // (layer.query.shape[1] // layer.key.shape[1])],
        lse=layer.lse[:, head],
        attn_mask=mask[:, head] if mask is not None and mask.shape[1] > 1 else mask,
        sinks=None if layer.sinks is None else layer.sinks[head],
    )


# ---- 3. Recording ----
# transformers looks up a model's attention function by a name in its config: "sdpa" for nearly all, "eager" for the few
# that do not support sdpa. While recording() is active, these names stand for a function of ours, which keeps query,
# key and Z of the chosen layers. The output is the same.


NO_CREDIT = "WAAD and FAI cannot be taken from it: use --credit uniform, entropy, forking or random"


@contextmanager
def recording(model, layers: list[int] | None = None) -> Iterator[dict[int, Recorded]]:
    """Record layers: yields a dict {layer: None}, which one forward pass without gradient fills with Recorded.

    layers: None records all that have softmax attention; the dict is empty at first. At exit the model has its own
    attention back. Raises ValueError for attention that cannot be recorded, and at exit if a layer was not recorded.
    Not for two threads at once.
    """
    model = getattr(model, "module", model)  # DDP's own model
    own_name, functions = model.config._attn_implementation, AttentionInterface._global_mapping
    recorded: dict[int, Recorded | None] = dict.fromkeys(layers or [])
    own_functions = {name: functions.get(name) for name in ("sdpa", "eager")}  # no "eager": a model has its own
    has_kernel = own_name not in own_functions  # flash_attention_2, say, which takes other masks
    try:
        if has_kernel:
            model.set_attn_implementation("sdpa")
        functions["sdpa"] = _recording_function(recorded, layers is None, None if has_kernel else own_functions["sdpa"])
        functions["eager"] = _recording_function(recorded, layers is None, None)
        yield recorded
        if missing := [layer for layer, found in recorded.items() if found is None]:
            raise ValueError(f"{type(model).__name__} showed no softmax attention in layers {missing}. {NO_CREDIT}")
        if not recorded:
            raise ValueError(
                f"{type(model).__name__} has no layer with softmax attention that goes through transformers' attention "
                f"interface. {NO_CREDIT}"
            )
    finally:
        for name, function in own_functions.items():
            functions[name] = function
            if function is None:
                del functions[name]
        if has_kernel:
            model.set_attn_implementation(own_name)


def _recording_function(recorded: dict, every_layer: bool, sdpa: Callable | None) -> Callable:
    """The attention function that transformers calls in each layer while recording() is active.

    sdpa: the model's own function, if that is transformers' sdpa. It runs in the layers that are not recorded.
    """

    def attend_and_record(module, query, key, value, attention_mask, scaling=None, **kwargs):
        number = getattr(module, "layer_idx", None)
        is_chosen = isinstance(number, int) and (every_layer or number in recorded)
        if not is_chosen and sdpa:
            return sdpa(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

        # Attention of which token t has no single row that sums over the tokens up to t.
        layer = f"layer {number} ({type(module).__name__})"
        is_causal = kwargs.get("is_causal")
        if attention_mask is None and not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
            raise ValueError(f"{layer} attends to later tokens: GRPO and its credit need a causal model")
        if key.shape[2] != query.shape[2]:
            raise ValueError(f"{layer} attends to {key.shape[2]} places from {query.shape[2]} tokens. {NO_CREDIT}")
        if is_chosen and recorded.get(number) is not None:
            raise ValueError(f"{layer} attends twice in one pass, so a token has no single row of A. {NO_CREDIT}")

        # Attend, with all that changes the scores, and keep what metrics.py computes the map's entries from.
        query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, rotation makes these two float32
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if kwargs.get("position_bias") is not None:
            from transformers.integrations.sdpa_attention import create_position_bias_mask  # transformers 5.10 has none

            attention_mask = create_position_bias_mask(kwargs["position_bias"], attention_mask, True, query, key)
        softcap = None if sdpa else kwargs.get("softcap")  # transformers' sdpa leaves the soft-cap out
        positions = kwargs.get("position_ids")
        found = Recorded(query, key, scale, None, attention_mask, softcap, kwargs.get("s_aux"), positions)
        out, lse = attend(found, value)
        if is_chosen:
            recorded[number] = found._replace(lse=lse)
        return out.transpose(1, 2).contiguous(), None  # [B,N,H,D], and no map

    return attend_and_record
