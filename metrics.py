"""WAAD and FAI: the definitions on full maps, and the same numbers without any map (Eq. 9-10).

A row of attention sums to 1, and both metrics look a bounded distance back. So no map is needed. With the log-sum-exp
Z_t of row t, which fused attention computes anyway, A[t,s] = exp(q_t . k_s * scale - Z_t) is computed for the pairs
that count and for no others, a band along the diagonal:

    WAAD_t = sum_s A[t,s] min(t-s, W)                       = W - sum_{t-s<W} (W - (t-s)) A[t,s]
    FAI_s  = mean of A[t,s] over t in R, H_lo <= t-s <= H_hi  sums the band's columns
    span   = mean over t in R of sum_s A[t,s] (t-s)         = t - (what the head outputs when its values are positions)
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from grpo import token_logprobs
from heads import Heads, Recorded, fused_attention, middle_layers, record, split_heads

ChosenHeads = list[tuple[Recorded, Tensor]]  # recorded layers, each with the heads to look at, [H] bool


class Signals(NamedTuple):
    """What one forward pass says about each response token: [B,N] float32, 0 outside the mask."""

    logprobs: Tensor
    entropy: Tensor
    waad: Tensor
    fai: Tensor
    heads: Heads  # the split that WAAD and FAI were taken with


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

    global_map [B,N,N], the mean map of the global heads; mask [B,N]; token s is looked at from s+lo to s+hi, or to the
    end of the response when hi is None. Returns [B,N]; 0 for tokens that nothing looks at, the last lo ones.

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
    attention_mask: Tensor | None = None,
    score: Callable[..., tuple[Tensor, Tensor]] = token_logprobs,
) -> Signals:
    """One forward pass without gradient: pi_old log-probs, entropy, WAAD and FAI. No map is ever made.

    input_ids [B,N], mask [B,N] bool, the response tokens. heads is the split to use; None measures it on this batch, in
    five layers of the middle third. Without attention_mask, padding is taken to lie on the right. A batch padded on the
    left or on both sides needs attention_mask [B,N], 1 for real tokens: rows are shifted to right padding, and what is
    found is shifted back to the caller's places. score(model, input_ids, mask, entropy=True) makes the pass over
    right-padded rows; a trainer that has its own way to log-probs gives that.
    The caller sees to dropout (model.eval()); to one split for several ranks, each of which measures its own (average
    Heads.spans, then split_heads); and to FSDP2's root, which a pass without gradient leaves gathered (model.reshard()
    before you make an optimizer or a state dict).
    Raises ValueError for an attention_mask that has holes or leaves out tokens of mask, for models whose attention
    cannot be recorded, and for heads that were measured on a batch without response tokens.
    """
    if attention_mask is not None:
        places = right_padding(attention_mask, mask)
        shifted = (x.gather(1, places) for x in (input_ids, mask))
        *found, heads = observe(model, *shifted, heads, window, horizon, score=score)
        return Signals(*(torch.zeros(mask.shape, device=mask.device).scatter(1, places, x) for x in found), heads)
    if heads and not heads.spans.isfinite().all():
        raise ValueError("heads were measured on a batch without response tokens: measure them on another, heads=None")
    config = getattr(model, "module", model).config  # DDP's own model
    layers = heads.layers if heads else middle_layers(config.get_text_config().num_hidden_layers)
    with torch.no_grad():
        with record(model, layers) as recorded:
            logprobs, entropy = score(model, input_ids, mask, entropy=True)
        if heads is None:
            spans = torch.stack([streamed_spans(recorded[layer], mask) for layer in layers])
            heads = Heads(layers, spans, *split_heads(spans))
        local_heads = [(recorded[layer], chosen) for layer, chosen in zip(layers, heads.is_local)]
        global_heads = [(recorded[layer], chosen) for layer, chosen in zip(layers, heads.is_global)]
        # Eq. 8 takes the mean of the maps. WAAD and FAI are linear in the map, so theirs is the same.
        mean_waad = streamed_waad(local_heads, mask, window).mean(1)
        mean_fai = streamed_fai(global_heads, mask, horizon).mean(1)
    return Signals(logprobs, entropy, mean_waad, mean_fai, heads)


def right_padding(attention_mask: Tensor, mask: Tensor) -> Tensor:
    """The places that each row's tokens come from when it is shifted to begin with its first real one.

    attention_mask [B,N], 1 for real tokens; mask [B,N] bool. Returns [B, longest row].

    >>> right_padding(torch.tensor([[0, 0, 1, 1, 0], [0, 1, 1, 1, 0]]), torch.zeros(2, 5, dtype=torch.bool))
    tensor([[2, 3, 4],
            [1, 2, 3]])
    """
    real = attention_mask.bool()
    if (mask & ~real).any():
        raise ValueError("mask marks a response token where attention_mask is 0")
    first, n = real.int().argmax(1, keepdim=True), real.shape[1]
    places = (first + torch.arange(n, device=real.device)) % n
    shifted = real.gather(1, places)
    if (shifted[:, 1:] & ~shifted[:, :-1]).any():
        raise ValueError("attention_mask has a hole, a 0 between 1s: a row's real tokens must lie side by side")
    return places[:, : int(real.sum(1).max())]


def measure_spans(model, input_ids: Tensor, mask: Tensor, layers: list[int]) -> Tensor:
    """Eq. 7 for every head of the layers, from one forward pass without gradient. [layers,H]"""
    with torch.no_grad(), record(model, layers) as recorded:
        token_logprobs(model, input_ids, mask)
    return torch.stack([streamed_spans(recorded[layer], mask) for layer in layers])


def streamed_spans(layer: Recorded, mask: Tensor) -> Tensor:
    """Eq. 7 by one more fused attention call, whose values are positions. Returns [H] float32.

    sum_s A[t,s] (t-s) = t sum_s A[t,s] - sum_s A[t,s] s. Both sums come from the same call, so what rounding takes from
    the row's weights it takes from both. Positions go in as two columns, s // 256 and s % 256: averages of small
    numbers keep the digits that a difference of large ones would lose. Queries and keys go in as float32, or the
    averages would come out in the model's bf16, with eight bits.
    """
    s = torch.arange(mask.shape[1], device=mask.device)
    columns = torch.stack([torch.ones_like(s), s % 256, s // 256], -1).float()  # [N,3]
    key = layer.key.float()
    values = torch.nn.functional.pad(columns, (0, key.shape[-1] - 3)).expand_as(key)
    out, _ = fused_attention(layer.query.float(), key, values, layer.scale, layer.visible)
    weight, fine, coarse = out[..., :3].unbind(-1)  # [B,H,N] each
    distance = (weight * (s % 256) - fine) + 256 * (weight * (s // 256) - coarse)
    return (distance.double() * mask[:, None]).sum((0, 2)).float() / mask.sum()


def streamed_waad(heads: ChosenHeads, mask: Tensor, window: int = 10) -> Tensor:
    """Eq. 9 of each chosen head, from the band t-s < window. Returns [B,heads,N]."""
    near = torch.zeros(len(mask), _count(heads), mask.shape[1], device=mask.device)
    for which, rows, _, back, attention in _band_blocks(heads, mask, reach=window - 1):
        near[:, which, rows] = (attention * (window - back).clamp(0, window)).sum(-1)
    return torch.where(mask[:, None], window - near, 0.0)


def streamed_fai(heads: ChosenHeads, mask: Tensor, horizon: tuple[int, int | None] = (10, 100)) -> Tensor:
    """Eq. 10 of each chosen head: column sums of the band or, where the horizon has no end, of all rows less the band.

    Returns [B,heads,N].
    """
    low, high = horizon
    nearest, farthest = (0, low - 1) if high is None else (low, high)  # of the band, in tokens back
    band = torch.zeros(len(mask), _count(heads), mask.shape[1], device=mask.device)
    for which, rows, columns, back, attention in _band_blocks(heads, mask, reach=farthest):
        looks = (back >= nearest) & (back <= farthest) & mask[:, rows, None]  # [B,rows,columns]
        band[:, which, columns] += (attention * looks[:, None]).sum(2)
    received = _column_sums(heads, mask) - band if high is None else band

    n = mask.shape[1]
    s = torch.arange(n, device=mask.device)
    rows_before = torch.nn.functional.pad(mask.cumsum(1), (1, 0))  # [B,N+1], response rows before each place
    last = (s + (n if high is None else high)).clamp(max=n - 1)
    looking = rows_before[:, last + 1] - rows_before[:, (s + low).clamp(max=n)]  # [B,N], rows of T(s)
    mean = received.clamp(min=0) / looking.clamp(min=1)[:, None]
    return torch.where((mask & (looking > 0))[:, None], mean, 0.0)


def _column_sums(heads: ChosenHeads, mask: Tensor) -> Tensor:
    """What each token receives from all response rows, in each chosen head. [B,heads,N]

    The output is A V, so the gradient of the response rows' outputs with respect to V is the column sums of A: one
    fused backward pass, in linear memory.
    """
    sums = []
    for layer, chosen in heads:
        if not chosen.any():  # the fused kernel dies of an empty batch
            continue
        query, key = (x.float() for x in _of_heads(layer, chosen.nonzero()[:, 0]))
        with torch.enable_grad():
            value = torch.zeros_like(key, requires_grad=True)
            out, _ = fused_attention(query, key, value, layer.scale, layer.visible)
            upstream = torch.zeros_like(out)
            upstream[..., 0] = mask[:, None]
            (gradient,) = torch.autograd.grad(out, value, upstream)
        sums.append(gradient[..., 0])
    return torch.cat(sums, 1)


def _count(heads: ChosenHeads) -> int:
    return sum(int(chosen.sum()) for _, chosen in heads)


def _of_heads(layer: Recorded, index: Tensor, rows=slice(None), columns=slice(None)) -> tuple[Tensor, Tensor]:
    """Queries [B,heads,rows,D] of the heads numbered index, and for each of them its keys [B,heads,columns,D]."""
    group = layer.query.shape[1] // layer.key.shape[1]  # query heads that share a key head
    return layer.query[:, :, rows][:, index], layer.key[:, :, columns][:, index // group]


def _band_blocks(heads: ChosenHeads, mask: Tensor, reach: int) -> Iterator[tuple[slice, slice, slice, Tensor, Tensor]]:
    """The maps of the chosen heads as blocks of rows, each with the columns up to `reach` tokens before its rows.

    Yields (which of the chosen heads, rows, columns, t-s [rows,columns], A [B,heads,rows,columns]) from the first
    response row on. A is 0 where s > t.
    """
    n, first = mask.shape[1], int(mask.any(0).int().argmax())
    height = max(64, min(reach, 512))  # the band's width, so half of a block counts; 512 at most: linear memory
    begin = 0
    for layer, chosen in heads:
        index = chosen.nonzero()[:, 0]  # waits for the GPU, so once a layer and not once a block
        which, lse = slice(begin, begin + len(index)), layer.lse[:, index, :, None]
        begin = which.stop
        if not len(index):
            continue
        for top in range(first, n, height):
            rows, columns = slice(top, min(top + height, n)), slice(max(0, top - reach), min(top + height, n))
            t, s = (torch.arange(x.start, x.stop, device=mask.device) for x in (rows, columns))
            back = t[:, None] - s
            query, key = _of_heads(layer, index, rows, columns)  # copies of a block, never of all N
            seen = back >= 0 if layer.visible is None else layer.visible[:, :, rows, columns]
            with torch.autocast(query.device.type, enabled=False):  # a trainer's: eight bits are too few here
                scores = (query.float() @ key.float().mT).mul_(layer.scale).sub_(lse[:, :, rows])
            yield which, rows, columns, back, scores.masked_fill_(~seen, -torch.inf).exp_()
