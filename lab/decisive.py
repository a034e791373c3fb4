"""The decisive experiment: does coupled credit make the first ten steps better than plain GRPO?

    python -m lab.decisive --worker 0 2 & python -m lab.decisive --worker 1 2     one process a core; resumable
    python -m lab.decisive --table                                                what the runs say, however many

PROTOCOL, written before the first run.

Why. Five seeds an arm cannot see a gain of one point. The direction of coupled's gradient (lab/alignment.py)
predicts a gain of 0.3 to 0.5 points of area. About 100 runs an arm can see that.

Setting. The tiny model, countdown-tiny. 10 steps of 8 problems x 8 responses, four updates of 16 responses each,
learning rate 2e-4, up to 128 tokens: the setting "small" of lab/experiment.py, at half its length. In every arm
gamma is divided by its mean over the step's response tokens, so that no arm takes larger steps (the gradient is
clipped at norm 1 in many steps, so a louder gamma would also be clipped more often). Held-out success is the mean
over 512 test problems and two sampled responses to each, at steps 5 and 10. At step 0 all arms are the same model,
which is evaluated once.

Arms, each with seeds from 100 on (no seed of an earlier experiment is used again):

    uniform                         100 runs    plain GRPO
    coupled                         100 runs    the paper's: gamma 1.5, q 0.4
    coupled, gamma 4, q 0.2          60 runs    the direction that gained most in lab/alignment.py
    uniform, minibatches of 32       20 runs    the positive control: two updates of 32, which are known to point better

A seed fixes the problems of each step, and the random numbers that sampling starts from. So arms are paired by
seed. A run that breaks is run again with its seed. No run is left out.

Measures. Primary, one contrast: coupled - uniform, in the area under held-out success over steps 0, 5 and 10, as a
mean in points. Secondary: (coupled, gamma 4, q 0.2) - uniform in the area; both contrasts in success at step 10;
the positive control. Estimated by a linear model arm + seed, 95 % intervals by Student's t from its residuals.

What each outcome will be called. "Gains": the primary interval lies above 0. "Loses": it lies below 0. "No gain of
x points or more": it contains 0, and x is its upper end. If the positive control's interval contains 0 the
experiment is called unable to see, whatever the other arms show. If fewer runs than planned are there, the text
says how many.
"""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import get_constant_schedule_with_warmup, set_seed
from transformers.hf_argparser import HfArg

import tasks
import train
from credit import assign_credit
from eval import evaluate
from grpo import group_advantages, shape_advantages, update
from lab.experiment import area
from lab.stats import Estimate, Value, fit_contrast
from node.output import markdown
from node.run import Clock, take_problems
from node.settings import TINY, load_model, parse_args
from rollout import VLLMActor, pad_batch

STEPS, EVALUATE_AT, FIRST_SEED = 10, (5, 10), 100
ARMS = {  # arm: (its number of runs, what differs from train.py's arguments in SETTING)
    "uniform": (100, dict(credit="uniform")),
    "coupled": (100, dict(credit="coupled")),
    "coupled, gamma 4, q 0.2": (60, dict(credit="coupled", gamma_amp=4.0, q=0.2)),
    "uniform, minibatches of 32": (20, dict(credit="uniform", minibatches=2)),
}
SETTING = train.Args(
    task="countdown-tiny", prompts=8, group=8, minibatches=4, lr=2e-4, max_tokens=128, max_model_len=512, steps=STEPS,
    micro_tokens=1024, eval_samples=2, heads_every=10,
)  # fmt: skip
FOLDER = Path("lab/records/decisive")


@dataclass
class Args:
    """Make the runs of the protocol that are not there yet."""

    worker: list[int] = HfArg(default_factory=lambda: [0, 1], help="This process's number, and how many there are.")
    hours: float = HfArg(default=24.0, help="No run is begun later than this.")
    table: bool = HfArg(default=False, help="Make no run; print what the recorded ones say.")


def train_run(model, actor, weights: dict, args: train.Args, test_set: list[tasks.Problem]) -> dict:
    """One run from the given weights. Returns held-out success by step, each step's reward and gradient norm."""
    model.load_state_dict(weights)
    actor.reload(model)
    set_seed(args.seed)
    train_set = tasks.load(args.task, "train", seed=args.seed)
    weights_group = {"params": [*model.parameters()], "initial_lr": args.lr}
    optimizer = torch.optim.AdamW([weights_group], args.lr, weight_decay=0.0, fused=True)
    # last_epoch=0, as in train.py: the first step has a fifth of the learning rate.
    schedule = get_constant_schedule_with_warmup(optimizer, train.WARMUP_STEPS, last_epoch=0)
    heads, success, rewards_by_step, norms = None, {}, [], []
    for step in range(STEPS):
        problems = take_problems(train_set, step * args.prompts, args.prompts, args.seed)
        groups, rewards, *_ = train.sample_batch(args, actor, problems, Clock())
        rollouts = [r for group in groups for r in group]
        input_ids, mask, _ = pad_batch(rollouts)
        advantages = group_advantages(rewards).flatten()
        order = torch.randperm(len(rollouts), generator=torch.Generator().manual_seed(1000 * args.seed + step))
        scored = mask & (advantages != 0)[:, None]
        rows = order[advantages[order] != 0]
        if len(rows):
            if heads is None and args.credit != "uniform":
                some = order[: train.SPAN_ROWS]
                heads = train.split_into_local_and_global(args, model, input_ids[some], mask[some])
            signals = train.score(args, model, input_ids, mask, rows, heads)
            gamma = assign_credit(args.credit, signals, scored, q=args.q, amp=args.gamma_amp)
            shaped = shape_advantages(advantages, gamma / gamma[scored].mean())
            minibatches = list(order.tensor_split(args.minibatches))
            did = update(model, optimizer, input_ids, mask, signals.logprobs, shaped, minibatches, args.micro_tokens)
            norms.append(round(did["grad_norm"], 6))
        schedule.step()
        actor.reload(model)
        rewards_by_step.append(round(rewards.mean().item(), 6))
        if step + 1 in EVALUATE_AT:
            _, held_out = evaluate_quietly(actor, test_set, args)
            success[str(step + 1)] = round(held_out.mean().item(), 6)
    return {"success": success, "reward": rewards_by_step, "grad_norm": norms}


def evaluate_quietly(actor, test_set: list[tasks.Problem], args: train.Args):
    """eval.evaluate without its progress bar."""
    actor.generate, own = lambda *a, progress=False: type(actor).generate(actor, *a), actor.generate
    try:
        return evaluate(actor, args.task, test_set, args.eval_samples, args.max_tokens)
    finally:
        actor.generate = own


def record_file(arm: str) -> Path:
    return FOLDER / f"{arm.replace(',', '').replace(' ', '-')}.jsonl"


def jobs() -> list[tuple[str, int]]:
    """Every (arm, seed) of the protocol, seed by seed, so that the arms fill alike."""
    most = max(count for count, _ in ARMS.values())
    return [(arm, FIRST_SEED + i) for i in range(most) for arm, (count, _) in ARMS.items() if i < count]


def done() -> set[tuple[str, int]]:
    """The (arm, seed) that the records hold."""
    lines = [line for arm in ARMS if record_file(arm).exists() for line in record_file(arm).read_text().splitlines()]
    return {(r["arm"], r["seed"]) for r in map(json.loads, lines)}


def append(file: Path, record: dict) -> None:
    """One line in one write, so that two workers never mix theirs."""
    with open(file, "ab", buffering=0) as f:
        f.write((json.dumps(record) + "\n").encode())


# ---- What the runs say ----


def read_runs() -> list[dict]:
    """The recorded runs, with the measures of the protocol in points: area, and success at step 10."""
    start = json.loads((FOLDER / "start.json").read_text())["success"]
    files = [f for f in map(record_file, ARMS) if f.exists()]
    runs = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    for run in runs:
        curve = [(0, start), *((step, run["success"][str(step)]) for step in EVALUATE_AT)]
        run["area"], run["step 10"] = area(np.array(curve)), 100 * run["success"]["10"]
    return runs


def contrast(runs: list[dict], arm: str, measure: str) -> Estimate | None:
    """An arm less uniform, arm + seed; None where fewer than five of the arm's runs are there."""
    if sum(run["arm"] == arm for run in runs) < 5:
        return None
    return fit_contrast([Value(run["arm"], run["seed"], run[measure]) for run in runs], arm, "uniform")


def say_outcome(primary: Estimate, control: Estimate) -> str:
    """The protocol's word for the outcome."""
    if control.low <= 0 <= control.high:
        return "Unable to see: the interval of the positive control contains 0."
    if primary.low > 0:
        return "Gains: the primary interval lies above 0."
    if primary.high < 0:
        return "Loses: the primary interval lies below 0."
    return f"No gain of {primary.high:.1f} points or more: the primary interval contains 0."


def report() -> str:
    """Number of runs, the contrasts in both measures, and the outcome in the protocol's words, as Markdown."""
    runs = read_runs()
    counts = {arm: sum(run["arm"] == arm for run in runs) for arm in ARMS}
    planned, found = sum(count for count, _ in ARMS.values()), {}
    rows = [["arm − uniform, points", "runs", "planned", "area", "success at step 10"]]
    for arm, (count, _) in ARMS.items():
        both = [contrast(runs, arm, measure) if arm != "uniform" else None for measure in ("area", "step 10")]
        found[arm] = both[0]
        texts = ["" if arm == "uniform" else e.text("+.2f") if e else "too few runs" for e in both]
        rows.append([arm, str(counts[arm]), str(count), *texts])
    primary, control = found["coupled"], found["uniform, minibatches of 32"]
    said = say_outcome(primary, control) if primary and control else "Too few runs to say anything."
    if sum(counts.values()) < planned:
        said = f"UNFINISHED: {sum(counts.values())} of {planned} runs are there. As far as they go: {said}"
    return f"{said}\n\n{markdown(rows)}"


# ---- Making them ----


def main(args: Args) -> None:
    if args.table:
        return print(report())
    number, workers = args.worker
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 3600 * args.hours
    model, _ = load_model(TINY)
    actor = VLLMActor(TINY, SETTING.max_model_len)
    torch.set_num_threads(1)  # vLLM sets it
    weights = {name: w.clone() for name, w in model.state_dict().items()}
    test_set = tasks.load(SETTING.task, "test", 512)
    start = FOLDER / "start.json"
    if number == 0 and not start.exists():
        set_seed(0)
        _, held_out = evaluate_quietly(actor, test_set, replace(SETTING, eval_samples=8))
        start.write_text(json.dumps({"success": round(held_out.mean().item(), 6), "samples": 8}) + "\n")
    todo = [job for i, job in enumerate(jobs()) if i % workers == number and job not in done()]
    for arm, seed in tqdm(todo, desc=f"worker {number}"):
        if time.monotonic() > end:
            break
        run_args = replace(SETTING, seed=seed, **ARMS[arm][1])
        append(record_file(arm), {"arm": arm, "seed": seed, **train_run(model, actor, weights, run_args, test_set)})
    print(f"{len(done())} of {len(jobs())} runs are in {FOLDER}")


if __name__ == "__main__":
    main(parse_args(Args))
