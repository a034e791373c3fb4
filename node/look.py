"""A page to look at runs: curves of what they logged, and responses of each step with their tokens coloured by gamma.

    python -m node.look RUN                    writes RUN/look.html
    python -m node.look RUN RUN --out FILE     several runs on one page, each compared with the first

A RUN is the folder that train.py wrote. The run may still be going on, or may have been killed: the page shows what was
logged so far. The page needs no other file. Its form is look.html.
"""

import argparse
import json
import math
import shlex
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from node.output import mean_interval, print_in_any_locale, write_whole

TEMPLATE = Path(__file__).with_name("look.html")
MOST_SAMPLES = 100  # steps of a run whose responses are on the page; a page of 500 real steps would have 15 MB


class Chart(NamedTuple):
    """One curve over the steps, from a field of metrics.jsonl. of: the field that it is a share of."""

    title: str
    unit: str
    field: str
    meaning: str
    of: str | None = None


# What each curve shows, in a sentence or two.
CHARTS = (
    Chart("Reward", "", "reward", "Mean reward of all responses that were sampled in the step."),
    Chart("Length", "tokens", "length", "Mean number of tokens of a response."),
    Chart(
        "Entropy", "nats", "entropy",
        "How uncertain the model is of its next token: the mean entropy of the distributions that tokens were drawn "
        "from. Near 0, all responses to a problem are alike.",
    ),
    Chart(
        "Clipped tokens", "% of tokens", "clip_fraction",
        "Share of the trained tokens without gradient, because their probability has already moved out of the clip "
        "range.",
    ),
    Chart(
        "KL to π_old", "nats", "kl",
        "How far the gradient steps on one batch have moved the model from π_old, the model that sampled it: an "
        "estimate of the KL divergence per token.",
    ),
    Chart(
        "Gap", "nats", "gap_mean",
        "How far sampler and trainer disagree: the mean difference of their log-probabilities of a token. It must stay "
        "small.",
    ),
    Chart(
        "Cut off", "% of responses", "truncated", "Share of the responses that reached --max_tokens before they ended.",
        of="responses",
    ),
    Chart("Empty", "% of responses", "empty", "Share of the responses without any text.", of="responses"),
    Chart(
        "Equal groups", "% of groups", "equal_groups",
        "Share of the groups whose responses all have the same reward. Nothing is learned from them.", of="problems",
    ),
    Chart("Mean γ", "", "gamma", "Mean factor on the advantages of the trained tokens; 1 in plain GRPO."),
    Chart(
        "Gradient norm", "", "grad_norm",
        "Length of the gradient, before it is clipped to 1. It is 0 if all groups are equal.",
    ),
    Chart("Learning rate", "", "lr", "Step size of the optimizer, AdamW."),
)  # fmt: skip


class Run(NamedTuple):
    """What lies in a run's folder."""

    name: str
    folder: Path
    args: dict
    steps: list[dict]  # records of metrics.jsonl, one for each step
    evaluations: list[dict]  # records of metrics.jsonl, one for each evaluation
    per_problem: list[dict]  # lines of evaluations.jsonl
    samples: list[dict]  # lines of samples.jsonl


# ---- reading; a run that is going on must not be disturbed, so nothing is written ----


def read_run(folder: Path, name: str) -> Run:
    """The run in a folder. ValueError if there is none, or if it has logged nothing yet."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder. Give the folder of a run, such as runs/countdown-tiny-coupled-1")
    if not (folder / "metrics.jsonl").is_file() or not (folder / "args.json").is_file():
        raise ValueError(f"{folder}: not a run, because it has no metrics.jsonl and args.json, which train.py writes")
    records = [r for r in read_records(folder / "metrics.jsonl") if "reward" in r or "success" in r]
    if not records:
        raise ValueError(f"{folder}: this run has not logged anything yet. Try again after its first evaluation")
    try:
        args = json.loads((folder / "args.json").read_text(encoding="utf-8", errors="replace"))
    except ValueError as e:
        raise ValueError(f"{folder}/args.json: not valid JSON ({e})") from e
    return Run(
        name=name,
        folder=folder,
        args=args,
        steps=[r for r in records if "reward" in r],
        evaluations=[r for r in records if "success" in r],
        per_problem=read_records(folder / "evaluations.jsonl"),
        samples=read_records(folder / "samples.jsonl"),
    )


def read_records(file: Path) -> list[dict]:
    """The lines of a JSONL file; none if there is no file. A last line that is only half there is left out."""
    if not file.exists():
        return []
    records, lines = [], [line for line in file.read_text(encoding="utf-8", errors="replace").split("\n") if line]
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or "step" not in record:
                raise ValueError("not an object with a step")
            records.append(record)
        except ValueError as e:
            if number < len(lines):
                raise ValueError(f"{file} line {number}: {e}. Remove this line") from e
    return records


def name_runs(folders: list[Path]) -> list[str]:
    """A name for each run: the last part of its path, or the whole path if another run has the same last part."""
    last = [folder.resolve().name for folder in folders]
    return [name if last.count(name) == 1 else str(folder) for name, folder in zip(last, folders)]


# ---- what the page shows ----


def curve(run: Run, chart: Chart) -> list[list]:
    """The points (step, value) of a curve; a step that has not logged the field is left out."""
    points = []
    for record in run.steps:
        value = record.get(chart.field)
        whole = record.get(chart.of) if chart.of else 1
        if value is None or not whole:
            continue
        factor = 100 if chart.unit.startswith("%") else 1
        points.append([record["step"], factor * value / whole])
    return points


def seconds(run: Run) -> dict[str, list[list]]:
    """The points (step, seconds) of each phase."""
    phases: dict[str, list[list]] = {}
    for record in run.steps:
        for phase, spent in record.get("seconds", {}).items():
            phases.setdefault(phase, []).append([record["step"], spent])
    return phases


def compare(first: Run, other: Run) -> dict:
    """Last held-out success of a run minus that of the first, in points: the mean over problems of the difference."""
    for run in (first, other):
        if not run.per_problem:
            return {"why_not": f"{run.name} has no evaluations.jsonl yet, or was made by an older version"}
    a, b = first.per_problem[-1], other.per_problem[-1]
    if a["problems"] != b["problems"]:
        return {"why_not": "cannot be paired, because the two runs have different held-out problems"}
    mean, half = mean_interval(torch.tensor(b["success"]) - torch.tensor(a["success"]))
    note = "" if a["step"] == b["step"] else f", after {b['step']} steps; the first run after {a['step']} steps"
    return {"difference": 100 * mean, "half": 100 * half, "note": note}


def choose_evenly(items: list, most: int) -> list:
    """At most this many of them, at even distances, with the first and the last.

    >>> choose_evenly(list(range(10)), 4)
    [0, 3, 6, 9]
    """
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def visible(text: str) -> str:
    """Text whose line breaks, tabs and invisible characters are seen. Spaces and line breaks stay in place.

    >>> visible("a b\\tc\\x00\\u202e")
    'a b⇥c\\\\x00\\\\u202e'
    """
    shown = text.replace("\t", "⇥")
    shown = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in shown)
    return shown.replace("\n", "↵\n")


def show_sample(sample: dict) -> dict:
    """A line of samples.jsonl, its text made visible."""
    responses = [r | {"tokens": [visible(token) for token in r["tokens"]]} for r in sample["responses"]]
    return sample | {"prompt": visible(sample["prompt"]), "responses": responses}


def describe_run(run: Run, first: Run) -> dict:
    """All that the page shows of a run, as lists and plain numbers."""
    return {
        "name": run.name,
        "args": {name: run.args.get(name) for name in ("model", "task", "credit", "seed", "steps", "sign")},
        "step": max(r["step"] for r in run.steps + run.evaluations),
        "success": [[r["step"], 100 * r["success"], 100 * r["half_width_95"]] for r in run.evaluations],
        "comparison": None if run is first else compare(first, run),
        "curves": [curve(run, chart) for chart in CHARTS],
        "seconds": seconds(run),
        "sampled": len(run.samples),
        "samples": [show_sample(s) for s in choose_evenly(run.samples, MOST_SAMPLES)],
    }


def shorten_numbers(x):
    """Floats to six digits, in whatever lists and dicts; None for those that JSON does not have (NaN, infinity)."""
    if isinstance(x, float):
        return float(f"{x:.6g}") if math.isfinite(x) else None
    if isinstance(x, dict):
        return {name: shorten_numbers(value) for name, value in x.items()}
    return [shorten_numbers(value) for value in x] if isinstance(x, list) else x


def make_page(runs: list[Run], command: str) -> str:
    """The page: the template with all data in it. They are JSON without <, > and &, so no text can end it."""
    facts = {
        "runs": [describe_run(run, runs[0]) for run in runs],
        "charts": [chart._asdict() for chart in CHARTS],
        "command": command,
        "time": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }
    data = json.dumps(shorten_numbers(facts), separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        data = data.replace(character, f"\\u{ord(character):04x}")
    return TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", data)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m node.look", description="Make one HTML page of one or several runs."
    )
    parser.add_argument("run", nargs="+", help="Folder that train.py wrote; the others are compared with the first.")
    parser.add_argument("--out", help="File for the page (default: look.html in the first run's folder).")
    print_in_any_locale()
    args = parser.parse_args(argv)
    folders = list(dict.fromkeys(Path(name) for name in args.run))
    out = Path(args.out) if args.out else folders[0] / "look.html"
    try:
        runs = [read_run(folder, name) for folder, name in zip(folders, name_runs(folders))]
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, make_page(runs, shlex.join(["python", "-m", "node.look", *(argv or sys.argv[1:])])))
    except OSError as e:
        sys.exit(f"error: {e.filename or out}: {e.strerror}")
    except ValueError as e:
        sys.exit(f"error: {e}")
    steps = " + ".join(str(len(run.steps)) for run in runs)
    print(f"a page of {len(runs)} run{'s'[: len(runs) > 1]} with {steps} steps: {out} (open it in a browser)")


if __name__ == "__main__":
    main()
