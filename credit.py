"""gamma_t: the factor on each token's advantage (Eq. 14-19). Three credits by attention, and controls.

A preplan token is a token just before WAAD jumps, up or down, a member of T_loc. An anchor is a token with high FAI, a
member of T_glob: later tokens keep looking at it. The credits give some of these tokens gamma > 1 and all others
gamma = 1.

All functions take [B,N] tensors and mask [B,N] bool, which marks the response tokens. They look at each response alone,
except `scaled`. They return gamma [B,N] float32, which is 1 outside the mask. q is the share of tokens to credit, amp
is the paper's gamma_amp. Only torch is needed. assign_credit at the end chooses a credit by its name.

The paper leaves some things open. Our readings (coupled_rhythm explains the symbols):

    alpha = 0.5, k = 3
    tau_waad    the median WAAD of the response (of an even number, the lower of the two middle values)
    tau_delta   the smallest Delta in T_loc, so that a large Delta before an anchor means a preplan token
    intro(t)    the token with the largest Delta among the k tokens before t; the nearest one on a tie
    TopQ        rounds up, and a tie goes to the earlier token

lowest=True credits the lowest q instead of the highest (the paper's Table 5): Delta and FAI change sign, all else
stays.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


def top_q(x: Tensor, mask: Tensor, q: float, eligible: Tensor | None = None) -> Tensor:
    """TopQ(x, q): the ceil(q * |R|) highest of each response's tokens, as a bool mask [B,N].

    Tokens that are not eligible are never chosen. If too few are eligible, all of these are chosen.

    >>> top_q(torch.tensor([[9.0, 1.0, 3.0, 3.0, 2.0]]), torch.tensor([[False, True, True, True, True]]), q=0.25)
    tensor([[False, False,  True, False, False]])
    """
    if not 0 <= q <= 1:
        raise ValueError(f"q = {q}: the share of tokens to credit lies from 0 to 1")
    eligible = mask if eligible is None else mask & eligible
    order = x.float().masked_fill(~eligible, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)  # [B,N], 0 for the highest
    # 1e-6: 0.55 * 100 is 55.00000000000001 and must not round up to 56.
    size = torch.tensor([math.ceil(q * n - 1e-6) for n in mask.sum(1).tolist()], device=x.device)
    return eligible & (rank < size[:, None])


def waad_change(waad: Tensor, mask: Tensor) -> Tensor:
    """Eq. 14: Delta_t = |WAAD_t - WAAD_{t+1}|, 0 at a response's last token. [B,N]

    So a jump of WAAD between two tokens is written at the first of them, the token before the jump.

    >>> waad_change(torch.tensor([[7.0, 1.0, 4.0, 4.5]]), torch.tensor([[False, True, True, True]]))
    tensor([[0.0000, 3.0000, 0.5000, 0.0000]])
    """
    delta = torch.zeros_like(waad)
    delta[:, :-1] = (waad[:, :-1] - waad[:, 1:]).abs() * (mask[:, :-1] & mask[:, 1:])
    return delta


def local_chunk(waad: Tensor, mask: Tensor, q: float = 0.4, amp: float = 1.5, lowest: bool = False) -> Tensor:
    """Eq. 14-15: amplify T_loc, the preplan tokens: those with the largest change of WAAD to the next token."""
    delta = waad_change(waad, mask)
    t_loc = top_q(-delta if lowest else delta, mask, q)
    return 1 + (amp - 1) * t_loc


def global_anchor(fai: Tensor, mask: Tensor, q: float = 0.4, amp: float = 1.5, lowest: bool = False) -> Tensor:
    """Eq. 16-17: amplify T_glob, the tokens with the highest FAI. A token with FAI 0 is never an anchor."""
    t_glob = top_q(-fai if lowest else fai, mask, q, eligible=fai > 0)
    return 1 + (amp - 1) * t_glob


def coupled_rhythm(
    waad: Tensor,
    fai: Tensor,
    mask: Tensor,
    q: float = 0.4,
    amp: float = 1.5,
    alpha: float = 0.5,
    k: int = 3,
    lowest: bool = False,
) -> Tensor:
    """Eq. 18-19: amplify anchors. An anchor right after a preplan token shares its bonus with that token.

    The bonus of an anchor is amp - 1. An anchor t is locally dominated (t in D) if its own WAAD is low,
    WAAD_t <= tau_waad, and one of the k tokens before it has a large Delta, >= tau_delta. A dominated anchor keeps the
    share 1 - alpha of its bonus. The share alpha goes to its intro, the token with that large Delta.

        gamma_t = 1 + (amp-1) [t is an anchor, not in D] + (1-alpha)(amp-1) [t in D] + alpha (amp-1) [t is an intro]

    The brackets add up. With the defaults, an anchor that is not in D and is also an intro gets 1 + 0.5 + 0.25 = 1.75;
    one in D that is also an intro gets 1 + 0.25 + 0.25 = 1.5. An intro of several anchors gets its share once.

    >>> waad = torch.tensor([[0.0, 9.0, 1.0, 1.0, 1.0]])  # WAAD changes after token 1
    >>> fai = torch.tensor([[0.0, 0.1, 0.2, 0.9, 0.0]])  # token 3 is an anchor
    >>> coupled_rhythm(waad, fai, torch.tensor([[False, True, True, True, True]]), q=0.25)
    tensor([[1.0000, 1.2500, 1.0000, 1.2500, 1.0000]])
    """
    parts = coupled_parts(waad, fai, mask, q, k, lowest)
    undominated = parts.t_glob & ~parts.dominated
    return 1 + (amp - 1) * (undominated + (1 - alpha) * parts.dominated + alpha * parts.is_intro)


class Coupled(NamedTuple):
    """Intermediate results of coupled_rhythm: [B,N] each, the two thresholds [B,1]. With lowest, delta changes sign."""

    delta: Tensor
    t_loc: Tensor  # bool, the preplan tokens
    t_glob: Tensor  # bool, the anchors
    tau_waad: Tensor
    tau_delta: Tensor  # infinite where T_loc is empty
    dominated: Tensor  # bool, D
    intro: Tensor  # column of the largest Delta among the k tokens before, 0 if there are none; used for tokens in D
    is_intro: Tensor  # bool, I(D): the intros of all tokens in D


def coupled_parts(waad: Tensor, fai: Tensor, mask: Tensor, q: float = 0.4, k: int = 3, lowest: bool = False) -> Coupled:
    """Eq. 18: which tokens are preplan tokens, which are anchors, which anchors are dominated, and their intros."""
    if k < 1:
        raise ValueError(f"k = {k}: the intro is one of the k tokens before its anchor, so k must be 1 or more")
    sign = -1 if lowest else 1
    delta = sign * waad_change(waad, mask)
    t_loc = top_q(delta, mask, q)
    t_glob = top_q(sign * fai, mask, q, eligible=fai > 0)
    tau_delta = delta.masked_fill(~t_loc, torch.inf).amin(1, keepdim=True)
    tau_waad = waad.masked_fill(~mask, torch.nan).nanmedian(1, keepdim=True).values

    # The largest Delta among the k tokens before each token, and where it is. Nearest first: ">" keeps the nearest one
    # on a tie.
    position = torch.arange(mask.shape[1], device=mask.device)
    delta_of_response = delta.masked_fill(~mask, -torch.inf)
    peak, intro = torch.full_like(delta, -torch.inf), torch.zeros_like(mask, dtype=torch.long)
    for j in range(1, k + 1):
        delta_before = pad(delta_of_response, (j, 0), value=-torch.inf)[:, :-j]  # [B,N], Delta of token t-j
        is_larger = delta_before > peak
        peak = torch.where(is_larger, delta_before, peak)
        intro = torch.where(is_larger, position - j, intro)

    dominated = t_glob & (waad <= tau_waad) & (peak >= tau_delta)
    is_intro = torch.zeros_like(mask)
    row, anchor = dominated.nonzero(as_tuple=True)
    is_intro[row, intro[row, anchor]] = True
    return Coupled(delta, t_loc, t_glob, tau_waad, tau_delta, dominated, intro, is_intro)


# ---- Controls and variations ----


def high_entropy(entropy: Tensor, mask: Tensor, q: float = 0.4, amp: float = 1.5, lowest: bool = False) -> Tensor:
    """Control: amplify the tokens that the model was least sure of."""
    return 1 + (amp - 1) * top_q(-entropy if lowest else entropy, mask, q)


def forking_tokens(entropy: Tensor, mask: Tensor, share: float = 0.2) -> Tensor:
    """Comparison: learn from the most uncertain tokens only (arXiv 2506.01939): gamma 1 there, and 0 on all others.

    share: of each response's tokens; that paper takes 20 % of a batch's.

    >>> forking_tokens(torch.tensor([[0.0, 0.1, 0.7, 0.3]]), torch.tensor([[False, True, True, True]]), share=0.3)
    tensor([[1., 0., 1., 0.]])
    """
    return torch.where(mask, top_q(entropy, mask, share).float(), 1.0)


def random_tokens(mask: Tensor, q: float = 0.4, amp: float = 1.5, generator: torch.Generator | None = None) -> Tensor:
    """Control: amplify ceil(q * |R|) tokens of each response, chosen at random."""
    noise = torch.rand(mask.shape, generator=generator, device=generator.device if generator else None)
    return 1 + (amp - 1) * top_q(noise.to(mask.device), mask, q)


def uniform(mask: Tensor) -> Tensor:
    """Control: plain GRPO, gamma = 1 everywhere."""
    return torch.ones(mask.shape, device=mask.device)


def scaled(gamma: Tensor, mask: Tensor) -> Tensor:
    """Control: every response token gets the mean of gamma. The mean factor is the same, but no tokens are chosen.

    The mask must leave out responses that were not scored: their gamma is 1 and would lower the mean.

    >>> scaled(torch.tensor([[1.0, 1.5, 1.0]]), torch.tensor([[False, True, True]]))
    tensor([[1.0000, 1.2500, 1.2500]])
    """
    return torch.where(mask, gamma[mask].mean(), 1.0)


def shift_to_produced(gamma: Tensor, mask: Tensor) -> Tensor:
    """Ablation: give gamma_t to token t+1, which the logits at position t predict. The first token gets 1.

    >>> shift_to_produced(torch.tensor([[1.0, 1.5, 1.0, 1.25]]), torch.tensor([[False, True, True, True]]))
    tensor([[1.0000, 1.0000, 1.5000, 1.0000]])
    """
    shifted = torch.ones_like(gamma)
    shifted[:, 1:] = torch.where(mask[:, 1:] & mask[:, :-1], gamma[:, :-1], 1.0)
    return shifted


# ---- The choice by name ----

CREDITS = ("coupled", "local", "global", "entropy", "forking", "random", "uniform", "scaled")
NEED_ATTENTION = ("coupled", "local", "global", "scaled")  # the credits that are made from WAAD and FAI


def assign_credit(
    credit: str | Callable[..., Tensor],
    signals,
    mask: Tensor,
    input_ids: Tensor | None = None,
    *,
    q: float = 0.4,
    amp: float = 1.5,
    alpha: float = 0.5,
    k: int = 3,
    lowest: bool = False,
    produced: bool = False,
    generator: torch.Generator | None = None,
    **more,
) -> Tensor:
    """gamma [B,N] of the credit with this name, one of CREDITS, or of a function of your own.

    To add a credit: write a function above, its name into CREDITS (and into NEED_ATTENTION if it reads WAAD or FAI),
    and a case below, before `case str()`. For example, "surprise" credits the tokens that were least probable:

        case "surprise":
            gamma = 1 + (amp - 1) * top_q(-signals.logprobs, mask, q)

    Without changing this file: give a function in place of the name. It is called with everything that there is by
    keyword, credit(signals=, mask=, input_ids=, q=, amp=, alpha=, k=, lowest=, generator=, **more).

    Args:
        signals: has .logprobs, .entropy, .waad and .fai, [B,N] each (metrics.Signals).
        input_ids: [B,N], for credits that look at the tokens themselves.
        alpha, k: coupled's. generator: random's.
        produced: give gamma_t to token t+1 (shift_to_produced).

    Raises ValueError for an unknown name.
    """
    match credit:
        case "coupled":
            gamma = coupled_rhythm(signals.waad, signals.fai, mask, q, amp, alpha, k, lowest)
        case "local":
            gamma = local_chunk(signals.waad, mask, q, amp, lowest)
        case "global":
            gamma = global_anchor(signals.fai, mask, q, amp, lowest)
        case "entropy":
            gamma = high_entropy(signals.entropy, mask, q, amp, lowest)
        case "forking":
            gamma = forking_tokens(signals.entropy, mask)
        case "random":
            gamma = random_tokens(mask, q, amp, generator)
        case "uniform":
            gamma = uniform(mask)
        case "scaled":
            gamma = scaled(coupled_rhythm(signals.waad, signals.fai, mask, q, amp, alpha, k, lowest), mask)
        case str():
            raise ValueError(f"unknown credit {credit!r}: choose one of {', '.join(CREDITS)}")
        case own_credit:
            settings = dict(q=q, amp=amp, alpha=alpha, k=k, lowest=lowest, generator=generator)
            gamma = own_credit(signals=signals, mask=mask, input_ids=input_ids, **settings, **more)
    return shift_to_produced(gamma, mask) if produced else gamma
