"""Before anything long starts: check arguments, data and model, or print the plan (--dry_run)."""

import math
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoConfig
from transformers.modeling_layers import GradientCheckpointingLayer

import tasks
from credit import NEED_ATTENTION
from grpo import check_logits
from metrics import measure_heads
from node import memory, precision, ranks
from node.checkpoint import load_sharded
from node.run import import_report, read_args
from node.settings import fill_defaults, load_config, load_tokenizer


def complete_args(args, defaults: dict):
    """The arguments of the run to resume, or the given ones with the defaults for their model. None is left open.

    Raises ValueError for arguments that cannot work.
    """
    if args.resume:
        args = read_args(args)
    else:
        args, note = fill_defaults(args, defaults, args.model)
        ranks.print_once(note)
    if args.dtype == "auto":
        args = replace(args, dtype=precision.choose_dtype("auto", load_config(args.model)))
    check_args(args)
    return args


def check_args(args) -> None:
    """Raise ValueError for arguments that cannot work."""
    import_report(args.report)

    def must_lie(low: float, high: float, *names: str) -> None:
        for name in names:
            value = getattr(args, name)
            if value is not None and not low <= value <= high:
                limits = f"{low} or more" if high == math.inf else f"from {low} to {high}"
                raise ValueError(f"--{name} {value}: must be {limits}")

    if args.group < 2:
        raise ValueError(
            f"--group {args.group}: an advantage compares responses to one problem, so it needs two or more"
        )
    must_lie(1, math.inf, "steps", "prompts", "micro_tokens", "max_tokens", "window", "k", "heads_every",
             "eval_samples", "save_every", "keep")  # fmt: skip
    must_lie(0, math.inf, "eval_every")
    must_lie(0, 1, "q", "alpha", "epsilon")
    must_lie(0.01, 0.5, "head_quantile")
    must_lie(0, 2**31 - 1, "seed")
    must_lie(2, math.inf, "eval_problems")  # an interval needs two
    rollouts = args.prompts * args.group
    if not 1 <= args.minibatches <= rollouts:
        raise ValueError(f"--minibatches {args.minibatches}: from 1 to the {rollouts} rollouts of a batch")
    if len(args.horizon) not in (1, 2) or args.horizon[0] < 0 or args.horizon[0] > args.horizon[-1]:
        raise ValueError(f"--horizon {args.horizon}: give H_lo and H_hi >= H_lo, or H_lo alone")
    for name in ("lr", "gamma_amp", "kv_cache_gib", "tis_cap", "epsilon_high"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} {value}: must be above 0 and finite")
    if ranks.world_size() > 1 and args.engine == "torch":
        raise ValueError(
            "--engine torch samples with the trainer's own weights, in one process: use vllm with torchrun"
        )


def load_problems(args, tokenizer) -> tuple[list[tasks.Problem], list[tasks.Problem]]:
    """Training and held-out problems. Those too long for --max_model_len are left out and counted.

    Raises ValueError if too few are left.
    """
    eval_task = args.eval_task or args.task
    train_set = tasks.load(args.task, "train", seed=args.seed, data=args.data)
    test_set = tasks.load(eval_task, "test", args.eval_problems, data=args.eval_data)

    def short(problems: list[tasks.Problem], task: str, kind: str, needed: int) -> list[tasks.Problem]:
        lengths = map(len, tokenizer([p.prompt for p in problems]).input_ids)
        fitting = [p for p, n in zip(problems, lengths) if 0 < n and n + args.max_tokens <= args.max_model_len]
        if needed > len(fitting):
            raise ValueError(
                f"{task} has {len(problems)} {kind} problems, of which {len(fitting)} fit --max_model_len "
                f"{args.max_model_len} with --max_tokens {args.max_tokens}; {needed} are needed"
            )
        if len(fitting) < len(problems):
            ranks.print_once(
                f"{task}: {len(problems) - len(fitting)} of {len(problems)} {kind} problems are too long, left out"
            )
        return fitting

    return short(train_set, args.task, "training", args.prompts), short(test_set, eval_task, "held-out", 2)


def print_plan(args) -> None:
    """--dry_run: print what would be done, from the model's configuration, tokenizer and data only."""
    train_set, test_set = load_problems(args, load_tokenizer(args.model, args.max_model_len))
    shape, world = AutoConfig.from_pretrained(args.model), ranks.world_size()
    longest_pass = max(args.micro_tokens, args.max_model_len)  # a row is never split
    gib = memory.estimate(
        shape, world, longest_pass, args.kv_cache_gib, 4 if args.dtype == "float32" else 2,
        args.gradient_checkpointing,
    )  # fmt: skip
    ranks.print_once(
        f"{args.model}: {memory.parameters(shape)[0]:,} weights, {world} process(es)\n"
        f"{args.task}: {len(train_set)} training problems; {len(test_set)} of {args.eval_task or args.task} held out\n"
        f"the first: {train_set[0].prompt!r}\n"
        f"{args.steps} steps of {args.prompts} problems x {args.group} responses of up to {args.max_tokens} tokens, "
        f"{args.minibatches} minibatches each, learning rate {args.lr:g}, {args.dtype}\n"
        f"credit {args.credit}, q {args.q}, gamma {args.gamma_amp}, WAAD window {args.window}, "
        f"FAI horizon {args.horizon}\n"
        f"GiB on each GPU, computed: {', '.join(f'{name} {size:.1f}' for name, size in gib.items() if size >= 0.05)}\n"
        "dry run: nothing was started"
    )


def load(args, source: str | Path, device: torch.device):
    """Model (float32, on the device, sharded), tokenizer, training and held-out problems.

    Raises ValueError for what would stop the run later: too few problems, an output head that cannot be scored, or
    attention that cannot be recorded although the credit needs it.
    """
    tokenizer = load_tokenizer(str(source), args.max_model_len)
    train_set, test_set = load_problems(args, tokenizer)
    model = load_sharded(str(source), device, args.dtype)
    check_logits(model)
    if args.credit in NEED_ATTENTION:
        ids = torch.tensor([[0, 1, 2]], device=device)
        measure_heads(model, ids, ids > 0, args.layers, args.head_quantile)
    ranks.reshard(model)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        for module in model.modules():  # only these modules read .training for it, so dropout stays off
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True
    return model, tokenizer, train_set, test_set
