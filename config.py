"""The arguments of a training run: what they are, what they may be, and those of a run to go on with."""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from transformers.hf_argparser import HfArg

import parallel
import tasks

STEPS = 40


@dataclass
class Args:
    """Train a language model with GRPO and attention-guided credit."""

    model: str = HfArg(default="assets/tiny", help="Folder or hub name of the transformers checkpoint to start from.")
    task: str = HfArg(default="countdown-tiny", help=f"One of: {', '.join(tasks.TASKS)}.")
    data: str | None = HfArg(default=None, help="Local JSON, JSONL or parquet file in place of the task's dataset.")
    eval_task: str | None = HfArg(default=None, help="Task of the held-out problems (default: the same).")
    eval_data: str | None = HfArg(default=None, help="Local file in place of its dataset.")
    out: str | None = HfArg(default=None, help="Folder of the run; it must be new (default: a new one under runs/).")
    resume: str | None = HfArg(
        default=None, help="Folder of a run to go on with; of the rest only --steps may be given."
    )
    dry_run: bool = HfArg(default=False, help="Check arguments and data, print the plan and memory, start nothing.")
    engine: Literal["vllm", "torch"] = HfArg(default="vllm", help="The sampler; torch where vLLM is not installed.")
    seed: int = HfArg(default=0, help="Seed of problems, sampling and minibatches.")

    credit: Literal["coupled", "local", "global", "entropy", "random", "uniform", "scaled"] = HfArg(
        default="coupled",
        help="Which tokens get more of the advantage (Eq. 14-19); uniform is plain GRPO; scaled gives every token the "
        "mean gamma of coupled.",
    )
    q: float = HfArg(default=0.4, help="Share of tokens to credit.")
    amp: float = HfArg(default=1.5, help="gamma_amp, the factor on their advantage.")
    alpha: float = HfArg(default=0.5, help="Coupled: the share that a dominated anchor hands to its intro.")
    k: int = HfArg(default=3, help="Coupled: how far before an anchor its intro may lie.")
    window: int = HfArg(default=10, help="W, where WAAD stops counting.")
    horizon: list[int] = HfArg(default_factory=lambda: [10, 100], help="FAI's H_lo H_hi; H_lo alone: to the end.")
    quantile: float = HfArg(default=0.3, help="Share of the sampled heads in the local, and in the far group.")
    layers: Literal["middle", "bottom", "top", "all"] = HfArg(default="middle", help="Where five layers are sampled.")
    all_heads: bool = HfArg(default=False, help="Ablation: both groups are all sampled heads.")
    lowest: bool = HfArg(default=False, help="Ablation: credit the lowest q instead of the highest.")
    sign: Literal["both", "positive", "negative"] = HfArg(default="both", help="Which advantages gamma multiplies.")
    on_produced: bool = HfArg(default=False, help="Ablation: credit the token a row produced, not the row's own.")
    heads_every: int = HfArg(default=10, help="Steps between measurements of the head split.")

    steps: int | None = HfArg(default=None, help=f"Training steps, one batch of rollouts each (default: {STEPS}).")
    prompts: int = HfArg(default=32, help="Problems in a batch.")
    group: int = HfArg(default=8, help="G, responses to each problem.")
    updates: int = HfArg(default=4, help="Gradient steps on each batch.")
    micro_tokens: int = HfArg(
        default=2048, help="Tokens in one forward pass; changes memory and speed, not the result."
    )
    lr: float = HfArg(default=2e-4, help="Learning rate of AdamW, reached over the first five steps.")
    epsilon: float = HfArg(default=0.2, help="Clipping of the probability ratio.")
    epsilon_high: float | None = HfArg(default=None, help="Upper clip, if another (clip-higher of DAPO: 0.28).")
    importance_cap: float | None = HfArg(
        default=None, help="Weigh each token by trainer over sampler probability, cut at this (truncated IS: 2)."
    )
    dynamic: bool = HfArg(default=False, help="Draw up to four batches until --prompts groups have unequal rewards.")
    checkpointing: bool = HfArg(
        default=False, help="Keep only each layer's input and compute the rest again: less memory."
    )
    max_tokens: int = HfArg(default=128, help="Longest response; a longer one is cut and judged as it is.")
    context: int = HfArg(default=512, help="Longest prompt and response together.")
    kv_cache_gib: float = HfArg(default=0.5, help="vLLM's cache: more lets it generate more responses at once.")
    eval_problems: int | None = HfArg(default=None, help="Held-out problems (default: the task's own number).")
    eval_samples: int = HfArg(default=2, help="Sampled responses to each of them.")
    eval_every: int = HfArg(default=20, help="Steps between evaluations; 0: only before and after.")
    save_every: int = HfArg(default=20, help="Steps between checkpoints; the last step is always saved.")
    keep: int = HfArg(default=2, help="Checkpoints kept.")


def check(args: Args) -> None:
    """Raise ValueError for arguments that cannot work, before anything long is started."""
    if args.group < 2:
        raise ValueError(
            f"--group {args.group}: an advantage compares responses to one problem, so it needs two or more"
        )
    if not 1 <= args.updates <= args.prompts * args.group:
        raise ValueError(f"--updates {args.updates}: from 1 to the {args.prompts * args.group} rollouts of a batch")
    if len(args.horizon) not in (1, 2) or args.horizon[0] < 0 or args.horizon[0] > args.horizon[-1]:
        raise ValueError(f"--horizon {args.horizon}: give H_lo and H_hi >= H_lo, or H_lo alone")
    for name, low, high in (("q", 0, 1), ("quantile", 0.01, 0.5), ("alpha", 0, 1), ("epsilon", 0, 1)):
        if not low <= getattr(args, name) <= high:
            raise ValueError(f"--{name} {getattr(args, name)}: must lie from {low} to {high}")
    for name in (
        "steps", "prompts", "micro_tokens", "max_tokens", "window", "k", "heads_every", "eval_samples", "save_every",
        "keep",
    ):  # fmt: skip
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be 1 or more")
    for name in ("lr", "amp", "kv_cache_gib"):
        if not 0 < getattr(args, name) < math.inf:
            raise ValueError(f"--{name} {getattr(args, name)}: must be above 0 and finite")
    for name in ("importance_cap", "epsilon_high"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            raise ValueError(f"--{name} {getattr(args, name)}: must be above 0 and finite")
    for name, high in (("seed", 2**31), ("eval_every", math.inf)):
        if not 0 <= getattr(args, name) < high:
            raise ValueError(f"--{name} {getattr(args, name)}: from 0 up to {high}")
    if parallel.world() > 1 and args.engine == "torch":
        raise ValueError(
            "--engine torch samples with the trainer's own weights, in one process: use vllm with torchrun"
        )
    if args.eval_problems is not None and args.eval_problems < 2:
        raise ValueError(f"--eval_problems {args.eval_problems}: an interval needs 2 or more")


def resumed(args: Args) -> Args:
    """The arguments of the run in --resume; only --steps may be another."""
    try:
        saved = Args(**json.loads((Path(args.resume) / "args.json").read_text()))
    except (OSError, ValueError, TypeError) as e:
        raise ValueError(f"--resume {args.resume}: no run is there, or its args.json cannot be read ({e})") from e
    given = {name for name, value in asdict(args).items() if value != getattr(Args(), name)}
    if wrong := ", ".join(sorted(given - {"resume", "steps", "dry_run"})):
        raise ValueError(f"--resume takes its arguments from the run; only --steps may be given beside it, not {wrong}")
    args = replace(
        saved, resume=args.resume, steps=saved.steps if args.steps is None else args.steps, dry_run=args.dry_run
    )
    check(args)
    return args


def write_args(args, folder: Path) -> None:
    """args.json, whole or not at all."""
    (folder / "args.new").write_text(json.dumps(asdict(args), indent=1))
    (folder / "args.new").replace(folder / "args.json")
