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

from dataclasses import dataclass, replace
from typing import Literal
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

import credit
import rollout
import train
from lab import truth_tables, wording
from metrics import Signals
from node import ranks


@dataclass
class Args:
    """Which credit."""

    variant: Literal[*wording.KINDS, "no_first_token"] = HfArg(
        default="content",
        help="content: gamma on numbers, operators, whether to go on; wording: on the words around them; "
        "no_first_token: --credit by attention without the first token.",
    )


def by_text(kind: str, tokenizer) -> dict:
    """What takes the place of train.py's functions for a credit by the text."""
    marked: list[Tensor] = []  # of the step at hand, which tokens are of the kind: [B,N] bool

    def pad_batch(rollouts: list) -> tuple[Tensor, ...]:
        padded = rollout.pad_batch(rollouts)
        marked[:] = [wording.marked(tokenizer, rollouts, padded[1])[wording.KINDS.index(kind)]]
        return padded

    def assign_credit(name: str, signals: Signals, mask: Tensor, q: float, amp: float, *others) -> Tensor:
        return 1 + (amp - 1) * (marked[0].to(mask.device) & mask)

    return {"pad_batch": pad_batch, "assign_credit": assign_credit}


def without_first_token() -> dict:
    """What takes the place of train.py's functions for a credit by attention without the first token."""
    score, found = train.score, []  # of the step at hand, its signals

    def and_without(args: train.Args, model, input_ids: Tensor, mask: Tensor, rows: Tensor, heads) -> Signals:
        seen = score(args, model, input_ids, mask, rows, heads)
        of_rows = Signals(*(x[rows] for x in seen[:4]), heads)
        *signals, split = truth_tables.without_first(of_rows, model, input_ids[rows], mask[rows])
        found[:] = [Signals(*(torch.zeros_like(seen.waad).index_copy(0, rows, x) for x in signals), split)]
        return seen

    def assign_credit(name: str, signals: Signals, mask: Tensor, *how) -> Tensor:
        return credit.assign_credit(name, found[0], mask, *how)

    return {"score": and_without, "assign_credit": assign_credit}


def main(args: Args, run: train.Args) -> None:
    """One run; an error in one line for what cannot be."""
    with ranks.errors_in_one_line():
        if run.resume:
            raise ValueError("--resume: a run of a variant is not gone on with, begin it anew")
        if args.variant == "no_first_token":
            if run.credit not in credit.NEED_ATTENTION:
                raise ValueError(f"--credit {run.credit}: looks at no attention, so there is no variant of it")
            changes = without_first_token()
        else:
            if run.task != "countdown-words":
                raise ValueError(f"--task {run.task}: only countdown-words tells content from wording by its text")
            changes = by_text(args.variant, rollout.load_tokenizer(run.model, 1))
            run = replace(run, credit="uniform")  # which needs no signal of attention
    with patch.multiple(train, **changes):
        train.main(run)


if __name__ == "__main__":
    main(*HfArgumentParser((Args, train.Args)).parse_args_into_dataclasses())
