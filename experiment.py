"""The claim, tested: which credit learns fastest? Arms x seeds of train.py, and the table and figure of what came out.

    python experiment.py                 makes the runs that are not there yet, one after another; stop and start freely
    python experiment.py --report        table and figure from the committed records; nothing is run

Same warm start, same problems in the same order, same number of rollouts in every arm; only gamma differs. Fixed
before the arms were run: {steps} steps at a learning rate tuned for uniform (STUDY), held-out success on all 512 test
problems (one sample each) every {every} steps. Primary measure: mean held-out success over the last quarter of
training. Second: the mean over all of it (area under the curve). Both as differences to uniform, and to scaled, paired
by seed, with a 95 % bootstrap interval over seeds.

scaled gives every token the mean gamma of coupled: a gamma above 1 also makes the step larger. (AdamW divides by
the size of the gradient, so little is to be expected of it here; plain gradient descent would feel it.)
"""

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

import report

STEPS, EVERY, LR = 30, 5, "2e-4"
MAIN = {
    "uniform": ["--credit", "uniform"],
    "scaled": ["--credit", "scaled"],
    "random": ["--credit", "random"],
    "entropy": ["--credit", "entropy"],
    "local": ["--credit", "local"],
    "global": ["--credit", "global"],
    "coupled": ["--credit", "coupled"],
}
ABLATIONS = {
    "coupled, lowest 40 %": ["--lowest"],
    "coupled, q 0.2": ["--q", "0.2"],
    "coupled, q 0.6": ["--q", "0.6"],
    "coupled, q 1.0": ["--q", "1.0"],
    "coupled, positive only": ["--sign", "positive"],
    "coupled, all heads": ["--all_heads"],
    "coupled, on the token produced": ["--on_produced"],
}
STUDY = {f"uniform, lr {lr}": ["--credit", "uniform", "--lr", lr] for lr in ("1e-4", "4e-4", "8e-4")}
ARMS = {**MAIN, **ABLATIONS, **STUDY}
KEPT = ("step", "reward", "loss", "grad_norm", "entropy", "gamma", "length", "truncated", "equal_groups", "success")


@dataclass
class Args:
    """Run arms x seeds of the experiment that are not there yet, or report what there is."""

    task: str = HfArg(default="countdown-tiny", help="The difficulty: countdown-tiny or countdown-tiny4.")
    arms: list[str] = HfArg(default_factory=lambda: list(MAIN), help=f"Of: {'; '.join(ARMS)}.")
    seeds: list[int] = HfArg(default_factory=lambda: list(range(5)), help="A run of every arm for each.")
    folder: str = HfArg(default="experiment", help="Where the records are.")
    report: bool = HfArg(default=False, help="Run nothing; print the table and draw the figure.")


def record_of(args: Args, arm: str, seed: int) -> Path:
    """The file of a run's records."""
    name = arm.replace(" %", "").replace(",", "").replace(" ", "-")
    return Path(args.folder) / args.task / f"{name}-{seed}.jsonl"


def run(args: Args, arm: str, seed: int) -> None:
    """One run of train.py; its records, without times and stability, are written when it is through."""
    path = record_of(args, arm, seed)
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "train.py", "--task", args.task, "--lr", LR, *ARMS[arm], "--seed", str(seed),
            "--steps", str(STEPS), "--eval_every", str(EVERY), "--eval_samples", "1", "--save_every", str(STEPS),
            "--out", f"{folder}/run",
        ]  # fmt: skip
        subprocess.run(command, cwd=Path(__file__).parent, check=True)
        records = [json.loads(line) for line in Path(f"{folder}/run/metrics.jsonl").read_text().splitlines()]
        kept = [{k: round(r[k], 6) for k in KEPT if k in r} for r in records]
        path.parent.mkdir(parents=True, exist_ok=True)
        (Path(folder) / "records").write_text("".join(json.dumps(r) + "\n" for r in kept))
        shutil.copy(Path(folder) / "records", path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)


def curves(args: Args) -> dict[str, dict[int, np.ndarray]]:
    """Held-out success by arm, then seed: [evaluations], steps 0, EVERY, ... STEPS."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for arm in ARMS:
        for seed in range(100):
            if (path := record_of(args, arm, seed)).exists():
                records = map(json.loads, path.read_text().splitlines())
                found.setdefault(arm, {})[seed] = np.array([r["success"] for r in records if "success" in r])
    return found


def measures(curve: np.ndarray) -> np.ndarray:
    """[last quarter, area]: mean success over the evaluations in the last quarter of training, and over all.

    >>> measures(np.array([0.2, 0.4, 0.5, 0.5, 0.6, 0.6, 0.7])).round(3)
    array([0.65 , 0.508])
    """
    steps = np.arange(len(curve)) * EVERY
    return np.array([curve[steps >= 0.75 * steps[-1]].mean(), np.trapezoid(curve, steps) / steps[-1]])


def difference(one: dict[int, np.ndarray], other: dict[int, np.ndarray]) -> tuple[np.ndarray, int]:
    """Differences of the measures in points, paired by seed: [2 measures, (mean, low, high)]; and how many seeds."""
    seeds = sorted(one.keys() & other.keys())
    if len(seeds) < 2:
        return np.full((2, 3), np.nan), len(seeds)
    gaps = 100 * np.array([measures(one[s]) - measures(other[s]) for s in seeds])  # [seeds,2]
    if np.ptp(gaps, axis=0).min() == 0:
        return np.repeat(gaps.mean(0)[:, None], 3, 1), len(seeds)
    ends = stats.bootstrap((gaps,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return np.stack([gaps.mean(0), ends.low, ends.high], 1), len(seeds)


def table(found: dict[str, dict[int, np.ndarray]]) -> str:
    """The result as Markdown: an arm a line."""
    rows = [["arm", "seeds", "last quarter, %", "spread (sd)", "area, %", "last quarter − uniform", "area − uniform",
             "last quarter − scaled", "area − scaled"]]  # fmt: skip
    for arm, runs in found.items():
        got = 100 * np.array([measures(c) for c in runs.values()])  # [seeds,2]
        sd = f"{got[:, 0].std(ddof=1):.1f}" if len(got) > 1 else ""
        row = [arm, str(len(got)), f"{got[:, 0].mean():.1f}", sd, f"{got[:, 1].mean():.1f}"]
        for base in ("uniform", "scaled"):
            gaps, count = difference(runs, found.get(base, {}))
            row += ["" if arm == base or count < 2 else "{:+.1f} ({:+.1f} to {:+.1f})".format(*gap) for gap in gaps]
        rows.append(row)
    return report.markdown(rows)


def main(args: Args) -> None:
    if unknown := set(args.arms) - set(ARMS):
        sys.exit(f"error: --arms {', '.join(sorted(unknown))}: choose from {'; '.join(ARMS)}")
    todo = [(s, a) for s in args.seeds for a in args.arms if not record_of(args, a, s).exists()]
    for number, (seed, arm) in enumerate([] if args.report else todo, 1):
        if not record_of(args, arm, seed).exists():  # another process may have made it meanwhile
            print(f"run {number} of {len(todo)}: {arm}, seed {seed}", flush=True)
            run(args, arm, seed)
    found = curves(args)
    if not found:
        sys.exit(f"error: --folder {args.folder}: no records of {args.task} are there; run without --report")
    text, figure = table(found), Path(args.folder) / f"{args.task}.png"
    Path(args.folder, f"{args.task}.md").write_text(text + "\n")
    report.arms_figure({arm: runs for arm, runs in found.items() if arm in MAIN}, EVERY, figure)
    print(f"{text}\n{sum(map(len, found.values()))} runs: {figure}")


__doc__ = __doc__.format(steps=STEPS, every=EVERY)

if __name__ == "__main__":
    main(*HfArgumentParser(Args).parse_args_into_dataclasses())
