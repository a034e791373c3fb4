"""What truth.py found, as tables: how much of what was decided do the credited tokens hold?

    held        the sum of dV^2 over the chosen tokens / its sum over all tokens. V is a martingale, so the sum over a
                response is on average the variance of its outcome: "held" is the share of the outcome's variance that
                is decided at the chosen tokens. A random choice of 40 % holds 40 %.
    ceiling     the tokens of truly largest dV^2: chosen by one half of the continuations, measured by the other
    choices     tokens whose entropy is above signals.CHOICE. gamma multiplies a gradient that is nearly 0 where the
                model is sure, so only among these can credit matter. There a signal that knows no more than where the
                choices are holds its share, and no more.
    regression  dV^2, over its mean, on the ranks of entropy, position and the signals, from 0 (lowest choice of the
                response) to 1: a weight of 0.5 says that the highest is worth half a mean more than the lowest

All choices are made in each response by itself. Intervals: clusters over problems (stats.Clusters).
"""

from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch import Tensor

import credit
from lab.signals import CHOICE, on_cpu, scores, signals_of, untrained, without_first
from lab.stats import Clusters, Estimate
from metrics import Signals
from node.output import markdown
from rollout import pad_batch

SHARES = (0.1, 0.2, 0.4)


def chosen(name: str, signals: Signals, mask: Tensor, q: float, lowest: bool = False) -> Tensor:
    """The tokens that a signal, or coupled credit, chooses: [B,N] float. Of a random choice its mean, q everywhere."""
    if name == "random":
        return mask * (torch.ceil(q * mask.sum(1) - 1e-6) / mask.sum(1).clamp(min=1))[:, None]
    if name == "coupled":
        return (credit.coupled_rhythm(signals.waad, signals.fai, mask, q, lowest=lowest) > 1).float()
    x = scores(signals, mask)[name]
    eligible = signals.fai > 0 if name == "FAI" else None
    return credit.top_q(-x if lowest else x, mask, q, eligible).float()


def held(weights: Tensor, square: Tensor, among: Tensor, clusters: Clusters) -> Estimate:
    """The share of dV^2 among some tokens that the chosen hold, with its interval."""
    return clusters.ratio((weights * square * among).sum(1), (square * among).sum(1))


def ceiling(values, mask: Tensor, q: float, clusters: Clusters) -> Estimate:
    """The share that the tokens of truly largest dV^2 hold: chosen by one half, measured by the other, both ways."""
    top = [credit.top_q(values.delta[half] ** 2, mask, q).float() for half in (1, 2)]
    one = sum((top[i] * values.square[2 - i] * mask).sum(1) for i in (0, 1))
    return clusters.ratio(one, sum((values.square[2 - i] * mask).sum(1) for i in (0, 1)))


NAMES = ("FAI", "change of WAAD", "WAAD", "coupled", "entropy", "surprise", "position, early first", "random")


def share_table(signals: Signals, values, mask: Tensor, clusters: Clusters) -> list[list]:
    """The main table. The produced column moves what is chosen to the token that its row produced, the next one."""
    square, rows = values.square[0], []
    for name in NAMES:
        picks = [chosen(name, signals, mask, q) for q in SHARES]
        if name == "random":
            others = [None, None]
        else:
            moved = credit.shift_to_produced(1 + picks[-1], mask) - 1
            others = [chosen(name, signals, mask, SHARES[-1], lowest=True), moved]
        cells = [held(w, square, mask, clusters) if w is not None else None for w in (*picks, *others)]
        rows.append([name, *cells, (picks[-1].sum() / mask.sum()).item()])
    best = [ceiling(values, mask, q, clusters) for q in SHARES]
    return [*rows, ["ceiling", *best, None, None, SHARES[-1]]]


def within(x: Tensor, mask: Tensor) -> np.ndarray:
    """Ranks of x within each response's marked tokens, from 0 to 1, in the order of x[mask]."""
    parts = [stats.rankdata(row[m].numpy()) - 1 for row, m in zip(x, mask) if m.any()]
    return np.concatenate([r / max(len(r) - 1, 1) for r in parts])


def choice_table(signals: Signals, values, mask: Tensor, clusters: Clusters) -> list[list]:
    """What is held of the choices' dV^2 by the 40 % of them that each signal ranks highest."""
    square, choice = values.square[0], mask & (signals.entropy > CHOICE)
    rows = [
        [name, held(credit.top_q(x, choice, SHARES[-1]).float(), square, choice, clusters)]
        for name, x in scores(signals, mask).items()
    ]
    rows.append(["random", held(chosen("random", signals, choice, SHARES[-1]), square, choice, clusters)])
    return [*rows, ["ceiling", ceiling(values, choice, SHARES[-1], clusters)]]


def regression(signals: Signals, values, mask: Tensor, clusters: Clusters) -> list[list]:
    """Weights of the ranks in least-squares fits of dV^2 over its mean, choices alone; a column for each signal."""
    choice = mask & (signals.entropy > CHOICE)
    owner, y = choice.nonzero()[:, 0].numpy(), values.square[0][choice].double().numpy()
    of_tokens = Clusters(clusters.problem[owner])  # the same problems are drawn, and with them their tokens
    ranked, mean = scores(signals, mask), of_tokens.sums(y) / of_tokens.sums(np.ones(len(y)))
    columns = {}
    for name in ("FAI", "change of WAAD"):
        ranks = [within(ranked[n], choice) for n in ("entropy", "position, early first", name)]
        x = np.stack([np.ones(len(y)), *ranks], 1)
        moments = [x[:, :, None] * x[:, None], (x * y[:, None])[..., None]]
        xx, xy = map(of_tokens.sums, moments)
        solved = np.linalg.solve(xx, xy)[..., 0] / mean[:, None]  # [1 + draws, 4]
        columns[name] = [clusters.interval(w) for w in solved[:, 1:].T]
    return [[name, *row] for name, *row in zip(("entropy", "position, early first", "the signal"), *columns.values())]


def cell(x: Estimate | float | str | None, percent: bool) -> str:
    """A share, an estimate or a text, as text; None as nothing."""
    if x is None or isinstance(x, str):
        return x or ""
    if isinstance(x, float):
        return f"{100 * x:.0f} %" if percent else f"{x:.2f}"
    return x.percent() if percent else x.text(".2f")


def tables(found, model, signals: Signals, input_ids: Tensor, mask: Tensor) -> dict[str, list[list[str]]]:
    """Every table by its title: rows of cells, the first row the heads."""
    values, square = found.values, found.values.square[0]
    clusters = Clusters(torch.arange(len(mask)) // found.args.group)
    share = f"{SHARES[-1]:.0%}"
    main = share_table(signals, values, mask, clusters)
    out = {
        "Share of ΔV² held by the chosen tokens": [
            ["chosen by", *(f"highest {q:.0%}" for q in SHARES), f"lowest {share}", f"highest {share}, moved to the "
             "token produced", "tokens chosen"],
            *[[row[0], *(cell(x, True) for x in row[1:])] for row in main],
        ]
    }  # fmt: skip
    choice = mask & (signals.entropy > CHOICE)
    holds = held(choice.float(), square, mask, clusters).percent()
    part = f"{100 * choice.sum() / mask.sum():.0f} % of the tokens, {holds} of ΔV²"
    out[f"Among the choices alone: entropy above {CHOICE} nats, {part}"] = [
        ["chosen by", f"held by the highest {share}"],
        *[[row[0], cell(row[1], True)] for row in choice_table(signals, values, mask, clusters)],
    ]
    out["Does attention add to entropy? Weights of ranks in ΔV², choices alone"] = [
        ["rank of", "where the signal is FAI", "where it is the change of WAAD"],
        *[[row[0], *(cell(x, False) for x in row[1:])] for row in regression(signals, values, mask, clusters)],
    ]
    ways = {
        "as in training": signals,
        "first token's column out": on_cpu(without_first(signals, model, input_ids, mask.to(model.device))),
        "all heads": on_cpu(signals_of(model, input_ids, mask.to(model.device), all_heads=True)),
        "random weights": on_cpu(signals_of(untrained(model), input_ids, mask.to(model.device))),
    }
    kinds, rows = ("FAI", "change of WAAD", "WAAD", "coupled"), []
    for way, other in ways.items():
        cells = [held(chosen(k, other, mask, SHARES[-1]), square, mask, clusters) for k in kinds]
        cells += [held(credit.top_q(scores(other, mask)[k], choice, SHARES[-1]).float(), square, choice, clusters)
                  for k in kinds[:2]]  # fmt: skip
        rows.append([way, *(cell(x, True) for x in cells)])
    heads = [*kinds, *(f"{k}, choices alone" for k in kinds[:2])]
    out[f"Other signals, highest {share}"] = [["signals from", *heads], *rows]
    return out


def report(found, model, folder: Path) -> str:
    """Write tables.md of a measurement (truth.Measured); returns its text."""
    input_ids, mask, _ = (x.to(model.device) for x in pad_batch(found.rollouts))
    signals, mask = on_cpu(signals_of(model, input_ids, mask)), mask.cpu()
    args, total = found.args, found.values.square[0].sum() / len(mask)
    intro = (
        f"{args.responses} responses to {args.task}, {100 * found.rewards.mean():.1f} % right, {int(mask.sum())} "
        f"tokens, {args.continuations} continuations of each beginning. A response's tokens hold {total:.2f} of ΔV²."
    )
    parts = (f"### {name}\n\n{markdown(rows)}" for name, rows in tables(found, model, signals, input_ids, mask).items())
    out = "\n\n".join([intro, *parts])
    (folder / "tables.md").write_text(out + "\n")
    return out
