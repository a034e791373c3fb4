"""Every table of the laboratory's texts, from the committed records; nothing is run.

    python -m lab.report                   all tables (half a minute); writes lab/records/report.md and a figure
    python -m lab.report --only answer     some of: decisive, answer, runs, directions, values

A table that a long measurement has written as Markdown is itself the record: lab/records/**/*.md.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from transformers.hf_argparser import HfArg

from lab import alignment, decisive, experiment, truth
from lab.arms import ABLATIONS, BASELINE, READINGS
from lab.experiment import SHORT, area, last_quarter
from lab.stats import Estimate, Value, contrast_parts, fit, fit_contrast, permuted_slope, smallest_seen
from node.output import markdown, write_whole
from node.settings import parse_args

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RECORDS, FIGURES = Path("lab/records"), Path("lab/figures")
POOLED = ("countdown", "small", "harder")  # settings of all seven arms, five seeds each
OF_PAPER = ("local", "global", "coupled")  # its credits
MEASURES = {"area": area, "last quarter": last_quarter}
PAPER = {  # its final accuracies: Countdown (Table 3, Qwen3-4B); ablations on mathematics, as differences to its GRPO
    "uniform": "52.6", "random": "+2.4", "entropy": "+5.1", "local": "+7.3", "global": "+7.8", "coupled": "+10.5",
    "coupled, lowest": "maths −6.9", "coupled, q 0.2": "maths +1.2", "coupled, q 0.6": "maths +0.8",
    "coupled, q 1.0": "maths +0.4", "coupled, positive only": "maths +2.6", "coupled, all heads": "maths −0.6",
}  # fmt: skip


@dataclass
class Args:
    """Print the tables."""

    only: list[str] | None = HfArg(default=None, help="decisive, answer, runs, directions, values (default: all).")
    out: str = HfArg(default=str(RECORDS / "report.md"), help="File for all tables.")


# ---- Runs ----


def values(settings: Sequence[str], measure: str, pool: bool = True, last: int | None = None) -> list[Value]:
    """A measure of all runs of some settings; with pool, uniform, scaled and entropy are one arm, "baseline"."""
    return [
        Value("baseline" if pool and run.arm in BASELINE else run.arm, (s, run.seed), MEASURES[measure](run.success))
        for s in settings
        for run in experiment.read(s, last=last)
    ]


def answer() -> dict[str, list[list[str]]]:
    """The pooled contrasts, with the settings apart; and what could have been seen."""
    rows = [["arm − the pooled baseline, points", *MEASURES, "area, against uniform alone"]]
    for settings in (POOLED, *((s,) for s in POOLED)):
        for arm in ("coupled", "global", "local", "random"):
            cells = [fit_contrast(values(settings, m), arm, "baseline").text() for m in MEASURES]
            alone = fit_contrast(values(settings, "area", pool=False), arm, "uniform").text()
            rows.append([f"{arm}, {' + '.join(settings)}", *cells, alone])
    early = [["arm − baseline, small minibatches, first ten steps", "area", "p", "against uniform alone"]]
    pooled, apart = (values(("small",), "area", pool, SHORT) for pool in (True, False))
    for arms in (OF_PAPER, *((a,) for a in OF_PAPER)):
        as_one = [[v._replace(arm="credit") if v.arm in arms else v for v in found] for found in (pooled, apart)]
        e, alone = (fit_contrast(v, "credit", base) for v, base in zip(as_one, ("baseline", "uniform")))
        early.append([", ".join(arms) + " as one arm" * (len(arms) > 1), e.text(), f"{e.p:.3f}", alone.text()])
    return {
        "The answer: 105 runs of the tiny model": rows,
        "The first ten steps with small minibatches (found afterwards)": early,
        "What could have been seen": seeing(),
    }


def seeing() -> list[list[str]]:
    """By runs: the noise of coupled's difference, and the difference that is seen in 80 of 100 cases."""
    rows = [["coupled − baseline, runs", "seeds", "measure", "sd of a paired difference", "seen with 80 %"]]
    compared = [
        (" + ".join(settings), seeds, m, values(settings, m, pool), "baseline" if pool else "uniform")
        for settings, seeds, pool in ((POOLED, 15, True), *(((s,), 5, True) for s in POOLED), (("words",), 3, False))
        for m in MEASURES
    ]
    compared.append(("decisive", 100, "area", decisive_values(), "uniform"))
    for name, seeds, measure, found, base in compared:
        _, error, df = contrast_parts(found, "coupled", base)
        rows.append([name, str(seeds), measure, f"{fit(found).sd * 2**0.5:.1f}", f"{smallest_seen(error, df):.1f}"])
    return rows


def runs() -> dict[str, list[list[str]]]:
    """A table for each setting: means of the arms, and their differences to the baseline."""
    tables = {}
    for setting, (shared, _, _) in experiment.SETTINGS.items():
        if setting == "ablations":
            continue  # below, beside the first ten steps of "small"
        pool, found = setting in POOLED, list(experiment.read(setting))
        base = "baseline" if pool else "uniform"
        rows = [
            ["arm", "seeds", *(f"{m}, %" for m in MEASURES), *(f"{m} − {base}" for m in MEASURES), "reward", "paper"]
        ]
        for arm in dict.fromkeys(run.arm for run in found):
            mine = [run for run in found if run.arm == arm]
            means = [f"{np.mean([f(run.success) for run in mine]):.1f}" for f in MEASURES.values()]
            gaps = ["", ""]
            if arm not in (BASELINE if pool else ("uniform",)) and "study" not in setting:
                gaps = [fit_contrast(values((setting,), m, pool), arm, base).text() for m in MEASURES]
            late = np.mean([y[x > x[-1] / 2].mean() for x, y in (run.reward.T for run in mine)])
            rows.append([arm, str(len(mine)), *means, *gaps, f"{100 * late:.1f}", PAPER.get(arm, "")])
        tables[f"Runs, {setting}: `{shared}`"] = rows
    found = dose_values()
    rows = [["arm, first ten steps of small minibatches", "runs", "area − baseline", "paper"]]
    for arm in (*OF_PAPER, "random", *ABLATIONS):
        count = sum(v.arm == arm for v in found)
        rows.append([arm, str(count), fit_contrast(found, arm, "baseline").text(), PAPER.get(arm, "")])
    return tables | {"Runs, ablations": rows}


# ---- Directions ----


def dose_values(pool: bool = True) -> list[Value]:
    """The area over the first ten steps of small minibatches: the seven arms and the ablations, 56 runs."""
    ablations = [v._replace(block=("small", v.block[1])) for v in values(("ablations",), "area", pool)]
    return [*values(("small",), "area", pool, SHORT), *ablations]


def records_of_directions() -> dict[str, dict]:
    """The committed records of lab.alignment by name. The older tables lab/records/alignment*.md are not among them."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((RECORDS / "directions").glob("*.json"))}


def direction_of(record: dict, column: str, amp: float | None = None) -> dict[str, float]:
    """By arm, how much better than uniform its gradients point, in per cent; uniform 0. amp: at another gamma_amp."""
    base, found = record["arms"]["uniform"], {"uniform": 0.0}
    for name, arm in record["arms"].items():
        if name != "uniform":
            found[name] = alignment.compare(alignment.at_gamma(arm, base, amp) if amp else arm, base)[column].value
    return found


def decisive_values() -> list[Value]:
    """The area over the first ten steps in the decisive runs of equal minibatches, of arms with five runs or more."""
    runs, others = decisive.read_runs(), ("minibatches of 32", "20 steps")
    arms = {arm for arm in decisive.PLANS if sum(run["arm"] == arm for run in runs) >= 5 and not arm.endswith(others)}
    return [Value(run["arm"], run["seed"], run["area"]) for run in runs if run["arm"] in arms]


def dose(record: dict) -> list[list[str]]:
    """Do the runs do what the directions say? The slope of the area to step 10 on the direction, over arms."""
    rows = [["runs", "arms", "points of area per % that one minibatch points better", "p"]]
    first = ("first ones, gamma 4 (found afterwards)", dose_values(pool=False), 4.0)
    ours = ("decisive, one reading", [run for run in decisive_values() if run.arm not in READINGS], None)
    for name, runs, amp in (first, ours, ("decisive", decisive_values(), None)):
        mine = {run.arm for run in runs}
        x = {arm: gain for arm, gain in direction_of(record, "one minibatch", amp).items() if arm in mine}
        e = permuted_slope(runs, x)
        rows.append([f"{len(runs)} {name}", str(len(x)), e.text("+.3f"), f"{e.p:.2g}"])
    return rows


def directions() -> dict[str, list[list[str]]]:
    """The relation to the runs, and each record's tables."""
    records = records_of_directions()
    tables = {"Do the runs follow the directions? The first ten steps": dose(records["tiny"])}
    for name, record in records.items():
        tables[f"Directions, {name}: % better than uniform"] = alignment.table(record)
        if "tokens" in record:
            tables[f"Directions, {name}: what holds signal and noise"] = alignment.token_table(record)
    return tables


# ---- Token values, and the decisive experiment ----


def token_values() -> dict[str, list[list[str]]]:
    """The free check of the token values: their sum over a response is the variance of the outcome."""
    rows = [["measurement", "sum of ΔV² over a response", "V0 (1 − V0)", "variance of the responses' verdicts"]]
    for folder in ("truth", "truth-words"):
        rows.append([folder, *(f"{x:.3f}" for x in truth.outcome_variance(truth.read(RECORDS / folder)))])
    return {"A check of the token values: three ways to the variance of the outcome": rows}


# ---- Figures ----


def answer_rows() -> list[tuple[str, Estimate]]:
    """What the answer's figure shows, by what it says: differences to plain GRPO, in points."""
    rows = []
    for (one, other), (area_gain, *_) in decisive.contrasts(decisive.read_runs()).items():
        if area_gain and other.startswith("uniform"):
            rows.append((one.replace("uniform, m", "plain GRPO, m"), area_gain))
    old = values(POOLED, "area")
    rows += [(f"{arm}, 105 older runs, pooled baseline", fit_contrast(old, arm, "baseline")) for arm in OF_PAPER]
    return rows


def answer_figure(path: Path) -> None:
    """Left: differences to plain GRPO. Right: direction against gain, arm by arm."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(13, 4.4))
    rows = answer_rows()
    for y, (name, e) in enumerate(rows):
        color = "tab:gray" if "older" in name else "tab:red"
        left.errorbar(e.value, y, xerr=[[e.value - e.low], [e.high - e.value]], fmt="o", capsize=3, color=color)
    left.axvline(0, color="black", lw=0.8)
    left.set_yticks(range(len(rows)), [name for name, _ in rows])
    left.invert_yaxis()
    left.set(xlabel="points of area more than plain GRPO, 95 %", title="The tiny model: is credit ahead?")
    record = records_of_directions()["tiny"]
    for runs, amp, color in ((dose_values(pool=False), 4.0, "tab:gray"), (decisive_values(), None, "tab:red")):
        x = direction_of(record, "one minibatch", amp)
        for i, arm in enumerate(sorted({run.arm for run in runs if run.arm in x} - {"uniform"}, key=x.get)):
            e, low = fit_contrast(runs, arm, "uniform"), -12 - 8 * (i % 4)
            right.errorbar(x[arm], e.value, yerr=[[e.value - e.low], [e.high - e.value]], fmt="o", color=color, lw=0.7)
            right.annotate(arm.replace("coupled, ", "").replace(", q 0.2", ""), (x[arm], e.value), fontsize=7,
                           xytext=(4, low if amp is None else 3), textcoords="offset points", color=color)  # fmt: skip
    right.axhline(0, color="black", lw=0.8)
    right.margins(x=0.15)
    right.set(xlabel="a minibatch's gradient points better than uniform's by, %", ylabel="area to step 10 − uniform's",
              title="Does pointing better pay? Grey: older, γ 4; red: decisive")  # fmt: skip
    fig.tight_layout()
    fig.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(fig)


SECTIONS = {"answer": answer, "runs": runs, "directions": directions, "values": token_values}


def text_of(section: str) -> str:
    """A section as Markdown."""
    if section == "decisive":
        return f"## The decisive experiment\n\n{decisive.report()}"
    tables = (f"### {title}\n\n{markdown(rows)}" for title, rows in SECTIONS[section]().items())
    return f"## {section.capitalize()}\n\n" + "\n\n".join(tables)


def main(args: Args) -> None:
    names = args.only or ["decisive", *SECTIONS]
    if unknown := set(names) - {"decisive", *SECTIONS}:
        raise SystemExit(f"error: --only {', '.join(sorted(unknown))}: choose from decisive, {', '.join(SECTIONS)}")
    text = "\n\n".join(map(text_of, names)) + "\n"
    print(text)
    if not args.only:
        write_whole(Path(args.out), text)
        FIGURES.mkdir(exist_ok=True)
        answer_figure(FIGURES / "answer.png")
        print(f"{args.out}, {FIGURES}/answer.png")


if __name__ == "__main__":
    main(parse_args(Args))
