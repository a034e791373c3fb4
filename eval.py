"""Success on held-out problems: greedy pass@1 and sampled avg@k, through the trainer's own sampler and verifier.

python eval.py --model runs/countdown-tiny-coupled-1/checkpoint --task countdown-tiny
"""

import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

import tasks
from rollout import start_actor


@dataclass
class Args:
    """Evaluate a checkpoint: greedy pass@1 and sampled avg@k with their 95 % intervals."""

    model: str = HfArg(default="assets/tiny", help="Folder or hub name of a transformers checkpoint.")
    task: str = HfArg(default="countdown-tiny", help=f"One of: {', '.join(tasks.TASKS)}.")
    problems: int | None = HfArg(default=None, help="Held-out problems (default: the task's own number).")
    k: int = HfArg(default=4, help="Sampled responses to each problem.")
    max_tokens: int = HfArg(default=128, help="Longest response.")
    context: int = HfArg(default=512, help="Longest prompt and response together.")
    engine: Literal["vllm", "torch"] = HfArg(default="vllm", help="The sampler.")
    seed: int = HfArg(default=0, help="Seed of the problems and the sampling.")
    out: str | None = HfArg(default=None, help="Also write the result and every response to this JSON file.")


def evaluate(actor, problems: list[tasks.Problem], n: int, max_tokens: int, temperature: float = 1.0):
    """n responses to each problem and their rewards: (list[P] of list[n] of Rollout, [P,n] float32)."""
    rollouts = actor.generate([p.prompt for p in problems], n, max_tokens, temperature, progress=True)
    return rollouts, torch.tensor([[tasks.reward(p, r.text) for r in row] for p, row in zip(problems, rollouts)])


def mean_interval(per_problem: Tensor) -> tuple[float, float]:
    """Mean over problems and the half-width of its 95 % interval (normal; problems are the independent draws).

    per_problem [P]: each problem's mean reward, or a difference of two such means.

    >>> [round(x, 3) for x in mean_interval(torch.tensor([0.0, 1.0, 0.0, 1.0]))]
    [0.5, 0.566]
    """
    if len(per_problem) < 2:
        return per_problem.mean().item(), math.inf
    return per_problem.mean().item(), 1.96 * per_problem.std().item() / math.sqrt(len(per_problem))


def main(args: Args) -> None:
    try:
        problems = tasks.load(args.task, "test", args.problems, args.seed)
        if args.k < 1:
            raise ValueError(f"--k {args.k}: sample one response or more")
        if len(problems) < 2:
            raise ValueError(f"--problems {args.problems}: an interval needs 2 or more")
        if args.out:
            Path(args.out).parent.mkdir(parents=True, exist_ok=True)
            Path(args.out).touch()
        actor = start_actor(args.engine, args.model, args.context, args.seed)
        torch.manual_seed(args.seed)
        greedy, greedy_rewards = evaluate(actor, problems, 1, args.max_tokens, temperature=0.0)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    sampled, sampled_rewards = evaluate(actor, problems, args.k, args.max_tokens)
    result = {"args": asdict(args)}
    for name, rewards in (("greedy pass@1", greedy_rewards), (f"sampled avg@{args.k}", sampled_rewards)):
        mean, half = mean_interval(rewards.mean(1))
        result[name] = {"mean": mean, "half_width_95": half}
        print(f"{name:>14}: {100 * mean:.1f} ± {100 * half:.1f} %  ({len(problems)} {args.task} problems)")
    if args.out:
        result["responses"] = [
            {"prompt": p.prompt, "greedy": g[0].text, "sampled": [r.text for r in s], "rewards": w}
            for p, g, s, w in zip(problems, greedy, sampled, sampled_rewards.tolist())
        ]
        Path(args.out).write_text(json.dumps(result, indent=1))
        print(f"every response: {args.out}")
    actor.close()


if __name__ == "__main__":
    main(*HfArgumentParser(Args).parse_args_into_dataclasses())
