"""The claim, tested: which credit learns fastest? Arms x seeds of train.py, and the table and figure of what came out.

    python -m lab.experiment                    makes the runs that are not there yet; stop and start freely
    python -m lab.experiment --setting small    the second round; also harder, words, ablations and the studies
    python -m lab.experiment --report           tables and figures from the committed records; nothing is run

What holds in every setting. Same warm start, same problems in the same order, same number of rollouts in every arm;
only gamma differs (in the committed records also random's minibatches, which were drawn after its tokens). Held-out
success on 512 test problems, one sample each. Main arms have five seeds, ablations three. Primary measure: mean
held-out success over the evaluations in the last quarter of training. Second: the area under its curve, as a mean.
Both as differences to uniform, and to scaled, paired by seed, with a 95 % bootstrap interval over seeds (percentile;
with five seeds it is narrower than it should be, by about a third against Student's t, so a star marks what has p <
0.05 in a paired t-test as well).

scaled gives every token the mean gamma of coupled: the same size of step without a choice of tokens. AdamW divides a
gradient by its size, so that scaled should equal uniform up to the noise of the runs: if it does, no gain of another
arm is one of a larger step, and how far the two lie apart says what noise can do.

The study (--setting study) and what it decided. The warm start succeeds 31 % of the time on three numbers up to 15
and 20 % up to 18 (the harder problems); it never solves two or four numbers, so nothing could be learned there.
Learning rates for uniform over 30 steps: the area under the curve is largest with 2e-4; 1e-4 is slower and 4e-4 loses
what it gained. Uniform rises by 15 points in five steps, 24 in ten, and is flat from step 15 to 20 on, near 57 %,
where a third of the responses are cut at 128 tokens: there the limit on length decides more than the credit. Where
the curve is flat, evaluations of a run vary with a standard deviation of 1.6 points; a difference of two runs' last
quarters by as much, and say 2 with what differs between runs. By a t-test then 3 points are seen with five seeds in
71 of 100 cases, with six in 83; 2 points would need ten.

Round 1 (--setting countdown), fixed before any arm was run: 12 steps, nine tenths of the rise, of 256 rollouts, four
updates of 64 each, learning rate 2e-4, gamma 1.5, an evaluation every three steps.

Round 2 (--setting small), fixed after round 1 had shown no arm to differ from uniform by more than noise, and before
any of its arms was run. lab/alignment.py had shown why: a minibatch of 64 rollouts already points well at where success
rises, credit makes the direction less noisy, not better, and with gamma 1.5 that is worth 4 % of speed. So all arms
get smaller minibatches and a louder gamma: 20 steps of 64 rollouts, four updates of 16 each, gamma 4, an evaluation
every five steps, and the learning rate with the largest area for uniform in this setting (--setting study-small).

The ablations and the harder problems have round 2's batches, and for want of time 10 steps (fixed while round 2 ran,
before any of these was). Ablations are compared with the first 10 steps of round 2's runs: what a run does does not
depend on how many steps are to follow.

The language model (--setting words), fixed before any of its runs was made: SmolLM2-135M as lab.smollm warm-starts it,
Countdown in words, 8 steps of 64 rollouts, four updates of 16 each, for these are the minibatches in which local's
gradients point 23 % better. gamma 1.5; learning rate 4e-5, twice one that was seen to learn in longer runs, and not
tuned further. Uniform, local and coupled, three seeds, 256 held-out problems before and after. By the noise of
evaluation alone a difference has a standard deviation of 2 points: a difference of 5 would be seen, one of 2 not.

Three things were added after those nine runs had been seen, and fixed before they were run themselves (--setting
words-anew; both new arms are runs of lab.variants). content is the cheapest stand-in for an oracle: gamma on the tokens
that decide, by the text, three seeds. "coupled, no first token" takes WAAD, FAI and the split from attention without
its sink; in directions it was the arm that gained most as AdamW scales them; three seeds. And the learning rate:
uniform with half and with twice the rate, two seeds each (--setting study-words). If another rate turns out better by
more than noise, then these arms were compared at a wrong one. entropy has no runs: its gradient is uniform's to a fifth
of a per cent. The warm start, made anew on another machine, turned out to be another model, 22.9 % right where the
first had 19.1; so these runs have a uniform of their own, three seeds.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from scipy import stats
from transformers.hf_argparser import HfArg

from lab import report
from node.output import markdown, write_whole
from node.settings import parse_args

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
    "coupled, lowest": ["--lowest"],
    "coupled, q 0.2": ["--q", "0.2"],
    "coupled, q 0.6": ["--q", "0.6"],
    "coupled, q 1.0": ["--q", "1.0"],
    "coupled, positive only": ["--sign", "positive"],
    "coupled, all heads": ["--all_heads"],
    "coupled, on the token produced": ["--on_produced"],
}
STUDY = {f"uniform, lr {lr}": ["--credit", "uniform", "--lr", lr] for lr in ("1e-4", "2e-4", "4e-4")}
STUDY_WORDS = {f"uniform, lr {lr}": ["--credit", "uniform", "--lr", lr] for lr in ("2e-5", "8e-5")}
VARIANTS = {  # arms of lab.variants, in place of train.py
    "content": ["--variant", "content"],
    "coupled, no first token": ["--variant", "no_first_token", "--credit", "coupled"],
}
TRIED = {  # for a better credit, in lab.alignment alone: no runs were made of these
    "local, q 0.1": ["--credit", "local", "--q", "0.1"],
    "local, q 0.2": ["--credit", "local", "--q", "0.2"],
    "local, all heads": ["--credit", "local", "--all_heads"],
    "global, q 0.2": ["--credit", "global", "--q", "0.2"],
    "coupled, q 0.1": ["--q", "0.1"],
    "coupled, all to the intro": ["--alpha", "1"],
}
ARMS = {**MAIN, **ABLATIONS, **TRIED, **VARIANTS, **STUDY, **STUDY_WORDS}
SMALL, SHORT = "--prompts 8 --gamma_amp 4", 10  # 64 rollouts a step, 16 an update; steps for want of time
WORDS = (
    "--model runs/smollm-words --task countdown-words --prompts 8 --minibatches 4 --lr 4e-5 --steps 8 "
    "--max_tokens 192 --max_model_len 256 --kv_cache_gib 2 --eval_problems 256 --eval_every 0"
)
SETTINGS = {  # the arguments that all its arms share, the arms, and the number of seeds
    "countdown": ("--task countdown-tiny --lr 2e-4 --steps 12 --eval_every 3", MAIN, 5),
    "small": (f"--task countdown-tiny {SMALL} --lr 2e-4 --steps 20 --eval_every 5", MAIN, 5),
    "ablations": (f"--task countdown-tiny {SMALL} --lr 2e-4 --steps {SHORT} --eval_every 5", ABLATIONS, 3),
    "harder": (f"--task countdown-tiny18 {SMALL} --lr 2e-4 --steps {SHORT} --eval_every 5", MAIN, 5),
    "words": (WORDS, {arm: MAIN[arm] for arm in ("uniform", "local", "coupled")}, 3),
    "words-anew": (WORDS, {"uniform": MAIN["uniform"], **VARIANTS}, 3),
    "study": ("--task countdown-tiny --steps 30 --eval_every 5", STUDY, 2),
    "study-small": (f"--task countdown-tiny {SMALL} --steps 20 --eval_every 5", STUDY, 2),
    "study-words": (WORDS, STUDY_WORDS, 2),
}
BESIDE = {  # settings whose tables also show arms of another one: which, which arms, and how many seeds
    "ablations": ("small", ("uniform", "scaled", "coupled"), 3),
    "study-words": ("words-anew", ("uniform",), 2),
}
PAPER = {  # its final accuracies: Countdown (Table 3, Qwen3-4B); ablations on mathematics, as differences to its GRPO
    "uniform": "52.6",
    "random": "55.0",
    "entropy": "57.7",
    "local": "59.9",
    "global": "60.4",
    "coupled": "63.1",
    "coupled, lowest": "maths −6.9",
    "coupled, q 0.2": "maths +1.2",
    "coupled, q 0.6": "maths +0.8",
    "coupled, q 1.0": "maths +0.4",
    "coupled, positive only": "maths +2.6",
    "coupled, all heads": "maths −0.6",
}
KEPT = ("step", "reward", "loss", "grad_norm", "entropy", "gamma", "length", "truncated", "equal_groups", "success")


@dataclass
class Args:
    """Run arms x seeds of the experiment that are not there yet, or report what there is."""

    setting: Literal[*SETTINGS] = HfArg(default="countdown", help="What all arms share.")
    arms: list[str] | None = HfArg(default=None, help=f"Some of: {'; '.join(ARMS)} (default: the setting's).")
    seeds: list[int] | None = HfArg(
        default=None,
        help="A run of every arm for each (default: as many as the protocol has, from 0).",
    )
    folder: str = HfArg(default="lab/records", help="Where the records are.")
    report: bool = HfArg(default=False, help="Run nothing; tables and figures of all settings.")


def record_of(args: Args, arm: str, seed: int) -> Path:
    """The file of a run's records."""
    name = arm.replace(",", "").replace(" ", "-")
    return Path(args.folder) / args.setting / f"{name}-{seed}.jsonl"


def run(args: Args, arm: str, seed: int) -> None:
    """One run of train.py, or of lab.variants; its records, without times, are written when it is through."""
    path, program = record_of(args, arm, seed), ["-m", "lab.variants"] if arm in VARIANTS else ["train.py"]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, *program, *SETTINGS[args.setting][0].split(), *ARMS[arm], "--seed", str(seed),
            "--eval_samples", "1", "--save_every", "100", "--micro_tokens", "1024", "--out", f"{folder}/run",
        ]  # fmt: skip
        subprocess.run(command, cwd=Path(__file__).parents[1], check=True)
        records = [json.loads(line) for line in Path(f"{folder}/run/metrics.jsonl").read_text().splitlines()]
        kept = [{k: round(r[k], 6) for k in KEPT if k in r} for r in records]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, "".join(json.dumps(r) + "\n" for r in kept))


def curves(args: Args, what: str = "success") -> dict[str, dict[int, np.ndarray]]:
    """By arm, then seed: [records, (step, held-out success or reward)]. Ablations: beside round 2's first steps."""
    found: dict[str, dict[int, np.ndarray]] = {}
    other, borrowed, seeds = BESIDE.get(args.setting, ("", (), 0))
    for arm in ARMS:
        beside = arm in borrowed
        for seed in range(seeds if beside else 100):
            if (path := record_of(replace(args, setting=other) if beside else args, arm, seed)).exists():
                records = map(json.loads, path.read_text().splitlines())
                curve = np.array([(r["step"], r[what]) for r in records if what in r])
                found.setdefault(arm, {})[seed] = curve[curve[:, 0] <= SHORT] if beside else curve
    return found


def measures(curve: np.ndarray) -> np.ndarray:
    """[last quarter, area]: mean success over the evaluations in the last quarter of training, and over all of it.

    >>> measures(np.array([(0, 0.2), (3, 0.4), (6, 0.5), (9, 0.6), (12, 0.7)])).round(4)
    array([0.65  , 0.4875])
    """
    steps, success = curve.T
    return np.array([success[steps >= 0.75 * steps[-1]].mean(), np.trapezoid(success, steps) / steps[-1]])


def difference(one: dict[int, np.ndarray], other: dict[int, np.ndarray]) -> tuple[np.ndarray, int]:
    """Differences of the measures in points, paired by seed, and how many seeds: [2 measures, (mean, low, high, p)].

    low and high are the bootstrap's, p the paired t-test's.
    """
    seeds = sorted(one.keys() & other.keys())
    if len(seeds) < 2:
        return np.full((2, 4), np.nan), len(seeds)
    gaps = 100 * np.array([measures(one[s]) - measures(other[s]) for s in seeds])  # [seeds,2]
    if np.ptp(gaps, axis=0).min() == 0:
        return np.stack([*[gaps.mean(0)] * 3, np.full(2, np.nan)], 1), len(seeds)
    ends = stats.bootstrap((gaps,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return np.stack([gaps.mean(0), ends.low, ends.high, stats.ttest_1samp(gaps, 0).pvalue], 1), len(seeds)


def table(found: dict[str, dict[int, np.ndarray]], rewards: dict[str, dict[int, np.ndarray]]) -> str:
    """The result as Markdown: an arm a line. rewards, as curves gives them: of the training rollouts."""
    rows = [["arm", "seeds", "last quarter, % (sd)", "− uniform", "− scaled", "area, % (sd)", "− uniform", "− scaled",
             "reward, last half, %", "paper"]]  # fmt: skip
    for arm, runs in found.items():
        got = 100 * np.array([measures(c) for c in runs.values()])  # [seeds,2]
        cells = [[f"{x.mean():.1f}" + (f" ({x.std(ddof=1):.1f})" if len(x) > 1 else "")] for x in got.T]
        for base in ("uniform", "scaled"):
            gaps, count = difference(runs, found.get(base, {}))
            for cell, gap in zip(cells, gaps):
                text = "{:+.1f} ({:+.1f} to {:+.1f})".format(*gap) + ("*" if gap[3] < 0.05 else "")
                cell.append("" if arm == base or count < 2 else text)
        late = np.mean([y[x > x[-1] / 2].mean() for x, y in (curve.T for curve in rewards[arm].values())])
        rows.append([arm, str(len(runs)), *cells[0], *cells[1], f"{100 * late:.1f}", PAPER.get(arm, "")])
    return markdown(rows)


def main(args: Args) -> None:
    _, known, seeds = SETTINGS[args.setting]
    arms = list(known) if args.arms is None else args.arms
    if unknown := set(arms) - set(known):
        sys.exit(f"error: --arms {', '.join(sorted(unknown))}: choose from {'; '.join(known)}")
    todo = [(s, a) for s in args.seeds or range(seeds) for a in arms]
    todo = [(s, a) for s, a in todo if not args.report and not record_of(args, a, s).exists()]
    for number, (seed, arm) in enumerate(todo, 1):
        if not record_of(args, arm, seed).exists():  # another process may have made it meanwhile
            print(f"run {number} of {len(todo)}: {arm}, seed {seed}", flush=True)
            run(args, arm, seed)
    for setting in SETTINGS if args.report else [args.setting]:
        if found := curves(one := replace(args, setting=setting)):
            text, figure = table(found, curves(one, "reward")), Path(args.folder) / f"{setting}.png"
            Path(args.folder, f"{setting}.md").write_text(text + "\n")
            gaps = {a: difference(runs, found.get("uniform", {})) for a, runs in found.items() if a != "uniform"}
            shown = list(found) if "study" in setting else [*MAIN, *VARIANTS]
            report.arms_figure(found, {a: gap for a, (gap, n) in gaps.items() if n > 1}, shown, figure)
            print(f"{setting}: {SETTINGS[setting][0]}\n\n{text}\n\n{figure}\n")
    runs = {setting: len(list(Path(args.folder, setting).glob("*.jsonl"))) for setting in SETTINGS}
    if not (total := sum(runs.values())):
        sys.exit(f"error: --folder {args.folder}: no records are there; run without --report")
    by = ", ".join(f"{setting} {n}" for setting, n in runs.items() if n)
    print(f"{total} runs ({by}); tables and figures: {args.folder}/")


if __name__ == "__main__":
    main(parse_args(Args))
