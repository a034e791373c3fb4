"""Does the rhythm exist? Peaks of WAAD, FAI and entropy, and how often they fall together (the paper's Table 2).

Every link asks one question: what is the mean of some value at peaks, against the same number of random positions?

    observed   mean of the value at the peaks of all responses
    random     what it is on average when each response's peaks are thrown on its own eligible positions; exact
    lift       observed / random - 1
    intervals  95 %, bootstrap over problems
    p          one-sided: share of 2,000 random throws that reach the observed value (SciPy's permutation_test knows no
               strata, and peaks must stay in their response, so the throws are made here)
    p shifted  the same for circular shifts: all peaks of a response move by the same number of places, so they keep
               their distances. Random throws break what two smooth curves have in common by being smooth.

The paper does not say what a peak is. Ours: a local maximum, not at an end, that stands out by half a standard
deviation: its random rates come near the paper's (22 % and 37 %), and a trend along the response, which position alone
brings about, makes no peaks. FAI reaches to the end of the response here, as in the paper's analysis; the last H_lo
tokens have none.
"""

from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from scipy.signal import find_peaks
from torch import Tensor

from attention import recording
from grpo import micro_batches, token_logprobs
from heads import split_heads
from lab import sinks
from lab.stats import Clusters
from metrics import streamed_fai, streamed_spans, streamed_waad
from node import precision

H_LO = 10
LINKS = (
    "entropy at WAAD peaks",
    "entropy after WAAD peaks",
    "receiver peaks that are FAI peaks",
    "the same, receivers outside H_glob",
    "FAI peaks at or after WAAD peaks",
)

Response = dict[str, np.ndarray]  # series by name, each [T] float64, one response; NaN where it is not defined


class PerHead(NamedTuple):
    """The signals of every head by itself, so that any group's are a mean over heads."""

    waad: Tensor  # [heads,B,N]
    fai: Tensor  # [heads,B,N]
    spans: Tensor  # [heads]
    entropy: Tensor  # [B,N]
    mask: Tensor  # [B,N]
    first: Tensor | None = None  # [heads], the share of a response row's attention that lies on the first token


def per_head(
    model, input_ids: Tensor, mask: Tensor, layers: list[int], tokens: int = 2048,
    horizon: tuple[int, int | None] = (H_LO, None), drop_first: bool = False, by_norm: bool = False,
    dtype: str = "auto",
) -> PerHead:  # fmt: skip
    """WAAD, FAI (by default to the end of the response) and span of every head of the layers, in passes of `tokens`.

    drop_first: without the first token's column, rows renormalised. by_norm: FAI, and the share of the first token,
    with each column weighted by the norm of what it gives, ||W_O v|| (lab/sinks.py).
    """
    every_head = torch.ones(model.config.get_text_config().num_attention_heads, dtype=torch.bool, device=mask.device)
    waad, fai = torch.zeros(2, len(layers) * len(every_head), *mask.shape)
    entropy, (spans, first) = torch.zeros(mask.shape), torch.zeros(2, len(waad))
    passes = precision.autocast(precision.choose_dtype(dtype, model.config), mask.device)
    for index, n in micro_batches(mask, torch.arange(len(mask), device=mask.device), tokens):
        part = mask[index, :n]
        weighing = sinks.recording_norms(model, layers) if by_norm else nullcontext()
        with torch.no_grad(), recording(model, layers) as recorded, weighing as norms, passes:
            uncertainty = token_logprobs(model, input_ids[index, :n], part, entropy=True)[1]
        index = index.cpu()
        entropy[index, :n] = uncertainty.cpu()
        weight = part.sum() / mask.sum()
        on_first = [
            sinks.taken_from_first(recorded[layer], norms[layer]) if by_norm else sinks.on_first(recorded[layer])
            for layer in layers
        ]
        first += torch.cat([(share * part[:, None]).sum((0, 2)) / mask.sum() for share in on_first]).cpu()
        looks, cut = [recorded[layer] for layer in layers], int(drop_first)
        if drop_first:
            looks, part = [sinks.without_first(layer) for layer in looks], part[:, 1:]
        heads = [(layer, every_head) for layer in looks]
        waad[:, index, cut:n] = streamed_waad(heads, part).transpose(0, 1).cpu()
        received = streamed_fai(heads, part, horizon)  # [B,heads,N]
        if by_norm:
            received = received * torch.cat([norms[layer][..., cut:] for layer in layers], 1)
        fai[:, index, cut:n] = received.transpose(0, 1).cpu()
        spans += torch.cat([weight * streamed_spans(layer, part) for layer in looks]).cpu()
    return PerHead(waad, fai, spans, entropy, mask.cpu(), first)


def receiver_heads(looks: PerHead, size: int, among: Tensor | None = None) -> Tensor:
    """The heads whose received attention is concentrated on few tokens, [heads] bool (Bogdan et al. 2025).

    Ranked by the kurtosis of a head's FAI over a response, mean over responses; `among` leaves heads out.
    """
    rows = [looks.fai[:, b, m][:, :-H_LO].numpy() for b, m in enumerate(looks.mask) if m.sum() >= H_LO + 4]
    kurtosis = np.nanmean([np.nan_to_num(stats.kurtosis(r, axis=1)) for r in rows], 0) if rows else looks.spans * 0.0
    rank = torch.as_tensor(kurtosis)
    if among is not None:
        rank = rank.masked_fill(~among, -torch.inf)
    return torch.zeros_like(looks.spans, dtype=torch.bool).index_fill(0, rank.topk(size).indices, True)


def responses_of(looks: PerHead, quantile: float = 0.3) -> tuple[list[Response], float]:
    """The series of each response under a head split; and the share of receiver heads that lie in H_glob."""
    is_local, is_global = split_heads(looks.spans, quantile)
    size = int(is_global.sum())
    receivers, others = receiver_heads(looks, size), receiver_heads(looks, size, ~is_global)
    whole = {
        "WAAD": looks.waad[is_local].mean(0),
        "FAI": looks.fai[is_global].mean(0),
        "receiver FAI": looks.fai[receivers].mean(0),
        "other receiver FAI": looks.fai[others].mean(0),
        "entropy": looks.entropy,
    }
    cut = [{name: x[b, m].double().numpy() for name, x in whole.items()} for b, m in enumerate(looks.mask)]
    for one in cut:
        for name in ("FAI", "receiver FAI", "other receiver FAI"):
            one[name][-H_LO:] = np.nan
    return cut, (receivers & is_global).sum().item() / size


def peaks(x: np.ndarray) -> np.ndarray:
    """Where x [T] has peaks: 1, elsewhere 0, and NaN where none can be (the ends of its defined part and beyond).

    >>> peaks(np.array([5.0, 1.0, 2.0, 1.0, 0.0, np.nan]))
    array([nan,  0.,  1.,  0., nan, nan])
    """
    defined = x[~np.isnan(x)]
    out = np.full(len(x), np.nan)
    if len(defined) >= 3:
        out[1 : len(defined) - 1] = 0
        out[find_peaks(defined, prominence=defined.std() / 2)[0]] = 1
    return out


def ahead(x: np.ndarray, offset: int) -> np.ndarray:
    """x[t + offset] at t; NaN where there is none.

    >>> ahead(np.array([1.0, 2.0, 3.0]), 1), ahead(np.array([1.0, 2.0, 3.0]), -1)
    (array([ 2.,  3., nan]), array([nan,  1.,  2.]))
    """
    out = np.full(len(x), np.nan)
    t = np.arange(max(0, -offset), min(len(x), len(x) - offset))
    out[t] = x[t + offset]
    return out


def questions(response: Response) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """For each of LINKS: the value at every token, and the peaks at which it is asked for."""
    top = {name: peaks(x) for name, x in response.items()}
    asked = [
        (response["entropy"], top["WAAD"]),
        (ahead(response["entropy"], 1), top["WAAD"]),
        (top["FAI"], top["receiver FAI"]),
        (top["FAI"], top["other receiver FAI"]),
        (np.fmax(top["WAAD"], ahead(top["WAAD"], -1)), top["FAI"]),
    ]
    return dict(zip(LINKS, asked))


def eligible(value: np.ndarray, peak: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The value, and whether there is a peak, at the places where both are defined."""
    both = ~np.isnan(value) & ~np.isnan(peak)
    return value[both], peak[both] > 0


def totals(asked: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Of each response: sum of the value at its peaks, what random positions give on average, number of peaks. [3,B]"""
    both = [eligible(*one) for one in asked]
    rows = [(value[peak].sum(), peak.sum() * value.mean() if peak.any() else 0.0, peak.sum()) for value, peak in both]
    return np.array(rows, dtype=float).T


def throws(asked: list[tuple[np.ndarray, np.ndarray]], count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` times, the sum of the value when each response's peaks fall on random eligible positions. [count]"""
    total = np.zeros(count)
    for value, peak in (eligible(*one) for one in asked):
        if size := int(peak.sum()):
            where = rng.random((count, len(value))).argpartition(size - 1, axis=1)[:, :size]
            total += value[where].sum(1)
    return total


def shifts(asked: list[tuple[np.ndarray, np.ndarray]], count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` times, the sum of the value when each response's peaks are all shifted by one random number. [count]"""
    total = np.zeros(count)
    for value, peak in (eligible(*one) for one in asked):
        if peak.any():
            by_shift = np.array([value[np.roll(peak, s)].sum() for s in range(len(value))])
            total += by_shift[rng.integers(len(value), size=count)]
    return total


def link(asked: list[tuple[np.ndarray, np.ndarray]], draws: int = 2000, seed: int = 0) -> dict:
    """One line of Table 2: random, observed, lift as [value, low, high], both p, and the number of peaks."""
    rng = np.random.default_rng(seed)
    hits, expected, count = totals(asked)
    if not expected.sum() > 0:
        return {"random": [0.0] * 3, "observed": [0.0] * 3, "lift": [0.0] * 3, "p": 1.0, "p shifted": 1.0, "peaks": 0}
    problems = Clusters(np.arange(len(asked)), draws)
    lift = [x - 1 for x in problems.ratio(hits, expected)[:3]]
    random, observed = (problems.ratio(x, count)[:3] for x in (expected, hits))
    out = {"random": [*random], "observed": [*observed], "lift": lift}
    for name, null in (("p", throws), ("p shifted", shifts)):
        reached = null(asked, draws, rng) >= hits.sum() * (1 - 1e-12)
        out[name] = float((1 + reached.sum()) / (1 + draws))
    return out | {"peaks": int(count.sum())}


def table(responses: list[Response], draws: int = 2000) -> dict[str, dict]:
    """Table 2: each of LINKS with its random, observed, lift and p."""
    asked = [questions(r) for r in responses]
    return {name: link([a[name] for a in asked], draws) for name in LINKS}
