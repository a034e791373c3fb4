"""The two signals of a token that the credit is made from (Eq. 9-10), as definitions and then without attention maps.

WAAD, windowed average attention distance: how far back token t looks, distances above W = 10 counting as W.
FAI, future attention influence: how much later tokens, 10 to 100 places after token s, look at it.

Row t of an attention map A belongs to the position whose input is token t. (The logits at that position predict token
t+1.)

This file has four parts:

    1. waad, fai: the definitions, on full maps [N,N]. Short and slow; the tests compare all else with them.
    2. observe, measure_heads: what a trainer calls: four numbers per token from one forward pass; the head split.
       softmax_layers: finds the layers to look at, and checks a model before its numbers are trusted.
    3. streamed_waad, streamed_fai, streamed_spans: the same without any map, in memory that is linear in N.
    4. right_padding: for batches that are padded on the left.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from attention import Recorded, attend, attention_maps, choose_heads, map_block, recording, row_sums
from grpo import check_logits, micro_batches, token_logprobs
from heads import Heads, layer_range, split_heads

# ---- 1. The definitions ----


def waad(local_map: Tensor, mask: Tensor, window: int = 10) -> Tensor:
    """Eq. 9: WAAD_t = sum over s <= t of A[t,s] min(t-s, W). From 0 to W tokens.

    local_map [B,N,N] (row t, column s), the mean map of the local heads; mask [B,N] bool, the response tokens. Returns
    [B,N], 0 outside the mask.

    >>> waad(torch.tensor([[[1.0, 0.0], [0.25, 0.75]]]), torch.tensor([[False, True]]))
    tensor([[0.0000, 0.2500]])
    """
    t = torch.arange(mask.shape[1], device=mask.device)
    distance = (t[:, None] - t).clamp(0, window)  # [N,N], min(t-s, W)
    return torch.where(mask, (local_map.float() * distance).sum(-1), 0.0)


def fai(global_map: Tensor, mask: Tensor, horizon: tuple[int, int | None] = (10, 100)) -> Tensor:
    """Eq. 10: FAI_s = mean of A[t,s] over the response rows t from s+H_lo to s+H_hi.

    global_map [B,N,N], the mean map of the global heads; mask [B,N] bool; horizon (H_lo, H_hi), where H_hi = None means
    the end of the response. Returns [B,N], 0 outside the mask and for the last H_lo tokens, which no such row looks at.

    >>> fai(torch.tensor([[[1.0, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5]]]), torch.tensor([[False, True, True]]), (1, 9))
    tensor([[0.0000, 0.3000, 0.0000]])
    """
    t = torch.arange(mask.shape[1], device=mask.device)
    distance = t[:, None] - t  # [N,N], t - s
    low, high = horizon[0], mask.shape[1] if horizon[1] is None else horizon[1]
    looks = (distance >= low) & (distance <= high) & mask[:, :, None]  # [B,N,N], whether row t counts for column s
    received = torch.where(looks, global_map.float(), 0.0).sum(1)  # [B,N]
    return torch.where(mask, received / looks.sum(1).clamp(min=1), 0.0)


# ---- 2. What a trainer calls ----


class Signals(NamedTuple):
    """What one forward pass says about each response token: [B,N] float32, 0 outside the mask."""

    logprobs: Tensor  # log pi_old of the token
    entropy: Tensor  # nats, of the distribution the token was drawn from
    waad: Tensor
    fai: Tensor
    heads: Heads | None  # the split that WAAD and FAI were taken with; None: they were not computed and are 0


def observe(
    model,
    input_ids: Tensor,
    mask: Tensor,
    heads: Heads | None = None,
    window: int = 10,
    horizon: tuple[int, int | None] = (10, 100),
    attention_mask: Tensor | None = None,
    score: Callable[..., tuple[Tensor, Tensor]] = token_logprobs,
    position_ids: Tensor | None = None,
) -> Signals:
    """One forward pass without gradient: log pi_old, entropy, WAAD and FAI of each response token. No map is made.

    How it works: `score` runs the model's forward pass. Meanwhile `recording` makes the chosen layers keep their
    queries, keys and log-sum-exp (attention.py). From these, streamed_waad and streamed_fai compute the two signals.

    Args:
        input_ids: [B,N], padded on the right, or on any side if attention_mask is given.
        mask: [B,N] bool, the response tokens.
        heads: the split to use, Signals.heads of an earlier call. None measures it on this batch first, by one more
            pass. Keep it for about ten steps.
        attention_mask: [B,N], 1 for real tokens. The signals are returned in the original columns.
        score: makes the pass over right-padded rows, score(model, input_ids, mask, entropy=True), and returns
            (logprobs, entropy). A trainer with its own way to log-probs gives that.
        position_ids: [B,N], only looked at, to refuse packed rows.

    The caller must
        - switch dropout off: model.eval();
        - use one split on all ranks: average Heads.spans over the ranks, then split_heads;
        - with FSDP2, call model.reshard() before making an optimizer or a state dict, because a pass without gradient
          leaves the root's weights gathered.

    Raises ValueError for a mask that is not bool, for an attention_mask with holes, for rows that hold several samples
    (packed rows, whose position ids start again), for a model whose attention cannot be recorded (softmax_layers says
    what is checked, once per model), and for heads that were measured on a batch without response tokens.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype}: it has to be bool, true on response tokens. Pass mask.bool()")
    if attention_mask is not None:
        places = right_padding(attention_mask, mask)
        shifted_ids, shifted_mask = input_ids.gather(1, places), mask.gather(1, places)
        shifted_positions = None if position_ids is None else position_ids.expand_as(input_ids).gather(1, places)
        *shifted, heads = observe(
            model, shifted_ids, shifted_mask, heads, window, horizon, score=score, position_ids=shifted_positions
        )
        back = [torch.zeros(mask.shape, device=mask.device).scatter(1, places, x) for x in shifted]
        return Signals(*back, heads)

    refuse_packed_rows(position_ids, mask)
    softmax_layers(model, input_ids, score)
    if heads is None:
        heads = measure_heads(model, input_ids, mask, score=score)
    elif not heads.spans.isfinite().all():
        raise ValueError("heads were measured on a batch without response tokens: measure them on another, heads=None")

    with torch.no_grad():
        with recording(model, heads.layers) as recorded:
            logprobs, entropy = score(model, input_ids, mask, entropy=True)
        refuse_packed_rows(recorded[heads.layers[0]].position_ids, mask)
        local_heads = [(recorded[layer], chosen) for layer, chosen in zip(heads.layers, heads.is_local)]
        global_heads = [(recorded[layer], chosen) for layer, chosen in zip(heads.layers, heads.is_global)]
        # Eq. 8 averages the maps over a group of heads. WAAD and FAI are linear in the map, so averaging them over the
        # heads instead gives the same numbers.
        mean_waad = streamed_waad(local_heads, mask, window).mean(1)  # [B,heads,N] -> [B,N]
        mean_fai = streamed_fai(global_heads, mask, horizon).mean(1)
    return Signals(logprobs, entropy, mean_waad, mean_fai, heads)


def measure_heads(
    model,
    input_ids: Tensor,
    mask: Tensor,
    layers: list[int] | str = "middle",
    quantile: float = 0.3,
    micro_tokens: int | None = None,
    score: Callable[..., tuple[Tensor, Tensor]] = token_logprobs,
) -> Heads:
    """Eq. 7 and the split, measured on a batch of right-padded rows: forward passes without gradient, no map.

    layers: the sampled layers, as numbers; or the part of the model to take five from, see heads.layer_range. Only
    layers with softmax attention count: of a hybrid model with 12 of them, "middle" takes five of the 5th to 9th.
    quantile: the share of heads in each group.
    micro_tokens: tokens in one pass, padding included (default: the whole batch in one pass).

    Raises ValueError for a model whose attention cannot be recorded, and for sampled layers with different numbers of
    heads.
    """
    if isinstance(layers, str):
        with_softmax = softmax_layers(model, input_ids, score)
        layers = [with_softmax[i] for i in layer_range(len(with_softmax), layers)]
    passes = [(torch.arange(len(mask), device=mask.device), mask.shape[1])]
    if micro_tokens is not None:
        passes = micro_batches(mask, passes[0][0], micro_tokens)

    spans = 0.0  # [layers,H], the mean over the response tokens of all passes
    for rows, width in passes:
        ids, response = input_ids[rows, :width], mask[rows, :width]
        with torch.no_grad(), recording(model, layers) as recorded:
            score(model, ids, response, entropy=True)
        counts = [recorded[layer].query.shape[1] for layer in layers]
        if len(set(counts)) > 1:
            raise ValueError(
                f"layers {layers} have {counts} heads: spans are compared between layers with equally many"
            )
        of_this_pass = torch.stack([streamed_spans(recorded[layer], response) for layer in layers])
        spans = spans + of_this_pass * response.sum() / mask.sum()
    return Heads(layers, spans, *split_heads(spans, quantile))


def refuse_packed_rows(position_ids: Tensor | None, mask: Tensor) -> None:
    """ValueError for a row of several samples: one whose positions start again before its last response token.

    FAI would count rows of the next sample, and gamma would compare tokens of different responses.
    position_ids: [B or 1,N], or None; other shapes, such as the three of vision models, are not looked at.
    """
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] != mask.shape[1]:
        return
    starts_again = position_ids[:, 1:] < position_ids[:, :-1]  # [B or 1,N-1]
    is_before_a_response = mask.flip(1).int().cummax(1).values.flip(1).bool()[:, 1:]  # [B,N-1]
    if (starts_again & is_before_a_response).any():
        raise ValueError(
            "a row holds several samples, because its position_ids start again (packed rows): WAAD and FAI need one "
            "sample a row. Give observe() each sample as a row of its own, padded on the right"
        )


_softmax_layers: WeakKeyDictionary = WeakKeyDictionary()  # of each model that was checked


def softmax_layers(model, input_ids: Tensor, score: Callable = token_logprobs) -> list[int]:
    """The numbers of the model's layers with softmax attention, found in a pass over a few tokens.

    The first call for a model also checks what WAAD and FAI rely on, in a few short passes. It raises ValueError
    unless

        - token_logprobs gives the log-probs of the model's own logits;
        - no token's distribution depends on the tokens after it;
        - the model computes the same while it is recorded;
        - each row of a recorded map sums to 1, or with a sink to a little less.
    """
    inner = getattr(model, "module", model)  # DDP's own model
    if inner in _softmax_layers:
        return _softmax_layers[inner]
    name = type(inner).__name__
    if score is token_logprobs:
        check_logits(model)

    # Three passes over the start of the first row: over half of it, over all of it, and over all of it recorded.
    ids = input_ids[:1, :64]
    mask = (torch.arange(ids.shape[1], device=ids.device) > 0)[None]
    half = ids.shape[1] // 2 + 1
    with torch.no_grad():
        _, half_entropy = score(model, ids[:, :half], mask[:, :half], entropy=True)
        own_logprobs, own_entropy = score(model, ids, mask, entropy=True)
        with recording(model) as recorded:
            logprobs, entropy = score(model, ids, mask, entropy=True)

    # Compare them.
    exact = all(layer.query.dtype == torch.float32 for layer in recorded.values())
    tolerance = 1e-2 if exact else 0.3  # two ways to compute a log-prob differ by so much in bfloat16
    if (own_entropy[:, :half] - half_entropy).abs().max() > tolerance:
        raise ValueError(
            f"{name}: a token's distribution depends on the tokens after it, so the model is not causal, or dropout is "
            "on (call model.eval())"
        )
    apart = torch.stack([own_logprobs - logprobs, own_entropy - entropy]).abs().max()
    if apart > tolerance:
        raise ValueError(
            f"{name} does something in its attention that attention.recording does not know: log-probs differ by "
            f"{apart:.2g} with it. If dropout is on, call model.eval(); else use --credit uniform, entropy, forking or "
            "random"
        )

    # The recorded rows, whole: the passes are short enough for full maps.
    for number, layer in recorded.items():
        every_head = torch.arange(layer.query.shape[1], device=ids.device)
        wrong = (attention_maps(layer).sum(-1) - row_sums(layer, every_head)).abs().max()
        if wrong > 0.05:
            raise ValueError(
                f"{name}, layer {number}: rows of attention, from its queries, keys and log-sum-exp, sum to 1 ± "
                f"{wrong:.2g}. The kernel returns another log-sum-exp: use the pinned torch, or --credit uniform"
            )
    _softmax_layers[inner] = sorted(recorded)
    return _softmax_layers[inner]


# ---- 3. The same without maps ----
#
# Which entries of A are needed?
#
#           column s ->                  w: t - s < W               WAAD reads these W entries of row t
#     row   w . . . . . . .              f: H_lo <= t - s <= H_hi   FAI averages these entries of column s
#      t    w w . . . . . .
#      |    w w w . . . . .              (in the picture W = 3, H_lo = 3, H_hi = 4)
#      v    f w w w . . . .
#           f f w w w . . .              Everything lies in a band along the diagonal. With the log-sum-exp Z_t of
#           . f f w w w . .              row t, each entry of the band is exp(q_t . k_s * scale - Z_t). The band has
#           . . f f w w w .              N * (H_hi + 1) entries instead of N * N.
#           . . . f f w w w
#
# FAI only looks at the band. WAAD looks at the whole row, but far entries all count alike, W each, and a row sums to 1:
#
#     min(d, W) = W - max(W - d, 0)
#     WAAD_t = sum_s A[t,s] min(t-s, W) = W sum_s A[t,s] - sum_s A[t,s] max(W - (t-s), 0)
#            = W - sum over t-s < W of (W - (t-s)) A[t,s]
#
# So the last W columns are enough. (With attention sinks, as in gpt-oss, a row sums to less: row_sums knows to what.)
# A span needs the whole row. One more attention call computes it, with positions as values: see streamed_spans.

ChosenHeads = list[tuple[Recorded, Tensor]]  # recorded layers, each with the heads to look at, [H] bool


class Block(NamedTuple):
    """A rectangle of the band: some rows of the maps of one layer's chosen heads."""

    heads: slice  # which of all chosen heads
    rows: slice
    columns: slice
    distance: Tensor  # [rows,columns], t - s
    attention: Tensor  # [B,heads,rows,columns], A; 0 where s > t
    row_sum: Tensor  # [B,heads,rows], the sum of each whole row: 1, or with sinks less


def streamed_waad(heads: ChosenHeads, mask: Tensor, window: int = 10) -> Tensor:
    """Eq. 9 of each chosen head, from the band t - s < W. Returns [B,heads,N]."""
    result = torch.zeros(len(mask), _count(heads), mask.shape[1], device=mask.device)
    for block in _band_blocks(heads, mask, reach=window - 1):
        weight = (window - block.distance).clamp(0, window)  # W - (t-s)
        result[:, block.heads, block.rows] = window * block.row_sum - (block.attention * weight).sum(-1)
    return torch.where(mask[:, None], result, 0.0)


def streamed_fai(heads: ChosenHeads, mask: Tensor, horizon: tuple[int, int | None] = (10, 100)) -> Tensor:
    """Eq. 10 of each chosen head. Returns [B,heads,N]."""
    low, high = horizon
    if high is None:
        received = _received_to_the_end(heads, mask, low)
    else:
        received = _received_in_band(heads, mask, low, high)

    # How many response rows look at token s: those from s + low to s + high.
    n = mask.shape[1]
    s = torch.arange(n, device=mask.device)
    rows_before = torch.nn.functional.pad(mask.cumsum(1), (1, 0))  # [B,N+1]; [:, i] = response rows among 0 .. i-1
    first = (s + low).clamp(max=n)
    end = (s + (n if high is None else high) + 1).clamp(max=n)
    looking = rows_before[:, end] - rows_before[:, first]  # [B,N]

    received = received.clamp(min=0)  # a difference in _received_to_the_end can be -1e-8
    mean = received / looking.clamp(min=1)[:, None]
    return torch.where((mask & (looking > 0))[:, None], mean, 0.0)


def _received_in_band(heads: ChosenHeads, mask: Tensor, low: int, high: int) -> Tensor:
    """The attention that each token gets from the response rows low to high places after it. [B,heads,N]"""
    received = torch.zeros(len(mask), _count(heads), mask.shape[1], device=mask.device)
    for block in _band_blocks(heads, mask, reach=high):
        in_band = (block.distance >= low) & (block.distance <= high)  # [rows,columns]
        looks = in_band & mask[:, block.rows, None]  # [B,rows,columns]
        received[:, block.heads, block.columns] += (block.attention * looks[:, None]).sum(2)
    return received


def _received_to_the_end(heads: ChosenHeads, mask: Tensor, low: int) -> Tensor:
    """The attention that each token gets from all response rows at least `low` places after it. [B,heads,N]

    It is what the token gets from all response rows, minus what it gets from the band t - s < low. The first is a
    column sum of A. Since the output is A V, a column sum is the gradient of the response rows' outputs with respect
    to V: one fused backward pass, in linear memory.
    """
    column_sums = []
    for layer, chosen in heads:
        if not chosen.any():  # the fused kernel crashes on an empty batch
            continue
        if layer.softcap is not None:  # no fused kernel: take whole rows, in blocks
            column_sums.append(_received_in_band([(layer, chosen)], mask, 0, mask.shape[1]))
            continue
        few = choose_heads(layer, chosen.nonzero()[:, 0])
        few = few._replace(query=few.query.float(), key=few.key.float())
        with torch.enable_grad():
            value = torch.zeros_like(few.key, requires_grad=True)
            out, _ = attend(few, value)
            upstream = torch.zeros_like(out)
            upstream[..., 0] = mask[:, None]
            (gradient,) = torch.autograd.grad(out, value, upstream)
        column_sums.append(gradient[..., 0])  # [B,heads of this layer,N]
    return torch.cat(column_sums, 1) - _received_in_band(heads, mask, 0, low - 1)


def streamed_spans(layer: Recorded, mask: Tensor) -> Tensor:
    """Eq. 7 of each head of a layer, by one more fused attention call whose values are positions. Returns [H] float32.

    The mean distance of row t is sum_s A[t,s] (t - s) = t sum_s A[t,s] - sum_s A[t,s] s. Both sums are attention
    outputs: with values 1 and with values s. They come from the same call, so rounding errors in the weights cancel.

    At position 32,768 float32 numbers are 1/256 apart, too coarse for a mean distance of a few tokens. So a position
    is written as s = 256 coarse + fine, and both parts are averaged separately. Queries and keys go in as float32, or
    the averages would have the eight bits of bfloat16.
    """
    s = torch.arange(mask.shape[1], device=mask.device)
    fine, coarse = s % 256, s // 256
    values = torch.stack([torch.ones_like(s), fine, coarse], -1).float()  # [N,3]
    query, key = layer.query.float(), layer.key.float()
    out, _ = attend(layer._replace(query=query, key=key), values.expand(*key.shape[:3], 3))
    weight, mean_fine, mean_coarse = out.unbind(-1)  # [B,H,N] each
    distance = (weight * fine - mean_fine) + 256 * (weight * coarse - mean_coarse)
    return (distance.double() * mask[:, None]).sum((0, 2)).float() / mask.sum()


def _band_blocks(heads: ChosenHeads, mask: Tensor, reach: int) -> Iterator[Block]:
    """The band t - s <= reach of the chosen heads' maps, in blocks of rows, from the first response row on."""
    n, first_row = mask.shape[1], int(mask.any(0).int().argmax())
    # Rows of a block: as many as the band is wide; at least 64, to have few blocks; at most 512, to bound memory.
    height = max(64, min(reach, 512))
    first_head = 0
    for layer, chosen in heads:
        index = chosen.nonzero()[:, 0]  # waits for the GPU, so once per layer and not once per block
        if not len(index):
            continue
        of_layer = slice(first_head, first_head + len(index))
        first_head = of_layer.stop
        for top in range(first_row, n, height):
            rows = slice(top, min(top + height, n))
            columns = slice(max(0, top - reach), rows.stop)
            t = torch.arange(rows.start, rows.stop, device=mask.device)
            s = torch.arange(columns.start, columns.stop, device=mask.device)
            attention = map_block(layer, index, rows, columns)
            yield Block(of_layer, rows, columns, t[:, None] - s, attention, row_sums(layer, index, rows))


def _count(heads: ChosenHeads) -> int:
    return sum(int(chosen.sum()) for _, chosen in heads)


# ---- 4. Padding ----


def right_padding(attention_mask: Tensor, mask: Tensor) -> Tensor:
    """Column numbers that move the padding of each row to the right: x.gather(1, right_padding(...)).

    attention_mask [B,N], 1 for real tokens; mask [B,N] bool. Returns [B, longest row].

    >>> right_padding(torch.tensor([[0, 0, 1, 1, 0], [0, 1, 1, 1, 0]]), torch.zeros(2, 5, dtype=torch.bool))
    tensor([[2, 3, 4],
            [1, 2, 3]])
    """
    real = attention_mask.bool()
    if (mask & ~real).any():
        raise ValueError("mask marks a response token where attention_mask is 0")
    n, first_real = real.shape[1], real.int().argmax(1, keepdim=True)
    places = (first_real + torch.arange(n, device=real.device)) % n
    shifted = real.gather(1, places)
    if (shifted[:, 1:] & ~shifted[:, :-1]).any():
        raise ValueError("attention_mask has a hole, a 0 between 1s: a row's real tokens must lie side by side")
    return places[:, : int(real.sum(1).max())]
