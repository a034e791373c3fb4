"""train.py with a credit that the reference does not have, to see what it would be worth.

    python -m lab.variants --variant content --model runs/smollm-words --task countdown-words --max_tokens 192
    python -m lab.variants --variant no_first_token --credit coupled --model ...

content         gamma on the tokens that decide, wording: on the words around them; by the text (lab/wording.py), so in
                Countdown in words alone. The cheapest stand-in for an oracle: no attention is looked at, and its
                mistakes play no part. If to know content from wording is worth something in training, it shows here.
no_first_token  --credit as it is, but WAAD, FAI and the head split are those of attention without the first token's
                column (lab/sinks.py), the split measured anew at every step.

The loop is train.py's own, with its arguments; those that choose tokens by attention change nothing in the first two.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from transformers.hf_argparser import HfArg

import credit
import train
from lab import truth_tables, wording
from metrics import Signals
from node import ranks
from node.settings import load_tokenizer, parse_args


@dataclass
class Args:
    """Which credit."""

    variant: Literal[*wording.KINDS, "no_first_token"] = HfArg(
        default="content",
        help="content: gamma on numbers, operators, whether to go on; wording: on the words around them; "
        "no_first_token: --credit by attention without the first token.",
    )


def credit_by_text(kind: str, tokenizer) -> Callable[..., Tensor]:
    """A credit for train.py: gamma on the tokens of one kind, by the text."""

    def credit_of(mask: Tensor, input_ids: Tensor, amp: float, **_) -> Tensor:
        is_of_kind = wording.marked(tokenizer, input_ids, mask)[wording.KINDS.index(kind)]
        return 1 + (amp - 1) * is_of_kind

    return credit_of


def credit_without_first_token(name: str) -> Callable[..., Tensor]:
    """A credit for train.py: the credit of this name, by attention without the first token's column."""

    def credit_of(signals: Signals, mask: Tensor, input_ids: Tensor, model, **settings) -> Tensor:
        rows = mask.any(1).nonzero()[:, 0]  # the responses that have signals
        of_rows = Signals(*(x[rows] for x in signals[:4]), signals.heads)
        *without, heads = truth_tables.without_first(of_rows, model, input_ids[rows], mask[rows])
        in_place = [torch.zeros_like(signals.waad).index_copy(0, rows, x) for x in without]
        return credit.assign_credit(name, Signals(*in_place, heads), mask, input_ids, **settings)

    return credit_of


def main(args: Args, run: train.Args) -> None:
    """One run; an error in one line for what cannot be."""
    with ranks.errors_in_one_line():
        if run.resume:
            raise ValueError("--resume: a run of a variant is not gone on with, begin it anew")
        if args.variant == "no_first_token":
            if run.credit not in credit.NEED_ATTENTION:
                raise ValueError(f"--credit {run.credit}: looks at no attention, so there is no variant of it")
            own_credit = credit_without_first_token(run.credit)
        else:
            if run.task != "countdown-words":
                raise ValueError(f"--task {run.task}: only countdown-words tells content from wording by its text")
            own_credit = credit_by_text(args.variant, load_tokenizer(run.model, 1))
            run = replace(run, credit="uniform")  # which needs no signal of attention
    train.main(run, own_credit)


if __name__ == "__main__":
    main(*parse_args(Args, train.Args))
