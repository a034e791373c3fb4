"""What truth.py found, as tables and pictures: how much of the squared token value do the credited tokens hold?

    held        sum of dV^2 over the chosen tokens / sum over all tokens. A random choice of 40 % holds 40 %.
    ceiling     the tokens of truly largest dV^2: chosen by one half of the continuations, measured by the other
    choices     tokens whose entropy is above CHOICE. gamma multiplies a gradient that is nearly 0 where the model is
                sure, so only among these can credit matter. There a signal that knows no more than where the choices
                are holds its share, and no more.
    matched     mean dV^2 of the chosen choices over that of as many others as like in position and entropy as can be
    regression  dV^2, over its mean, on the ranks of entropy, position and the signals, from 0 (lowest choice of the
                response) to 1: a weight of 0.5 says that the highest is worth half a mean more than the lowest

All choices are made in each response by itself. 95 % bootstrap intervals over problems, whose responses stay together.
"""

from pathlib import Path

import matplotlib
import numpy as np
import torch
from scipy import stats
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from torch import Tensor
from transformers import AutoModelForCausalLM

import credit
import train
from heads import Heads, split_heads
from lab import linkage
from lab import report as pictures
from metrics import Signals
from node import precision
from node.output import markdown
from rollout import pad_batch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CHOICE = 0.1  # nats
SHARES = (0.1, 0.2, 0.4)
RESAMPLES = 1000
PAGES = 6  # responses on the page


def signals_of(model, input_ids: Tensor, mask: Tensor, **how) -> Signals:
    """What one scoring pass says, by train.py's own functions; `how` are arguments of train.py."""
    args, rows = train.Args(**how), torch.arange(len(mask), device=mask.device)
    with precision.autocast_for(model):
        some = rows[: train.SPAN_ROWS]
        heads = train.split_into_local_and_global(args, model, input_ids[some], mask[some])
        return train.score(args, model, input_ids, mask, rows, heads)


def without_first(signals: Signals, model, input_ids: Tensor, mask: Tensor) -> Signals:
    """The same, with WAAD, FAI and head split from attention without the first token's column (lab/sinks.py)."""
    args, rows = train.Args(), slice(train.SPAN_ROWS)
    how = {"layers": signals.heads.layers, "horizon": tuple(args.horizon), "drop_first": True}
    spans = linkage.per_head(model, input_ids[rows], mask[rows], **how).spans.view_as(signals.heads.spans)
    heads = Heads(signals.heads.layers, spans, *split_heads(spans, args.head_quantile))
    looks = linkage.per_head(model, input_ids, mask, **how)
    waad, fai = looks.waad[heads.is_local.flatten()].mean(0), looks.fai[heads.is_global.flatten()].mean(0)
    return signals._replace(waad=waad.to(mask.device), fai=fai.to(mask.device), heads=heads)


def on_cpu(signals: Signals) -> Signals:
    """The same, where the values are."""
    return Signals(*(x.cpu() for x in signals[:4]), signals.heads)


def scores(signals: Signals, mask: Tensor) -> dict[str, Tensor]:
    """What tokens can be ranked by, highest first: [B,N] each."""
    place = mask.cumsum(1).float()
    return {
        "FAI": signals.fai,
        "change of WAAD": credit.waad_change(signals.waad, mask),
        "WAAD": signals.waad,
        "entropy": signals.entropy,
        "surprise": -signals.logprobs,
        "position, early first": -place,
        "FAI × entropy": signals.fai * signals.entropy,
    }


def chosen(name: str, signals: Signals, mask: Tensor, q: float, lowest: bool = False) -> Tensor:
    """The tokens that a signal, or coupled credit, chooses: [B,N] float. Of a random choice its mean, q everywhere."""
    if name == "random":
        return mask * (torch.ceil(q * mask.sum(1) - 1e-6) / mask.sum(1).clamp(min=1))[:, None]
    if name == "coupled":
        return (credit.coupled_rhythm(signals.waad, signals.fai, mask, q, lowest=lowest) > 1).float()
    x = scores(signals, mask)[name]
    eligible = signals.fai > 0 if name == "FAI" else None
    return credit.top_q(-x if lowest else x, mask, q, eligible).float()


class Bootstrap:
    """Intervals over problems: every resample draws as many problems, with all their responses, with replacement."""

    def __init__(self, problem: Tensor):
        self.problem = problem.numpy()  # [B], each response's problem, numbered from 0
        count = self.problem.max() + 1
        rng = np.random.default_rng(0)
        self.draws = np.vstack([np.ones(count), rng.multinomial(count, np.full(count, 1 / count), RESAMPLES)])

    def sums(self, x) -> np.ndarray:
        """Sums of x, one number or array a response, in each draw; the first is the sample itself. [1 + R, ...]"""
        x = np.asarray(x, dtype=float)
        by_problem = np.zeros((self.draws.shape[1], *x.shape[1:]))
        np.add.at(by_problem, self.problem, x)
        return np.tensordot(self.draws, by_problem, 1)

    def ratio(self, one, other) -> list[float]:
        """[value, low, high] of a sum over responses over another."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.interval(self.sums(one) / self.sums(other))

    @staticmethod
    def interval(draws: np.ndarray) -> list[float]:
        """[value, low, high] from a statistic of every draw, the first the sample itself."""
        return [float(draws[0]), *map(float, np.nanquantile(draws[1:], [0.025, 0.975]))]


def held(weights: Tensor, square: Tensor, among: Tensor, bootstrap: Bootstrap) -> list[float]:
    """The share of dV^2 among some tokens that the chosen hold, with its interval."""
    return bootstrap.ratio((weights * square * among).sum(1), (square * among).sum(1))


def ceiling(values, mask: Tensor, q: float, bootstrap: Bootstrap) -> list[float]:
    """The share that the tokens of truly largest dV^2 hold: chosen by one half, measured by the other, both ways."""
    top = [credit.top_q(values.delta[half] ** 2, mask, q).float() for half in (1, 2)]
    one = sum((top[i] * values.square[2 - i] * mask).sum(1) for i in (0, 1))
    return bootstrap.ratio(one, sum((values.square[2 - i] * mask).sum(1) for i in (0, 1)))


NAMES = ("FAI", "change of WAAD", "WAAD", "coupled", "entropy", "surprise", "position, early first", "random")


def share_table(signals: Signals, values, mask: Tensor, bootstrap: Bootstrap) -> list[list]:
    """The main table. The produced column moves what is chosen to the token that its row produced, the next one."""
    square, rows = values.square[0], []
    for name in NAMES:
        picks = [chosen(name, signals, mask, q) for q in SHARES]
        if name == "random":
            others = [None, None]
        else:
            moved = credit.shift_to_produced(1 + picks[-1], mask) - 1
            others = [chosen(name, signals, mask, SHARES[-1], lowest=True), moved]
        cells = [held(w, square, mask, bootstrap) if w is not None else None for w in (*picks, *others)]
        rows.append([name, *cells, (picks[-1].sum() / mask.sum()).item()])
    best = [ceiling(values, mask, q, bootstrap) for q in SHARES]
    return [*rows, ["ceiling", *best, None, None, SHARES[-1]]]


def within(x: Tensor, mask: Tensor) -> np.ndarray:
    """Ranks of x within each response's marked tokens, from 0 to 1, in the order of x[mask]."""
    parts = [stats.rankdata(row[m].numpy()) - 1 for row, m in zip(x, mask) if m.any()]
    return np.concatenate([r / max(len(r) - 1, 1) for r in parts])


def choice_table(signals: Signals, values, mask: Tensor, bootstrap: Bootstrap) -> list[list]:
    """Among the choices alone: shares, the rank correlation with dV^2, and the matched ratio."""
    square, choice = values.square[0], mask & (signals.entropy > CHOICE)
    owner = choice.nonzero()[:, 0].numpy()  # the response of each choice
    y = square[choice].double().numpy()
    rank_y, rows = stats.rankdata(y), []
    ranked = scores(signals, mask)
    for name in (*ranked, "random"):
        top = (
            chosen("random", signals, choice, SHARES[-1])
            if name == "random"
            else credit.top_q(ranked[name], choice, SHARES[-1])
        )
        cells = [held(top.float(), square, choice, bootstrap), None, None]
        if name != "random":
            cells[1] = _correlation(within(ranked[name], choice), rank_y, owner, bootstrap)
            cells[2] = _matched(top[choice].numpy(), signals, choice, mask, y, owner, bootstrap)
        rows.append([name, *cells])
    rows.append(["ceiling", ceiling(values, choice, SHARES[-1], bootstrap), None, None])
    return rows


def _correlation(x: np.ndarray, y: np.ndarray, owner: np.ndarray, bootstrap: Bootstrap) -> list[float]:
    """Pearson of two arrays of ranks [tokens], with its interval; owner is each token's response."""
    terms = np.stack([np.ones(len(x)), x, y, x * x, y * y, x * y], 1)
    n, sx, sy, xx, yy, xy = bootstrap.sums(_by_response(terms, owner, bootstrap)).T
    return bootstrap.interval((n * xy - sx * sy) / np.sqrt((n * xx - sx**2) * (n * yy - sy**2)))


def _by_response(x: np.ndarray, owner: np.ndarray, bootstrap: Bootstrap) -> np.ndarray:
    out = np.zeros((len(bootstrap.problem), *x.shape[1:]))
    np.add.at(out, owner, x)
    return out


def _matched(top: np.ndarray, signals: Signals, choice: Tensor, mask: Tensor, y, owner, bootstrap) -> list[float]:
    """Mean y of the chosen over that of others paired with them, each pair counted in the chosen one's response."""
    place = (mask.cumsum(1) / mask.sum(1, keepdim=True).clamp(min=1))[choice].numpy()
    features = stats.zscore(np.stack([place, signals.entropy[choice].numpy()], 1))
    high, low = np.flatnonzero(top), np.flatnonzero(~top)
    pairs = linear_sum_assignment(cdist(features[high], features[low]))
    high, low = high[pairs[0]], low[pairs[1]]
    sums = _by_response(np.stack([y[high], y[low]], 1), owner[high], bootstrap)
    return bootstrap.ratio(sums[:, 0], sums[:, 1])


REGRESSORS = ("entropy", "position, early first", "FAI", "change of WAAD", "WAAD")


def regression(signals: Signals, values, mask: Tensor, bootstrap: Bootstrap) -> list[list]:
    """Weights of the ranks in a least-squares fit of dV^2 over its mean, choices alone; R^2 below."""
    choice = mask & (signals.entropy > CHOICE)
    owner, y = choice.nonzero()[:, 0].numpy(), values.square[0][choice].double().numpy()
    y, ranked = y / y.mean(), scores(signals, mask)
    columns = {name: within(ranked[name], choice) for name in REGRESSORS}
    models = [REGRESSORS[:2], (*REGRESSORS[:2], "FAI"), (*REGRESSORS[:2], "change of WAAD"), REGRESSORS]
    weights, fits = {}, []
    for i, names in enumerate(models):
        x = np.stack([np.ones(len(y)), *(columns[n] for n in names)], 1)
        moments = [x[:, :, None] * x[:, None], (x * y[:, None])[..., None]]
        xx, xy = (bootstrap.sums(_by_response(m, owner, bootstrap)) for m in moments)
        solved = np.linalg.solve(xx, xy)[..., 0]  # [1 + R, columns]
        weights |= {(i, n): bootstrap.interval(solved[:, j + 1]) for j, n in enumerate(names)}
        fits.append(1 - ((y - x @ solved[0]) ** 2).sum() / ((y - y.mean()) ** 2).sum())
    rows = [[name, *(weights.get((i, name)) for i in range(len(models)))] for name in REGRESSORS]
    return [*rows, ["R²", *(f"{fit:.4f}" for fit in fits)]]


def cell(x, percent: bool) -> str:
    """A share, or [value, low, high], as text; None as nothing."""
    if x is None or isinstance(x, str):
        return x or ""
    if isinstance(x, float):
        return f"{100 * x:.0f} %" if percent else f"{x:.2f}"
    return (
        "{:.0f} % ({:.0f} to {:.0f})".format(*(100 * v for v in x))
        if percent
        else "{:.2f} ({:.2f} to {:.2f})".format(*x)
    )


def tables(found, model, signals: Signals, input_ids: Tensor, mask: Tensor) -> dict[str, list[list[str]]]:
    """Every table by its title: rows of cells, the first row the heads."""
    values, rewards = found.values, found.rewards
    bootstrap = Bootstrap(torch.arange(len(mask)) // found.args.group)
    square = values.square[0]
    share = f"{SHARES[-1]:.0%}"
    main = share_table(signals, values, mask, bootstrap)
    out = {
        "Share of ΔV² held by the chosen tokens": [
            ["chosen by", *(f"highest {q:.0%}" for q in SHARES), f"lowest {share}", f"highest {share}, moved to the "
             "token produced", "tokens chosen"],
            *[[row[0], *(cell(x, True) for x in row[1:])] for row in main],
        ]
    }  # fmt: skip
    choice = mask & (signals.entropy > CHOICE)
    holds = cell(held(choice.float(), square, mask, bootstrap), True)
    part = f"{100 * choice.sum() / mask.sum():.0f} % of the tokens, {holds} of ΔV²"
    out[f"Among the choices alone: entropy above {CHOICE} nats, {part}"] = [
        ["chosen by", f"share of their ΔV² in the highest {share}", "rank correlation with ΔV²", "ΔV² over that of "
         "matched others"],
        *[[row[0], cell(row[1], True), *(cell(x, False) for x in row[2:])] for row in
          choice_table(signals, values, mask, bootstrap)],
    ]  # fmt: skip
    out["Does attention add to entropy? Weights of ranks in ΔV², choices alone"] = [
        ["rank of", "alone", "with FAI", "with the change of WAAD", "all"],
        *[[row[0], *(cell(x, False) for x in row[1:])] for row in regression(signals, values, mask, bootstrap)],
    ]
    out[f"Right and wrong responses apart, highest {share}"] = [
        ["chosen by", "right responses", "wrong responses"],
        *[
            [name, *(cell(held(chosen(name, signals, mask, SHARES[-1]), square, mask * side[:, None], bootstrap), True)
                     for side in (rewards == 1, rewards == 0))]
            for name in NAMES
        ],
    ]  # fmt: skip
    torch.manual_seed(0)
    untrained = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).to(model.device).eval()
    first_out = on_cpu(without_first(signals, model, input_ids, mask.to(model.device)))
    ways = {
        **{f"{where} layers": (model, {"layers": where}) for where in ("bottom", "middle", "top")},
        **{f"split {q:.0%}": (model, {"head_quantile": q}) for q in (0.2, 0.4, 0.5)},
        "all heads": (model, {"all_heads": True}),
        "first token's column out": (None, {}),
        "random weights": (untrained, {}),
    }
    kinds, rows = ("FAI", "change of WAAD", "WAAD", "coupled"), []
    for way, (whose, how) in ways.items():
        other = on_cpu(signals_of(whose, input_ids, mask.to(model.device), **how)) if whose else first_out
        cells = [held(chosen(k, other, mask, SHARES[-1]), square, mask, bootstrap) for k in kinds]
        cells += [held(credit.top_q(scores(other, mask)[k], choice, SHARES[-1]).float(), square, choice, bootstrap)
                  for k in kinds[:2]]  # fmt: skip
        rows.append([way, *(cell(x, True) for x in cells)])
    heads = [*kinds, *(f"{k}, choices alone" for k in kinds[:2])]
    out[f"Other layers and head splits, highest {share}"] = [["signals from", *heads], *rows]
    return out


def shares_figure(found, signals: Signals, mask: Tensor, path: Path) -> None:
    """The share of dV^2 in the highest 40 % by each signal: of all tokens, and of the choices."""
    bootstrap, square = Bootstrap(torch.arange(len(mask)) // found.args.group), found.values.square[0]
    choice, ranked = mask & (signals.entropy > CHOICE), scores(signals, mask)
    fig, axes = plt.subplots(1, 2, figsize=(12, 4), sharey=True)
    names = [n for n in NAMES if n not in ("coupled", "random")]
    for ax, among, title in (
        (axes[0], mask, "of all tokens"),
        (axes[1], choice, f"of the choices (entropy above {CHOICE})"),
    ):
        rows = {n: held(credit.top_q(ranked[n], among, SHARES[-1]).float(), square, among, bootstrap) for n in names}
        rows["ceiling"] = ceiling(found.values, among, SHARES[-1], bootstrap)
        for y, (name, (value, low, high)) in enumerate(rows.items()):
            color = {"ceiling": "tab:green", "entropy": "tab:gray"}.get(name, "tab:red")
            ax.errorbar(100 * value, y, xerr=[[100 * (value - low)], [100 * (high - value)]], fmt="o", capsize=3,
                        color=color)  # fmt: skip
        ax.axvline(40, color="black", lw=0.8, ls="--")
        ax.set(title=f"ΔV² held by the highest 40 % {title}", xlabel="%; dashed: a random choice")
        ax.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(rows)), rows)
    axes[0].invert_yaxis()
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def response_figure(tokens: list[str], series: dict[str, np.ndarray], before: np.ndarray, path: Path) -> None:
    """One response: V as a line, what each token was worth as bars up and down, and the signals beneath."""
    fig, axes = plt.subplots(
        len(series) + 1, 1, figsize=(max(8, 0.19 * len(tokens)), 1.3 * (len(series) + 1)), sharex=True,
        layout="constrained", height_ratios=[2, *[1] * len(series)],
    )  # fmt: skip
    t = np.arange(len(tokens))
    axes[0].step(t, before, where="mid", color="black", lw=1)
    axes[0].set(ylim=(-0.03, 1.03), ylabel="V before\nthe token")
    for ax, (name, x) in zip(axes[1:], series.items()):
        color = np.where(x < 0, "tab:red", "tab:green") if name == "ΔV" else "tab:blue"
        ax.bar(t, x - (name == "γ"), bottom=1.0 if name == "γ" else 0.0, color=color, width=0.9)
        ax.set_ylabel(name)
        ax.grid(axis="y", alpha=0.3)
    labels = axes[-1].set_xticks(t, [pictures.visible(token) for token in tokens], family="monospace", fontsize=9)
    for tick in labels:
        tick.label1.set_rotation(90 if len(tick.label1.get_text()) > 2 else 0)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def described(found, signals: Signals, mask: Tensor, gamma: Tensor, b: int, tokenizer) -> dict:
    """Response b for the page: its tokens, what each was worth, and what the tip of each says."""
    m, r = mask[b], found.rollouts[b]
    before, delta = (x[0, b][m].numpy() for x in (found.values.before, found.values.delta))
    waad, fai, entropy, g = (x[b][m].numpy() for x in (signals.waad, signals.fai, signals.entropy, gamma))
    tokens = [tokenizer.decode([t]) for t in r.ids]
    tips = [
        f"{pictures.visible(token)}\nposition {t}\nV {v:.2f}\nΔV {d:+.2f}\nWAAD {w:.2f}\n"
        f"FAI {f:.4f}\nentropy {e:.3f}\nγ {x:.2f}"
        for t, (token, v, d, w, f, e, x) in enumerate(zip(tokens, before, delta, waad, fai, entropy, g))
    ]  # fmt: skip
    return {
        "prompt": found.problems[b].prompt, "correct": found.rewards[b] == 1, "tokens": tokens, "tips": tips,
        "shades": {"ΔV, absolute": np.abs(delta), "WAAD": waad, "FAI": fai, "entropy": entropy},
        "series": {"ΔV": delta, "WAAD": waad, "FAI": fai, "entropy": entropy, "γ": g}, "before": before,
    }  # fmt: skip


def report(found, model, tokenizer, folder: Path) -> str:
    """Write index.html, tables.md and the pictures of a measurement (truth.Measured); returns the tables as text."""
    input_ids, mask, _ = (x.to(model.device) for x in pad_batch(found.rollouts))
    signals, mask = on_cpu(signals_of(model, input_ids, mask)), mask.cpu()
    gamma = credit.coupled_rhythm(signals.waad, signals.fai, mask)
    text = tables(found, model, signals, input_ids, mask)
    shares_figure(found, signals, mask, folder / "shares.png")
    decided = (found.values.square[0] > 0.02).sum(1)  # tokens that changed V by 0.14 or more
    shown = sorted(range(len(mask)), key=lambda b: (abs(int(mask[b].sum()) - 60) // 15, -int(decided[b])))[:PAGES]
    texts = [described(found, signals, mask, gamma, b, tokenizer) for b in shown]
    response_figure(texts[0]["tokens"], texts[0]["series"], texts[0]["before"], folder / "response.png")
    args, total = found.args, found.values.square[0].sum() / len(mask)
    intro = (
        f"{args.responses} responses to {args.task}, {100 * found.rewards.mean():.1f} % right, {int(mask.sum())} "
        f"tokens, {args.continuations} continuations of each beginning. A response's tokens hold {total:.2f} of ΔV²."
    )
    images = [folder / "shares.png", folder / "response.png"]
    (folder / "index.html").write_text(
        pictures.page(f"What the tokens of {args.model} were worth", intro, text, texts, images)
    )
    out = intro + "\n\n" + "\n\n".join(f"### {name}\n\n{markdown(rows)}" for name, rows in text.items())
    (folder / "tables.md").write_text(out + "\n")
    return out
