"""gamma_t: how much of a response's advantage each token gets (Eq. 14-19). Three rhythm credits, four controls.

All take [B,N] tensors with mask [B,N] bool marking the response tokens, work on each response alone, and return gamma
[B,N] float32, which is 1 outside the mask. q is the share of tokens to credit, amp the factor gamma_amp. Only torch is
needed. assign_credit() at the end chooses a credit by its name.

Not given by the paper, and our readings: alpha = 0.5; k = 3; tau_waad, the median WAAD of the response; tau_delta, the
smallest Delta in T_loc, so that "a recent peak" means a member of T_loc; intro(t), the token of largest Delta among the
k before t, the nearest on a tie; ties in TopQ go to the earlier token.

lowest=True credits the lowest q instead (the paper's Table 5): Delta and FAI change sign, all else stays.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


def top_q(x: Tensor, mask: Tensor, q: float, eligible: Tensor | None = None) -> Tensor:
    """TopQ(x, q): the ceil(q * |R|) highest of each response's tokens, as a bool mask [B,N].

    Tokens that are not eligible are never chosen; where too few are, all of them are chosen.

    >>> top_q(torch.tensor([[9.0, 1.0, 3.0, 3.0, 2.0]]), torch.tensor([[False, True, True, True, True]]), q=0.25)
    tensor([[False, False,  True, False, False]])
    """
    if not 0 <= q <= 1:
        raise ValueError(f"q = {q}: the share of tokens to credit lies from 0 to 1")
    eligible = mask if eligible is None else mask & eligible
    order = x.float().masked_fill(~eligible, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    size = [math.ceil(q * n - 1e-6) for n in mask.sum(1).tolist()]  # 1e-6: 0.1 * 30 must not round up to 4
    return eligible & (rank < torch.tensor(size, device=x.device)[:, None])


def waad_change(waad: Tensor, mask: Tensor) -> Tensor:
    """Eq. 14: Delta_t = |WAAD_t - WAAD_{t+1}|, 0 at a response's last token. [B,N].

    >>> waad_change(torch.tensor([[7.0, 1.0, 4.0, 4.5]]), torch.tensor([[False, True, True, True]]))
    tensor([[0.0000, 3.0000, 0.5000, 0.0000]])
    """
    delta = torch.zeros_like(waad)
    delta[:, :-1] = (waad[:, :-1] - waad[:, 1:]).abs() * (mask[:, :-1] & mask[:, 1:])
    return delta


def local_chunk(waad: Tensor, mask: Tensor, q: float = 0.4, amp: float = 1.5, lowest: bool = False) -> Tensor:
    """Eq. 14-15: amplify T_loc, the tokens where WAAD changes most: the borders of what is written in one go."""
    delta = waad_change(waad, mask)
    return 1 + (amp - 1) * top_q(-delta if lowest else delta, mask, q)


def global_anchor(fai: Tensor, mask: Tensor, q: float = 0.4, amp: float = 1.5, lowest: bool = False) -> Tensor:
    """Eq. 16-17: amplify T_glob, the tokens that later ones look at most. One that nothing can look at is no anchor."""
    return 1 + (amp - 1) * top_q(-fai if lowest else fai, mask, q, eligible=fai > 0)


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
    """Eq. 18-19: amplify anchors; one that a preplan token has just introduced hands a share alpha to it.

    An anchor t is locally dominated (t in D) if WAAD_t <= tau_waad and a Delta among the k before it is >= tau_delta.
    gamma_t = 1 + (amp-1) [t in T_glob but not D] + (1-alpha)(amp-1) [t in D] + alpha (amp-1) [t in intro(D)]; the
    brackets add, so a token can reach 1.75 with the defaults; intro(D) is a set, so a shared intro is credited once.

    >>> waad = torch.tensor([[0.0, 9.0, 1.0, 1.0, 1.0]])  # a border after token 1
    >>> fai = torch.tensor([[0.0, 0.1, 0.2, 0.9, 0.0]])  # an anchor at token 3
    >>> coupled_rhythm(waad, fai, torch.tensor([[False, True, True, True, True]]), q=0.25)
    tensor([[1.0000, 1.2500, 1.0000, 1.2500, 1.0000]])
    """
    parts = coupled_parts(waad, fai, mask, q, k, lowest)
    introduces = torch.zeros_like(mask)
    b, t = parts.dominated.nonzero(as_tuple=True)
    introduces[b, parts.intro[b, t]] = True  # intro(D)
    undominated = parts.t_glob & ~parts.dominated
    return 1 + (amp - 1) * (undominated + (1 - alpha) * parts.dominated + alpha * introduces)


class Coupled(NamedTuple):
    """What coupled_rhythm decides by: [B,N] each, the two thresholds [B,1]. With lowest, delta has the other sign."""

    delta: Tensor
    t_loc: Tensor  # bool, the borders
    t_glob: Tensor  # bool, the anchors
    tau_waad: Tensor
    tau_delta: Tensor  # infinite where T_loc is empty
    dominated: Tensor  # bool, D: the anchors that hand a share to their intro
    intro: Tensor  # for each token of D the place of its intro in the row; elsewhere it means nothing


def coupled_parts(waad: Tensor, fai: Tensor, mask: Tensor, q: float = 0.4, k: int = 3, lowest: bool = False) -> Coupled:
    """Eq. 18: which tokens are borders, which are anchors, which anchors are dominated, and by whom introduced."""
    if k < 1:
        raise ValueError(f"k = {k}: an intro is looked for among one or more tokens before its anchor")
    sign = -1 if lowest else 1
    delta = sign * waad_change(waad, mask)
    t_loc, t_glob = top_q(delta, mask, q), top_q(sign * fai, mask, q, eligible=fai > 0)
    tau_delta = delta.masked_fill(~t_loc, torch.inf).amin(1, keepdim=True)
    tau_waad = waad.masked_fill(~mask, torch.nan).nanmedian(1, keepdim=True).values

    # before[b,t,j] = Delta of token t-1-j, the nearest first; -inf where that is no response token
    padded = torch.nn.functional.pad(delta.masked_fill(~mask, -torch.inf), (k, 0), value=-torch.inf)
    before = padded.unfold(1, k, 1)[:, :-1].flip(-1)  # [B,N,k]
    peak, nearest = before.max(-1).values, (before == before.amax(-1, keepdim=True)).int().argmax(-1)
    dominated = t_glob & (waad <= tau_waad) & (peak >= tau_delta)
    intro = torch.arange(mask.shape[1], device=mask.device) - 1 - nearest
    return Coupled(delta, t_loc, t_glob, tau_waad, tau_delta, dominated, intro)


def high_entropy(entropy: Tensor, mask: Tensor, q: float = 0.4, amp: float = 1.5, lowest: bool = False) -> Tensor:
    """Control: amplify the tokens the model was least sure of."""
    return 1 + (amp - 1) * top_q(-entropy if lowest else entropy, mask, q)


def random_tokens(mask: Tensor, q: float = 0.4, amp: float = 1.5, generator: torch.Generator | None = None) -> Tensor:
    """Control: amplify as many tokens, chosen at random."""
    noise = torch.rand(mask.shape, generator=generator, device=generator.device if generator else None)
    return 1 + (amp - 1) * top_q(noise.to(mask.device), mask, q)


def uniform(mask: Tensor) -> Tensor:
    """Control: plain GRPO, gamma = 1 everywhere."""
    return torch.ones(mask.shape, device=mask.device)


def scaled(gamma: Tensor, mask: Tensor) -> Tensor:
    """Control: the mean of gamma for every response token, the same size of step without a choice of tokens.

    The mean is over all tokens of the mask together, so the mask must leave out responses that have no gamma.

    >>> scaled(torch.tensor([[1.0, 1.5, 1.0]]), torch.tensor([[False, True, True]]))
    tensor([[1.0000, 1.2500, 1.2500]])
    """
    return torch.where(mask, gamma[mask].mean(), 1.0)


def on_produced(gamma: Tensor, mask: Tensor) -> Tensor:
    """Ablation: give each token's gamma to the token its attention row produced, the next one. The first token gets 1.

    >>> on_produced(torch.tensor([[1.0, 1.5, 1.0, 1.25]]), torch.tensor([[False, True, True, True]]))
    tensor([[1.0000, 1.0000, 1.5000, 1.0000]])
    """
    shifted = torch.ones_like(gamma)
    shifted[:, 1:] = torch.where(mask[:, 1:] & mask[:, :-1], gamma[:, :-1], 1.0)
    return shifted


CREDITS = ("coupled", "local", "global", "entropy", "random", "uniform", "scaled")
NEED_ATTENTION = ("coupled", "local", "global", "scaled")  # the credits that WAAD and FAI are needed for


def assign_credit(
    name: str,
    signals,
    mask: Tensor,
    q: float = 0.4,
    amp: float = 1.5,
    alpha: float = 0.5,
    k: int = 3,
    lowest: bool = False,
    produced: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The credit of this name, one of CREDITS. Returns gamma [B,N].

    signals has .waad, .fai and .entropy, [B,N] each (metrics.Signals); a credit that needs none of them ignores it.
    alpha and k are coupled's, generator is random's, produced asks for on_produced. ValueError for another name.
    """
    match name:
        case "coupled" | "scaled":
            gamma = coupled_rhythm(signals.waad, signals.fai, mask, q, amp, alpha, k, lowest)
            gamma = scaled(gamma, mask) if name == "scaled" else gamma
        case "local":
            gamma = local_chunk(signals.waad, mask, q, amp, lowest)
        case "global":
            gamma = global_anchor(signals.fai, mask, q, amp, lowest)
        case "entropy":
            gamma = high_entropy(signals.entropy, mask, q, amp, lowest)
        case "random":
            gamma = random_tokens(mask, q, amp, generator)
        case "uniform":
            gamma = uniform(mask)
        case _:
            raise ValueError(f"unknown credit {name!r}: choose one of {', '.join(CREDITS)}")
    return on_produced(gamma, mask) if produced else gamma
