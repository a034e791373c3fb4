"""Choices that matter and choices of words: does attention tell them apart, where entropy cannot?

    python -m lab.wording --out lab/records/wording.md           the committed responses, by the model that wrote them
                                                                 (make words)
    python -m lab.wording --model runs/smollm --out FILE         by another model with the same tokenizer
    python -m lab.wording --truth FOLDER                         others of lab.truth, task countdown-words

In Countdown in words the model is unsure of two kinds of tokens. Which numbers and operators to try, and whether to go
on or to give up, decides whether it succeeds (content). Whether to say "Maybe" or "Try", "then" or "and then", does not
(wording). Both were drawn at random in the traces that it learned from. A credit for what matters should fall on the
one kind and not on the other.

The first table says what share of the outcome's variance is decided at each kind, from the measured token values
(lab/truth.py) alone. The second looks at the signals, at content and wording of entropy above 0.1 nats:

    AUC     the chance that it is higher at a content token than at a wording token of the same response; 0.5: it cannot
            tell; mean over responses that have both
    shares  what part of each kind is among a response's 40 % of highest signal
    worth   mean dV^2 of the content among those over that of all content: does the signal know which content decides?
            1: at most it knows what is content

Intervals: bootstrap over problems (stats.Clusters).
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from transformers.hf_argparser import HfArg

import credit
from lab import truth
from lab.signals import CHOICE, on_cpu, scores, signals_of, untrained, without_first
from lab.stats import Clusters
from lab.truth_tables import held
from metrics import Signals
from node.output import markdown, write_whole
from node.settings import load_model, parse_args
from rollout import pad_batch

KINDS = ("content", "wording")
PARTS = {"operators": r"[-+*/]", "numbers": r"\d+", "to go on or to end": r"|.*</.*"}  # of the content, by their text


@dataclass
class Args:
    """Hold the signals at choices that matter against those at choices of words."""

    truth: str = HfArg(default="lab/records/truth-words", help="Folder of lab.truth, task countdown-words.")
    model: str | None = HfArg(default=None, help="Whose signals are looked at (default: the measured model's).")
    out: str = HfArg(default="wording.md", help="File for the tables.")


def kinds(tokens: list[str]) -> list[str]:
    """Of each token of a response: content, wording, or neither ("").

    Content: operators and digits of what is tried, and the sign that ends a line, by which the model goes on or stops.
    Wording: letters and marks of a line. Neither: spaces, results, and the answer, which follow from what is there.

    >>> kinds(["Try", " ", "7", " *", " ", "5", " =", " ", "3", "5", ".", " Not", "</", "think", ">", "7"])[:11]
    ['wording', '', 'content', 'content', '', 'content', '', '', '', '', 'wording']
    """
    found, result, said = [], False, False
    for i, token in enumerate(tokens):
        if "</" in token:  # the answer follows
            return found + ["content"] + [""] * (len(tokens) - i - 1)
        text = token.strip()
        if "\n" in token:
            found.append("content")
            result = said = False
        elif text == "=":
            found.append("")
            result = True
        elif re.fullmatch(r"[-+*/]", text):
            found.append("content")
            result = False
        elif text.isdecimal():
            found.append("" if result or said else "content")
        elif text:
            found.append("wording")
            said = said or (result and "," not in text)  # after a result comes a judgement, or another step
            result = False
        else:
            found.append("")
    return found


def marked(tokenizer, input_ids: Tensor, mask: Tensor) -> Tensor:
    """Which response tokens are content and which are wording: [2,B,N] bool. input_ids [B,N], mask [B,N] bool."""
    kind = torch.zeros(2, *mask.shape, dtype=torch.bool, device=mask.device)
    for b in range(len(mask)):
        labels = kinds([tokenizer.decode([t]) for t in input_ids[b, mask[b]].tolist()])
        for i, name in enumerate(KINDS):
            is_of_kind = [label == name for label in labels]
            kind[i, b, mask[b]] = torch.tensor(is_of_kind, dtype=torch.bool, device=mask.device)
    return kind


def auc(x: np.ndarray, content: np.ndarray) -> float:
    """The chance that x is higher at a content token than at another; nan unless there are both.

    >>> float(auc(np.array([3.0, 2.0, 1.0]), np.array([True, False, False])))
    1.0
    """
    n, m = content.sum(), (~content).sum()
    if not n * m:
        return float("nan")
    return (stats.rankdata(x)[content].sum() - n * (n + 1) / 2) / (n * m)


def table(
    signals: dict[str, Tensor], content: Tensor, wording: Tensor, mask: Tensor, square: Tensor, clusters: Clusters
) -> list[list[str]]:
    """A line for each signal [B,N]: its AUC, the share of either kind (bool) among its highest 40 %, and the mean dV^2
    (square) of the content there over that of all content."""
    rows = [["signal", "AUC", *(f"{kind} in the highest 40 %" for kind in KINDS), "worth of that content"]]
    for name, x in signals.items():
        each = np.array([auc(row[c | w].numpy(), c[c | w].numpy()) for row, c, w in zip(x, content, wording)])
        both = ~np.isnan(each)
        top = credit.top_q(x, mask, 0.4)
        shares = [clusters.ratio((top & kind).sum(1), kind.sum(1)).percent() for kind in (content, wording)]
        means = [clusters.sums((square * at).sum(1)) / clusters.sums(at.sum(1)) for at in (top & content, content)]
        chance, worth = clusters.ratio(np.where(both, each, 0), both), clusters.interval(means[0] / means[1])
        rows.append([name, chance.text(".2f"), *shares, worth.text(".2f")])
    return rows


def decided(tokenizer, input_ids: Tensor, mask: Tensor, square: Tensor, clusters: Clusters) -> list[list[str]]:
    """A line for each kind, and for each part of the content: number of tokens, share of the outcome's variance."""
    content, wording = marked(tokenizer, input_ids, mask)
    texts = [tokenizer.decode([t]).strip() for t in range(len(tokenizer))]
    of = {name: torch.tensor([bool(re.fullmatch(form, text)) for text in texts]) for name, form in PARTS.items()}
    parts = {"content": content, **{name: content & at[input_ids] for name, at in of.items()}, "wording": wording}
    rows = [["tokens", "number", "share of the outcome's variance that is decided there"]]
    for name, at in parts.items():
        rows.append([name, f"{at.sum():,}", held(at.float(), square, mask, clusters).percent()])
    return rows


def look(signals: Signals, first_out: Signals, floor: Signals, mask: Tensor) -> dict[str, Tensor]:
    """The signals to be held against the kinds."""
    seen = scores(signals, mask)
    names = ("entropy", "surprise", "FAI", "change of WAAD", "WAAD", "position, early first")
    others = scores(first_out, mask)
    found = {name: seen[name] for name in names}
    found |= {f"{name}, first token out": others[name] for name in ("FAI", "change of WAAD", "WAAD")}
    found["FAI, random weights"] = floor.fai
    return found | {"coupled (γ)": credit.coupled_rhythm(signals.waad, signals.fai, mask)}


def main(args: Args) -> None:
    try:
        found = truth.read(args.truth)
        if found.args.task != "countdown-words":
            raise ValueError(f"--truth {args.truth}: its task is {found.args.task}, which has no choice of words")
        if found.values is None:
            raise ValueError(f"--truth {args.truth}: not at its end: python -m lab.truth --resume {args.truth}")
        model, tokenizer = load_model(args.model or found.args.model)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    input_ids, mask, _ = pad_batch(found.rollouts)
    clusters, square = Clusters(torch.arange(len(mask)) // found.args.group), found.values.square[0]
    tables = [decided(tokenizer, input_ids, mask, square, clusters)]
    there = input_ids.to(model.device), mask.to(model.device)
    signals = signals_of(model, *there)
    first_out, signals = on_cpu(without_first(signals, model, *there)), on_cpu(signals)
    floor = on_cpu(signals_of(untrained(model), *there))
    content, wording = marked(tokenizer, input_ids, mask) & (signals.entropy > CHOICE)
    tables.append(table(look(signals, first_out, floor, mask), content, wording, mask, square, clusters))
    of = args.model or found.args.model
    text = f"{len(mask)} responses of {found.args.model} ({args.truth}); signals of {of}.\n\n"
    text += "\n\n".join(map(markdown, tables)) + "\n"
    write_whole(Path(args.out), text)
    print(text)


if __name__ == "__main__":
    main(parse_args(Args))
