"""The decisive experiment: does coupled credit make the first ten steps better than plain GRPO?

    python -m lab.decisive --worker 0 2 & python -m lab.decisive --worker 1 2     one process a core; resumable
    python -m lab.report --only decisive                                          what the runs say, however many

Five seeds an arm cannot see a gain of one point; about 100 runs an arm can. The protocol, with what each outcome is
called, is lab/results/decisive.md. It was committed before the first run of each round.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import get_constant_schedule_with_warmup, set_seed
from transformers.hf_argparser import HfArg

import tasks
import train
from credit import NEED_ATTENTION
from eval import evaluate
from grpo import group_advantages, shape_advantages, update
from lab.arms import ARMS, PLACES, READINGS, Arm, gamma_of
from lab.experiment import area
from lab.stats import Estimate, Value, fit_contrast
from node.output import markdown
from node.run import Clock, take_problems
from node.settings import TINY, load_model, parse_args
from rollout import VLLMActor, pad_batch


@dataclass(frozen=True)
class Plan:
    """The runs of an arm."""

    runs: int
    arm: Arm
    evaluate_at: tuple[int, ...] = (5, 10)  # the last is the last step
    first_seed: int = 100


LOUD_ARM = "coupled, gamma 4, q 0.2"
ROUNDS = {
    "decisive": {
        "uniform": Plan(100, ARMS["uniform"]),
        "coupled": Plan(100, ARMS["coupled"]),
        LOUD_ARM: Plan(60, ARMS[LOUD_ARM]),
        "uniform, minibatches of 32": Plan(20, Arm({"credit": "uniform", "minibatches": 2})),
    },
    "places": {name: Plan(40, ARMS[name]) for name in PLACES},
    "lasting": {f"{name}, 20 steps": Plan(40, ARMS[name], (10, 20), 200) for name in ("uniform", LOUD_ARM)},
    "readings": {name: Plan(40, ARMS[name]) for name in READINGS},
}
PLANS = {name: plan for plans in ROUNDS.values() for name, plan in plans.items()}
CONTRASTS = {  # one arm less another
    "decisive": [(name, "uniform") for name in ROUNDS["decisive"] if name != "uniform"],
    "places": [*((name, "uniform") for name in PLACES), *((LOUD_ARM, name) for name in PLACES)],
    "lasting": [(f"{LOUD_ARM}, 20 steps", "uniform, 20 steps")],
    "readings": [(name, "coupled") for name in READINGS],
}
SETTING = train.Args(
    task="countdown-tiny", prompts=8, group=8, minibatches=4, lr=2e-4, max_tokens=128, max_model_len=512,
    micro_tokens=1024, eval_samples=2,
)  # fmt: skip
MEASURES = ("area", "half", "end", "change")  # in points; see read_runs
FOLDER = Path("lab/records/decisive")


@dataclass
class Args:
    """Make the runs of the protocol that are not there yet."""

    worker: list[int] = HfArg(default_factory=lambda: [0, 1], help="This process's number, and how many there are.")


def train_run(model, actor, weights: dict, plan: Plan, seed: int, test_set: list[tasks.Problem]) -> dict:
    """One run from the given weights. Returns held-out success by step, each step's reward and gradient norm."""
    args = replace(SETTING, seed=seed, steps=plan.evaluate_at[-1], **plan.arm.settings)
    model.load_state_dict(weights)
    actor.reload(model)
    set_seed(args.seed)
    train_set = tasks.load(args.task, "train", seed=args.seed)
    weights_group = {"params": [*model.parameters()], "initial_lr": args.lr}
    optimizer = torch.optim.AdamW([weights_group], args.lr, weight_decay=0.0, fused=True)
    # last_epoch=0, as in train.py: the first step has a fifth of the learning rate.
    schedule = get_constant_schedule_with_warmup(optimizer, train.WARMUP_STEPS, last_epoch=0)
    heads, success, rewards_by_step, norms = None, {}, [], []
    for step in range(args.steps):
        problems = take_problems(train_set, step * args.prompts, args.prompts, args.seed)
        groups, rewards, *_ = train.sample_batch(args, actor, problems, Clock())
        rollouts = [r for group in groups for r in group]
        input_ids, mask, _ = pad_batch(rollouts)
        advantages = group_advantages(rewards).flatten()
        order = torch.randperm(len(rollouts), generator=torch.Generator().manual_seed(1000 * args.seed + step))
        scored = mask & (advantages != 0)[:, None]
        rows = order[advantages[order] != 0]
        if len(rows):
            if (heads is None or step % args.heads_every == 0) and (plan.arm.own or args.credit in NEED_ATTENTION):
                some = order[: train.SPAN_ROWS]
                heads = train.split_into_local_and_global(args, model, input_ids[some], mask[some])
            signals = train.score(args, model, input_ids, mask, rows, heads)
            settings = dict(model=model, tokenizer=None, amp=args.gamma_amp, seed=1000 * args.seed + step)
            gamma, sign = gamma_of(plan.arm, lambda _, seen=signals: seen, scored, input_ids, **settings)
            shaped = shape_advantages(advantages, gamma / gamma[scored].mean(), sign)
            minibatches = list(order.tensor_split(args.minibatches))
            did = update(model, optimizer, input_ids, mask, signals.logprobs, shaped, minibatches, args.micro_tokens)
            norms.append(round(did["grad_norm"], 6))
        schedule.step()
        actor.reload(model)
        rewards_by_step.append(round(rewards.mean().item(), 6))
        if step + 1 in plan.evaluate_at:
            _, held_out = evaluate(actor, args.task, test_set, args.eval_samples, args.max_tokens)
            success[str(step + 1)] = round(held_out.mean().item(), 6)
    return {"success": success, "reward": rewards_by_step, "grad_norm": norms}


def record_file(arm: str) -> Path:
    return FOLDER / f"{arm.replace(',', '').replace(' ', '-')}.jsonl"


def jobs() -> list[tuple[str, int]]:
    """Every (arm, seed) of the protocol: round by round, and seed by seed, so that the arms of a round fill alike."""
    return [
        (name, plan.first_seed + i)
        for plans in ROUNDS.values()
        for i in range(max(plan.runs for plan in plans.values()))
        for name, plan in plans.items()
        if i < plan.runs
    ]


def read_records() -> list[dict]:
    """The recorded runs of all rounds."""
    files = [f for f in map(record_file, PLANS) if f.exists()]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


# ---- What the runs say ----


def read_runs() -> list[dict]:
    """The recorded runs, with MEASURES: area, success at half of the steps and at their end, change between the two."""
    start, runs = json.loads((FOLDER / "start.json").read_text())["success"], read_records()
    for run in runs:
        at = PLANS[run["arm"]].evaluate_at
        curve = [(0, start), *((step, run["success"][str(step)]) for step in at)]
        run["area"] = area(np.array(curve))
        run["half"], run["end"] = (100 * run["success"][str(step)] for step in at)
        run["change"] = run["end"] - run["half"]
    return runs


def say_outcome(primary: Estimate, control: Estimate) -> str:
    """The first round's outcome in the protocol's words."""
    if control.low <= 0 <= control.high:
        return "Unable to see: the interval of the positive control contains 0."
    if primary.low > 0:
        return "Gains: the primary interval lies above 0."
    if primary.high < 0:
        return "Loses: the primary interval lies below 0."
    return f"No gain of {math.ceil(10 * primary.high) / 10:.1f} points or more: the primary interval contains 0."


def say_whether_it_lasts(late: Estimate, change: Estimate) -> str:
    """The outcome of the round "lasting" in the protocol's words."""
    if late.low > 0:
        return "The gain lasts: the interval at step 20 lies above 0."
    if change.high < 0:
        return "The gain is lost: the interval of its change from step 10 to step 20 lies below 0."
    return "Whether the gain lasts cannot be told."


def contrasts(runs: list[dict], alone: bool = False) -> dict[tuple[str, str], list[Estimate | None]]:
    """(one arm, another): their differences in each of MEASURES; None where one of them has fewer than five runs.

    alone: from these two arms alone, which is a paired t-test. It does not take all arms to be equally noisy.
    """
    found = {}
    for name, pairs in CONTRASTS.items():
        # All rounds but "lasting" have the seeds and steps of the first, so they stand in one model with its arms.
        arms = [*ROUNDS[name], *(ROUNDS["decisive"] if name != "lasting" else ())]
        for pair in pairs:
            kept = [run for run in runs if run["arm"] in (pair if alone else arms)]
            enough = all(sum(run["arm"] == arm for run in kept) >= 5 for arm in pair)
            values = [[Value(run["arm"], run["seed"], run[measure]) for run in kept] for measure in MEASURES]
            found[pair] = [fit_contrast(x, *pair) if enough else None for x in values]
    return found


def report() -> str:
    """The outcomes; then by round the number of runs and the contrasts in all measures, as Markdown."""
    runs, tables = read_runs(), []
    found, paired, counts = contrasts(runs), contrasts(runs, alone=True), Counter(run["arm"] for run in runs)
    for name, plans in ROUNDS.items():
        rows = [["one arm − another, points", "area", "success at half of the steps", "at their end", "end − half"]]
        for pair in CONTRASTS[name]:
            for label, estimates in ((" − ".join(pair), found[pair]), ("these two arms alone", paired[pair])):
                rows.append([label, *(e.text("+.2f") if e else "too few runs" for e in estimates)])
        there = []
        for arm, plan in plans.items():
            there.append(f"- {arm}: {counts[arm]} of {plan.runs} runs")
            norms = [norm for run in runs if run["arm"] == arm for norm in run["grad_norm"]]
            if norms:
                loud = 100 * np.mean(np.array(norms) > 1)
                there[-1] += f"; gradients of norm {np.mean(norms):.2f}, above 1 in {loud:.1f} % of the steps"
        tables.append(f"### Round: {name}\n\n" + "\n".join(there) + f"\n\n{markdown(rows)}")

    primary, control = (found[arm, "uniform"][0] for arm in ("coupled", "uniform, minibatches of 32"))
    late, change = found[CONTRASTS["lasting"][0]][2:]
    outcomes = {
        "decisive": say_outcome(primary, control) if primary and control else "Too few runs to say anything.",
        "lasting": say_whether_it_lasts(late, change) if late else "Too few runs to say anything.",
    }
    said = []
    for name, outcome in outcomes.items():
        planned, there = sum(plan.runs for plan in ROUNDS[name].values()), sum(counts[arm] for arm in ROUNDS[name])
        unfinished = f"UNFINISHED: {there} of {planned} runs are there. As far as they go: " if there < planned else ""
        said.append(f"- Round {name}: {unfinished}{outcome}")
    return "\n\n".join(["\n".join(said), *tables])


# ---- Making them ----


def main(args: Args) -> None:
    number, workers = args.worker
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    model, _ = load_model(TINY)
    actor = VLLMActor(TINY, SETTING.max_model_len)
    torch.set_num_threads(1)  # vLLM sets it
    weights = {name: w.clone() for name, w in model.state_dict().items()}
    test_set = tasks.load(SETTING.task, "test", 512)
    start = FOLDER / "start.json"
    if number == 0 and not start.exists():
        set_seed(0)
        _, held_out = evaluate(actor, SETTING.task, test_set, 8, SETTING.max_tokens)
        start.write_text(json.dumps({"success": round(held_out.mean().item(), 6), "samples": 8}) + "\n")
    done = {(run["arm"], run["seed"]) for run in read_records()}
    todo = [job for i, job in enumerate(jobs()) if i % workers == number and job not in done]
    for arm, seed in tqdm(todo, desc=f"worker {number}"):
        result = train_run(model, actor, weights, PLANS[arm], seed, test_set)
        line = json.dumps({"arm": arm, "seed": seed, **result}) + "\n"
        with open(record_file(arm), "ab", buffering=0) as f:  # one write, so that two workers never mix their lines
            f.write(line.encode())
    print(f"{len(read_records())} of {len(jobs())} runs are there; their tables: python -m lab.report --only decisive")


if __name__ == "__main__":
    main(parse_args(Args))
