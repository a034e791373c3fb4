"""WAAD, FAI and entropy: the definitions on full maps, and the same numbers without any map (Eq. 9-10).

No map is needed because rows sum to 1 and both metrics look a bounded distance back. With the log-sum-exp Z_t of row t,
which fused attention computes anyway, A[t,s] = exp(q_t . k_s * scale - Z_t) can be had for just the band of pairs that
count:

    WAAD_t = sum_s A[t,s] min(t-s, W)                       = W - sum_{t-s<W} (W - (t-s)) A[t,s]
    FAI_s  = mean of A[t,s] over t in R, H_lo <= t-s <= H_hi  sums the band's columns
    span   = mean over t in R of sum_s A[t,s] (t-s)         = t - (what the head outputs when its values are positions)
"""

import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from grpo import token_logprobs
from heads import Heads, Recorded, fused_attention, middle_layers, record, split_heads


class Signals(NamedTuple):
    """What one forward pass tells of each response token: [B,N] float32, 0 outside the mask; and the heads used."""

    logprobs: Tensor
    entropy: Tensor
    waad: Tensor
    fai: Tensor
    heads: Heads
    seconds: float  # of the pass, what WAAD, FAI and a measured split took


def waad(local_map: Tensor, mask: Tensor, window: int = 10) -> Tensor:
    """Eq. 9, the definition: windowed average attention distance, from 0 to window tokens. Its peaks: preplan tokens.

    local_map [B,N,N] (row t, column s), the mean map of the local heads; mask [B,N]. Returns [B,N].

    >>> waad(torch.tensor([[[1.0, 0.0], [0.25, 0.75]]]), torch.tensor([[False, True]]))
    tensor([[0.0000, 0.2500]])
    """
    t = torch.arange(mask.shape[1], device=mask.device)
    distance = (t[:, None] - t).clamp(0, window)  # [N,N]
    return torch.where(mask, (local_map.float() * distance).sum(-1), 0.0)


def fai(global_map: Tensor, mask: Tensor, horizon: tuple[int, int | None] = (10, 100)) -> Tensor:
    """Eq. 10, the definition: future attention influence, the mean attention a token gets from later response tokens.

    global_map [B,N,N], the mean map of the far heads; mask [B,N]; token s is looked at from s+lo to s+hi, or to the end
    of the response when hi is None. Returns [B,N]; 0 for tokens that nothing looks at, the last lo ones.

    >>> fai(torch.tensor([[[1.0, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5]]]), torch.tensor([[False, True, True]]), (1, 9))
    tensor([[0.0000, 0.3000, 0.0000]])
    """
    t = torch.arange(mask.shape[1], device=mask.device)
    back = t[:, None] - t
    low, high = horizon[0], mask.shape[1] if horizon[1] is None else horizon[1]
    looks = (back >= low) & (back <= high) & mask[:, :, None]  # [B,N,N]
    received = torch.where(looks, global_map.float(), 0.0).sum(1)
    return torch.where(mask, received / looks.sum(1).clamp(min=1), 0.0)


def observe(
    model,
    input_ids: Tensor,
    mask: Tensor,
    heads: Heads | None = None,
    window: int = 10,
    horizon: tuple[int, int | None] = (10, 100),
    layers: list[int] | None = None,
    quantile: float = 0.3,
) -> Signals:
    """One forward pass without gradient: pi_old log-probs, entropy, WAAD and FAI. No map is ever made.

    input_ids [B,N] right-padded, mask [B,N] bool, the response tokens. heads is the split to use; None measures it on
    this batch, in `layers` (default: five of the middle third) with groups of `quantile`. Raises ValueError for models
    whose attention cannot be recorded.
    """
    layers = heads.layers if heads else layers or middle_layers(model.config.get_text_config().num_hidden_layers)
    with torch.no_grad():
        with record(model, layers) as recorded:
            logprobs, entropy = token_logprobs(model, input_ids, mask, entropy=True)
        start = _now(mask)
        if heads is None:
            spans = torch.stack([streamed_spans(recorded[layer], mask) for layer in layers])
            heads = Heads(layers, spans, *split_heads(spans, quantile))
        local = [(recorded[layer], group) for layer, group in zip(layers, heads.local)]
        far = [(recorded[layer], group) for layer, group in zip(layers, heads.far)]
        waad, fai = streamed_waad(local, mask, window), streamed_fai(far, mask, horizon)
        return Signals(logprobs, entropy, waad, fai, heads, _now(mask) - start)


def _now(x: Tensor) -> float:
    """Seconds, once the device has done what was asked of it."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()


def measure_spans(model, input_ids: Tensor, mask: Tensor, layers: list[int]) -> Tensor:
    """Eq. 7 for every head of the layers, from one forward pass without gradient. [layers,H]"""
    with torch.no_grad(), record(model, layers) as recorded:
        token_logprobs(model, input_ids, mask)
    return torch.stack([streamed_spans(recorded[layer], mask) for layer in layers])


def streamed_spans(layer: Recorded, mask: Tensor) -> Tensor:
    """Eq. 7 by one more fused attention call, whose values are positions. Returns [H] float32.

    sum_s A[t,s] (t-s) = t sum_s A[t,s] - sum_s A[t,s] s, both sums from one call, so that what rounding takes from the
    row's weights it takes from both. Positions go in as two columns, s // 256 and s % 256: averages of small numbers
    keep the digits that a difference of large ones would lose. Queries and keys go in as float32, or the averages would
    come out in the model's bf16, with eight bits.
    """
    s = torch.arange(mask.shape[1], device=mask.device)
    columns = torch.stack([torch.ones_like(s), s % 256, s // 256], -1).float()  # [N,3]
    k = layer.k.float()
    values = torch.nn.functional.pad(columns, (0, k.shape[-1] - 3)).expand_as(k)
    out, _ = fused_attention(layer.q.float(), k, values, layer.scale, layer.visible)
    weight, fine, coarse = out[..., :3].unbind(-1)  # [B,H,N] each
    spans = (weight * (s % 256) - fine) + 256 * (weight * (s // 256) - coarse)
    return (spans.double() * mask[:, None]).sum((0, 2)).float() / mask.sum()


def streamed_waad(layers: list[tuple[Recorded, Tensor]], mask: Tensor, window: int = 10) -> Tensor:
    """Eq. 9 from the band t-s < window of the chosen heads, [(layer, [H] bool), ...]. Returns [B,N]."""
    near = torch.zeros(mask.shape, device=mask.device)
    for rows, _, back, attention in _band_blocks(layers, mask, window - 1):
        near[:, rows] += (attention * (window - back).clamp(0, window)).sum(-1)
    return torch.where(mask, window - near, 0.0)


def streamed_fai(
    layers: list[tuple[Recorded, Tensor]], mask: Tensor, horizon: tuple[int, int | None] = (10, 100)
) -> Tensor:
    """Eq. 10 from the band of the chosen heads, [(layer, [H] bool), ...]. Returns [B,N].

    To the end of the response (hi None), the band is t-s < lo instead, and is taken from the sum of the whole column.
    """
    low, high = horizon
    received, looks = torch.zeros(2, *mask.shape, device=mask.device)
    for rows, columns, back, attention in _band_blocks(layers, mask, max(low - 1, 0) if high is None else high):
        inside = (back >= 0) & (back < low) if high is None else (back >= low) & (back <= high)
        inside = inside & mask[:, rows, None]  # [B,rows,columns]
        received[:, columns] += (attention * inside).sum(1)
        looks[:, columns] += inside.sum(1)
    if high is None:
        received = _column_sums(layers, mask) - received
        looks = mask.flip(1).cumsum(1).flip(1) - looks  # response rows from s on, less those too near
    return torch.where(mask & (looks > 0), received.clamp(min=0) / looks.clamp(min=1), 0.0)


def _column_sums(layers: list[tuple[Recorded, Tensor]], mask: Tensor) -> Tensor:
    """What each token receives from all response rows in the mean map of the chosen heads, [B,N].

    The output is A V, so the gradient of the response rows' outputs with respect to V is the column sums of A: one
    fused backward pass, in linear memory.
    """
    total, count = torch.zeros(mask.shape, device=mask.device), 0
    for layer, group in layers:
        if not group.any():  # the fused kernel dies of an empty batch
            continue
        q, k = _chosen(layer, group)
        with torch.enable_grad():
            v = torch.zeros_like(k, requires_grad=True)
            out, _ = fused_attention(q, k, v, layer.scale, layer.visible)
            upstream = torch.zeros_like(out)
            upstream[..., 0] = mask[:, None]
            (gradient,) = torch.autograd.grad(out, v, upstream)
        total, count = total + gradient[..., 0].sum(1), count + q.shape[1]
    return total / count


def _chosen(layer: Recorded, group: Tensor, rows=slice(None), columns=slice(None)) -> tuple[Tensor, Tensor]:
    """Float32 queries [B,heads,rows,D] of the heads in group [H] bool, and for each its keys [B,heads,columns,D]."""
    index = group.nonzero()[:, 0]
    keys = index // (layer.q.shape[1] // layer.k.shape[1])
    return layer.q[:, :, rows][:, index].float(), layer.k[:, :, columns][:, keys].float()


def _band_blocks(
    layers: list[tuple[Recorded, Tensor]], mask: Tensor, reach: int
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """The mean map of the chosen heads, as blocks of rows with the columns up to reach tokens before them.

    Yields (rows, columns, t-s [rows,columns], A [B,rows,columns]) from the first response row on; A is 0 where s > t.
    """
    count, n = sum(int(group.sum()) for _, group in layers), mask.shape[1]
    first = int(mask.any(0).int().argmax())
    size = max(64, min(reach, 512))  # a block as high as its band is wide wastes half of it; 512: memory stays linear
    layers = [(layer, group) for layer, group in layers if group.any()]
    for top in range(first, n, size):
        rows, columns = slice(top, min(top + size, n)), slice(max(0, top - reach), min(top + size, n))
        t, s = (torch.arange(x.start, x.stop, device=mask.device) for x in (rows, columns))
        back = t[:, None] - s
        mean = torch.zeros(len(mask), *back.shape, device=mask.device)
        for layer, group in layers:
            q, k = _chosen(layer, group, rows, columns)  # copies of a block, never of all N
            scores, lse = q @ k.mT, layer.lse[:, :, rows][:, group, :, None]  # [B,heads,rows,columns], [B,heads,rows,1]
            seen = back >= 0 if layer.visible is None else layer.visible[:, :, rows, columns]
            mean += scores.mul_(layer.scale).sub_(lse).masked_fill_(~seen, -torch.inf).exp_().sum(1)
        yield rows, columns, back, mean / count
