"""The arms: what is compared, by name. Runs (lab.experiment) and directions (lab.alignment) take them from here.

    python -m lab.arms --arm content --model runs/smollm-words --task countdown-words     one run of train.py

An arm is a set of train.py's arguments. Some have a credit function of their own in place of --credit:

    content, wording       gamma on the tokens that decide, or on the words around them: by the text (lab/wording.py),
                           so in Countdown in words only. "content" is the cheapest stand-in for an oracle: it looks at
                           no attention. If it helps to know what decides, that shows here.
    coupled, tau_delta the median; coupled, gamma set once
                           two other readings of Eq. 18-19, which other people's code has.
    ..., no first token    the credit of that name, with WAAD, FAI and the head split from attention without the first
                           token's column (lab/sinks.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from transformers.hf_argparser import HfArg

import credit
import train
from lab import signals as looks
from lab import wording
from metrics import Signals
from node import ranks
from node.settings import load_tokenizer, parse_args

CreditFunction = Callable[..., Tensor]  # what credit.assign_credit calls: (signals=, mask=, input_ids=, ...) -> gamma


@dataclass(frozen=True)
class Arm:
    """What is done differently in these runs."""

    settings: dict = field(default_factory=dict)  # arguments of train.py, beside those that all arms share
    own: Callable[[object], CreditFunction] | None = None  # tokenizer -> the credit function


def by_text(kind: str, tokenizer) -> CreditFunction:
    """gamma on the tokens of one of wording.KINDS."""

    def credit_of(mask: Tensor, input_ids: Tensor, amp: float, **_) -> Tensor:
        is_of_kind = wording.marked(tokenizer, input_ids, mask)[wording.KINDS.index(kind)]
        return 1 + (amp - 1) * is_of_kind

    return credit_of


def read_otherwise(reading: str, _tokenizer) -> CreditFunction:
    """Coupled credit with another reading of Eq. 18-19.

    "median": tau_delta is the response's median Delta instead of the smallest in T_loc, so more anchors are dominated.
    "set once": an intro gets 1 + alpha (amp - 1), also where it is an anchor and the terms would add up to more.
    """

    def credit_of(signals: Signals, mask: Tensor, q: float, amp: float, alpha: float, k: int, **_) -> Tensor:
        parts = credit.coupled_parts(signals.waad, signals.fai, mask, q, k)
        dominated = parts.dominated
        if reading == "median":
            tau_delta = parts.delta.masked_fill(~mask, torch.nan).nanmedian(1, keepdim=True).values
            # A response's first token has no intro: column 0, which is not of the response.
            has_intro, peak = mask.gather(1, parts.intro), parts.delta.gather(1, parts.intro)
            is_low = signals.waad <= parts.tau_waad
            dominated = parts.t_glob & is_low & has_intro & (peak >= tau_delta)
        is_intro = torch.zeros_like(mask)
        row, anchor = dominated.nonzero(as_tuple=True)
        is_intro[row, parts.intro[row, anchor]] = True
        share = (parts.t_glob & ~dominated) + (1 - alpha) * dominated
        share = torch.where(is_intro, alpha, share) if reading == "set once" else share + alpha * is_intro
        return 1 + (amp - 1) * share

    return credit_of


def without_first_token(name: str, tokenizer) -> CreditFunction:
    """The credit of this name, from attention without the first token's column; the split is measured at each call."""

    def credit_of(signals: Signals, mask: Tensor, input_ids: Tensor, model, **settings) -> Tensor:
        rows = mask.any(1).nonzero()[:, 0]  # the responses that have signals
        of_rows = Signals(*(x[rows] for x in signals[:4]), signals.heads)
        *without, heads = looks.without_first(of_rows, model, input_ids[rows], mask[rows])
        in_place = [torch.zeros_like(signals.waad).index_copy(0, rows, x) for x in without]
        return credit.assign_credit(name, Signals(*in_place, heads), mask, input_ids, **settings)

    return credit_of


MAIN = {
    name: Arm({"credit": name}) for name in ("uniform", "scaled", "random", "entropy", "local", "global", "coupled")
}
ABLATIONS = {
    "coupled, lowest": Arm({"lowest": True}),
    "coupled, q 0.2": Arm({"q": 0.2}),
    "coupled, q 0.6": Arm({"q": 0.6}),
    "coupled, q 1.0": Arm({"q": 1.0}),
    "coupled, positive only": Arm({"sign": "positive"}),
    "coupled, all heads": Arm({"all_heads": True}),
    "coupled, on the token produced": Arm({"on_produced": True}),
}
LOUD = {"coupled, gamma 4, q 0.2": Arm({"gamma_amp": 4.0, "q": 0.2})}
READINGS = {
    "coupled, tau_delta the median": Arm(own=partial(read_otherwise, "median")),
    "coupled, gamma set once": Arm(own=partial(read_otherwise, "set once")),
}
PLACES = {  # gamma 4 on other places than attention's
    f"{name}, gamma 4, q 0.2": Arm({"credit": name, "gamma_amp": 4.0, "q": 0.2}) for name in ("random", "entropy")
}
BY_TEXT = {kind: Arm(own=partial(by_text, kind)) for kind in wording.KINDS}
NO_FIRST = {
    f"{name}, no first token": Arm({"credit": name}, partial(without_first_token, name))
    for name in ("local", "global", "coupled")
}
RATES = {
    f"uniform, lr {lr}": Arm({"credit": "uniform", "lr": float(lr)}) for lr in ("2e-5", "8e-5", "1e-4", "2e-4", "4e-4")
}
OF_TOKENS = {**MAIN, **ABLATIONS, **LOUD, **READINGS, **PLACES}  # for every task, with the whole of attention
ARMS = {**OF_TOKENS, **BY_TEXT, **NO_FIRST, **RATES}
BASELINE = ("uniform", "scaled", "entropy")  # AdamW divides gamma's size out, so these three are one treatment


def gamma_of(
    arm: Arm, seen: Callable[[bool], Signals], mask: Tensor, input_ids: Tensor, model, tokenizer, amp: float, seed: int
) -> tuple[Tensor, str]:
    """An arm's gamma [B,N] on given responses, and the sign of the advantages that it multiplies.

    seen: the signals, of the two groups of heads or (True) of all heads. amp: where the arm says nothing else.
    """
    args = train.Args(**{"gamma_amp": amp, **arm.settings})
    gamma = credit.assign_credit(
        arm.own(tokenizer) if arm.own else args.credit, seen(args.all_heads), mask, input_ids, q=args.q,
        amp=args.gamma_amp, alpha=args.alpha, k=args.k, lowest=args.lowest, produced=args.on_produced,
        generator=torch.Generator().manual_seed(seed), model=model,
    )  # fmt: skip
    return gamma, args.sign


@dataclass
class Args:
    """Which arm."""

    arm: Literal[*ARMS] = HfArg(default="content", help="The arm; its arguments of train.py win over those given.")


def main(args: Args, run: train.Args) -> None:
    """One run; an error in one line for what cannot be."""
    arm = ARMS[args.arm]
    with ranks.errors_in_one_line():
        if run.resume:
            raise ValueError("--resume: a run of an arm is not resumed, start it anew")
        if args.arm in BY_TEXT and run.task != "countdown-words":
            raise ValueError(f"--task {run.task}: only countdown-words tells content from wording by its text")
        own = arm.own(load_tokenizer(run.model, 1)) if arm.own else None
    train.main(replace(run, **arm.settings), own)


if __name__ == "__main__":
    main(*parse_args(Args, train.Args))
