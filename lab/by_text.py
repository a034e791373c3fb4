"""train.py with a credit that reads the text: gamma on the tokens that decide, or on the words around them.

    python -m lab.by_text --by content --model runs/smollm-words --task countdown-words --max_tokens 192

The cheapest stand-in for an oracle. In Countdown in words the text itself says which tokens can decide
(lab/wording.py), so no attention is looked at, and its mistakes play no part: if to know content from wording is worth
something in training, it shows here. The loop is train.py's own, with its arguments; those that choose tokens by
attention change nothing.
"""

from dataclasses import dataclass, replace
from typing import Literal
from unittest.mock import patch

from torch import Tensor
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

import rollout
import train
from lab import wording
from node import ranks


@dataclass
class Args:
    """Which tokens get the bonus."""

    by: Literal[wording.KINDS] = HfArg(
        default="content", help="content: numbers, operators, whether to go on; wording: the words around them."
    )


def main(args: Args, run: train.Args) -> None:
    """One run of train.py; ValueError's one line for a task that has no choice of words, and for --resume."""
    with ranks.errors_in_one_line():
        if run.resume:
            raise ValueError("--resume: a run by text is not gone on with, begin it anew")
        if run.task != "countdown-words":
            raise ValueError(f"--task {run.task}: only countdown-words tells content from wording by its text")
        tokenizer = rollout.load_tokenizer(run.model, 1)
    marked: list[Tensor] = []  # of the step at hand, which tokens are of the kind: [B,N] bool

    def pad_batch(rollouts: list) -> tuple[Tensor, ...]:
        padded = rollout.pad_batch(rollouts)
        marked[:] = [wording.marked(tokenizer, rollouts, padded[1])[wording.KINDS.index(args.by)]]
        return padded

    def assign_credit(name: str, signals, mask: Tensor, q: float, amp: float, *others) -> Tensor:
        return 1 + (amp - 1) * (marked[0].to(mask.device) & mask)

    with patch.object(train, "pad_batch", pad_batch), patch.object(train, "assign_credit", assign_credit):
        train.main(replace(run, credit="uniform"))  # which needs no signal of attention


if __name__ == "__main__":
    main(*HfArgumentParser((Args, train.Args)).parse_args_into_dataclasses())
