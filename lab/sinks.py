"""Attention sinks: many heads of a trained model leave most of their attention on the first token (arXiv 2309.17453).

Such a head looks far by Eq. 7 and takes in nothing from there. What would be otherwise without that column? With it
taken out and the rows renormalised, A'[t,s] = A[t,s] / (1 - A[t,0]), attention is that of the same queries and keys
without the first ones. So no map is needed: the rest is a shift, and the log-sum-exp of the shorter rows. That is
log-sum-exp + log(1 - A[t,0]), one dot product a row; here fused attention computes it again, because where nearly all
lies on the first token, bfloat16 leaves no digit of the difference.

Attention is also not yet what a head takes in: a column s gives A[t,s] W_O v_s, and a sink's value is small. So each
column can be weighted by its norm, ||W_O v_s|| (arXiv 2004.10102).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from attention import Recorded, fused_attention
from heads import split_heads


def on_first(layer: Recorded) -> Tensor:
    """What each row leaves on the first token: [B,H,N]."""
    key = layer.key[:, :, :1].repeat_interleave(layer.query.shape[1] // layer.key.shape[1], 1)
    share = ((layer.query.float() * key.float()).sum(-1) * layer.scale - layer.lse).exp()
    return share if layer.attn_mask is None else share * layer.attn_mask[..., 0]


def can_weigh(model, layers: list[int]) -> bool:
    """Do these layers keep values and output apart, as v_proj and o_proj? Llama and Qwen3 do, Phi-3 does not."""
    attentions = [getattr(model.get_decoder().layers[layer], "self_attn", None) for layer in layers]
    return all(hasattr(one, name) for one in attentions for name in ("v_proj", "o_proj", "head_dim"))


@contextmanager
def recording_norms(model, layers: list[int]) -> Iterator[dict[int, Tensor]]:
    """Record ||W_O v_s|| of every head and token of these layers in the passes made inside: {layer: [B,H,N]}.

    Only for models that can_weigh() says yes to.
    """
    found, modules = {}, {layer: model.get_decoder().layers[layer].self_attn for layer in layers}

    def record(layer: int, values: Tensor) -> None:
        module, width = modules[layer], modules[layer].head_dim
        value = values.float().unflatten(-1, (-1, width))  # [B,N,H_kv,D]
        out = module.o_proj.weight.float().unflatten(-1, (-1, width))  # [model width,H,D]
        squares = torch.einsum("mhd,mhe->hde", out, out)  # ||W v||^2 = v (W'W) v, for each head
        value = value.repeat_interleave(len(squares) // value.shape[2], 2)
        found[layer] = torch.einsum("bnhd,hde,bnhe->bhn", value, squares, value).clamp(min=0).sqrt()

    hooks = [
        module.v_proj.register_forward_hook(lambda _, __, values, layer=layer: record(layer, values))
        for layer, module in modules.items()
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def taken_from_first(layer: Recorded, norms: Tensor) -> Tensor:
    """Of what each row takes in, the share that the first token gives, columns weighted by their norms: [B,H,N]."""
    key = layer.key.float().repeat_interleave(layer.query.shape[1] // layer.key.shape[1], 1)
    taken = fused_attention(layer.query.float(), key, norms[..., None], layer.scale, layer.attn_mask)[0][..., 0]
    return on_first(layer) * norms[:, :, :1] / taken


def without_first(layer: Recorded) -> Recorded:
    """The layer without its first token: rows and columns 1 to N-1, each row summing to 1."""
    query, key = layer.query[:, :, 1:].float(), layer.key[:, :, 1:].float()
    visible = None if layer.attn_mask is None else layer.attn_mask[..., 1:, 1:]
    lse = fused_attention(query, key, key, layer.scale, visible)[1]
    return Recorded(query, key, layer.scale, lse, visible)


def table(
    spans: Tensor, other_spans: Tensor, shares: Tensor, taken: Tensor | None, quantile: float = 0.3
) -> dict[str, float | list[float]]:
    """Spans with and without the first token and what is left on it, by group of heads; [heads] each.

    [span, span without, share on the first token, the same by norm if it is there] of a group as the spans split it;
    the overlap (Jaccard) of each group with the group by the other spans; and the correlation of span and share over
    heads.
    """
    groups, others = split_heads(spans, quantile), split_heads(other_spans, quantile)
    columns = [x for x in (spans, other_spans, shares, taken) if x is not None]
    out = {"all heads": [x.mean().item() for x in columns]}
    for name, a, b in zip(("local heads", "global heads"), groups, others):
        out[name] = [x[a].mean().item() for x in columns]
        out[f"{name}, overlap"] = ((a & b).sum() / (a | b).sum()).item()
    return out | {"correlation": float(np.corrcoef(spans.numpy(), shares.numpy())[0, 1])}
