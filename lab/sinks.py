"""Attention sinks: many heads of a trained model leave most of their attention on the first token (arXiv 2309.17453).

Such a head looks far by Eq. 7 and takes in nothing from there. What would be otherwise without that column? With it
taken out and the rows renormalised, A'[t,s] = A[t,s] / (1 - A[t,0]), attention is that of the same queries and keys
without the first ones. So no map is needed: the rest is a shift, and the log-sum-exp of the shorter rows. That is
log-sum-exp + log(1 - A[t,0]), one dot product a row; here fused attention computes it again, because where nearly all
lies on the first token, bfloat16 leaves no digit of the difference.
"""

import numpy as np
from torch import Tensor

from attention import Recorded, fused_attention
from heads import split_heads


def on_first(layer: Recorded) -> Tensor:
    """What each row leaves on the first token: [B,H,N]."""
    key = layer.key[:, :, :1].repeat_interleave(layer.query.shape[1] // layer.key.shape[1], 1)
    share = ((layer.query.float() * key.float()).sum(-1) * layer.scale - layer.lse).exp()
    return share if layer.attn_mask is None else share * layer.attn_mask[..., 0]


def without_first(layer: Recorded) -> Recorded:
    """The layer without its first token: rows and columns 1 to N-1, each row summing to 1."""
    query, key = layer.query[:, :, 1:].float(), layer.key[:, :, 1:].float()
    visible = None if layer.attn_mask is None else layer.attn_mask[..., 1:, 1:]
    lse = fused_attention(query, key, key, layer.scale, visible)[1]
    return Recorded(query, key, layer.scale, lse, visible)


def table(spans: Tensor, other_spans: Tensor, shares: Tensor, quantile: float = 0.3) -> dict[str, float | list[float]]:
    """Spans with and without the first token and what is left on it, by group of heads; [heads] each.

    [span, span without, share on the first token] of a group as the spans split it; the overlap (Jaccard) of each group
    with the group by the other spans; and the correlation of span and share over heads.
    """
    groups, others = split_heads(spans, quantile), split_heads(other_spans, quantile)
    out = {"all heads": [x.mean().item() for x in (spans, other_spans, shares)]}
    for name, a, b in zip(("local heads", "global heads"), groups, others):
        out[name] = [x[a].mean().item() for x in (spans, other_spans, shares)]
        out[f"{name}, overlap"] = ((a & b).sum() / (a | b).sum()).item()
    return out | {"correlation": float(np.corrcoef(spans.numpy(), shares.numpy())[0, 1])}
