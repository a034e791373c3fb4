"""Before anything long starts: check arguments, data and model, or print the plan (--dry_run)."""

import logging
import math
import zlib
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

import tasks
from attention import recording
from credit import NEED_ATTENTION
from grpo import check_logits, token_logprobs
from metrics import measure_heads, softmax_layers
from node import memory, precision, ranks
from node.checkpoint import load_sharded
from node.checkpoint import read_args as read_checkpoint_args
from node.run import fingerprint, import_report, read_args
from node.settings import check_rows, fill_defaults, load_config, load_tokenizer
from rollout import chat, tokenize


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

    # Numbers, each by itself.
    if args.group < 2:
        raise ValueError(
            f"--group {args.group}: an advantage compares responses to one problem, so it needs two or more"
        )
    must_lie(1, math.inf, "steps", "prompts", "micro_tokens", "max_tokens", "window", "k", "heads_every",
             "eval_samples", "save_every", "keep", "reward_processes")  # fmt: skip
    must_lie(0, math.inf, "eval_every")
    must_lie(0, 1, "q", "alpha", "epsilon")
    must_lie(0.01, 0.5, "head_quantile")
    must_lie(0, 2**31 - 1, "seed")
    must_lie(2, math.inf, "eval_problems")  # an interval needs two
    # Numbers that depend on others.
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


HELD_OUT = 512  # problems, at most, that are held out of --data


def load_problems(args, tokenizer) -> tuple[list[tasks.Problem], list[tasks.Problem]]:
    """Training and held-out problems. Those too long for --max_model_len are left out and counted.

    Without --eval_data, some problems of --data are held out, always the same. No held-out problem is trained on.
    Raises ValueError if too few are left.
    """
    if ranks.rank() > 0:
        logging.getLogger("tasks").setLevel(logging.ERROR)  # rank 0 says which rows of a file are left out
    eval_task = args.eval_task or args.task
    if args.data and args.eval_data and Path(args.data).resolve() == Path(args.eval_data).resolve():
        raise ValueError(
            f"--data and --eval_data are the same file, {args.data}: leave --eval_data away to hold out a part"
        )
    # Held-out problems come from --data itself, or from the held-out task. Either way none of them is trained on.
    train_set = tasks.load(args.task, "train", seed=args.seed, data=args.data)
    if args.data and not args.eval_data and eval_task == args.task:
        train_set, test_set = hold_out(train_set, args.eval_problems or HELD_OUT)
        ranks.print_once(
            f"{args.data}: {len(test_set)} of its {len(train_set) + len(test_set)} problems are held out (--eval_data "
            "gives others)"
        )
    else:
        test_set = tasks.load(eval_task, "test", args.eval_problems, data=args.eval_data)
        held_out = {problem.prompt for problem in test_set}
        both = sum(problem.prompt in held_out for problem in train_set)
        if both:
            ranks.print_once(f"{both} training problems are also held out: they are not trained on")
            train_set = [problem for problem in train_set if problem.prompt not in held_out]
            if not train_set:
                raise ValueError(
                    f"--task {args.task}: all training problems are also held out, so none is left to train on. Give "
                    "others with --eval_data, or all of them with --data, of which a part is held out"
                )

    # Leave out what does not fit.
    def short(problems: list[tasks.Problem], source: str, kind: str, needed: int) -> list[tasks.Problem]:
        prompts = tokenize(tokenizer, [p.prompt for p in problems], chat(args)) if problems else []
        check_rows(tokenizer, prompts)
        lengths = map(len, prompts)
        fitting = [p for p, n in zip(problems, lengths) if 0 < n and n + args.max_tokens <= args.max_model_len]
        if needed > len(fitting):
            raise ValueError(
                f"{source} has {len(problems)} {kind} problems, of which {len(fitting)} fit --max_model_len "
                f"{args.max_model_len} with --max_tokens {args.max_tokens}; {needed} are needed"
            )
        if len(fitting) < len(problems):
            ranks.print_once(
                f"{source}: {len(problems) - len(fitting)} of {len(problems)} {kind} problems are too long, left out"
            )
        return fitting

    train_set = short(train_set, args.data or args.task, "training", args.prompts)
    test_set = short(test_set, args.eval_data or args.data or eval_task, "held-out", 2)
    warn_of_unknown_tokens(args, tokenizer, train_set)
    return train_set, test_set


def hold_out(problems: list[tasks.Problem], most: int) -> tuple[list[tasks.Problem], list[tasks.Problem]]:
    """Training problems and held-out ones: one in eight, at most `most`. Which, depends on the prompts only.

    >>> train, test = hold_out([tasks.Problem(f"{i} + 1 =") for i in range(16)], most=512)
    >>> len(train), [problem.prompt for problem in test]
    (14, ['7 + 1 =', '15 + 1 ='])
    """
    by_hash = sorted(problems, key=lambda problem: zlib.crc32(problem.prompt.encode()))
    chosen = {problem.prompt for problem in by_hash[: min(most, max(2, len(problems) // 8))]}
    return (
        [problem for problem in problems if problem.prompt not in chosen],
        [problem for problem in problems if problem.prompt in chosen],
    )


def warn_of_unknown_tokens(args, tokenizer, problems: list[tasks.Problem]) -> None:
    """Say so if the tokenizer does not know much of the prompts, because the model is then trained on noise."""
    ids = [token for row in tokenize(tokenizer, [p.prompt for p in problems[:100]], chat(args)) for token in row]
    unknown = sum(token == tokenizer.unk_token_id for token in ids)
    if tokenizer.unk_token_id is not None and unknown > len(ids) / 20:
        ranks.print_once(
            f"warning: {100 * unknown / len(ids):.0f} % of the prompts' tokens are unknown to the tokenizer of "
            f"{args.model} ({tokenizer.unk_token}): is this the model for {args.task}?"
        )


def identify_problems(train_set: list[tasks.Problem], test_set: list[tasks.Problem]) -> dict[str, list]:
    """Number and fingerprint of the training and of the held-out problems, for the run's checkpoints."""
    return {
        "training": [len(train_set), fingerprint(train_set)],
        "held-out": [len(test_set), fingerprint(test_set)],
    }


def check_resumed(args, checkpoint: Path, state: dict, problems: dict[str, list]) -> None:
    """Compare a run that goes on with its checkpoint. Say which arguments have been edited in args.json since then.

    ValueError if it would go on with other problems, or was told another model. Older checkpoints know neither.
    """
    sources = {
        "training": args.data or args.task,
        "held-out": args.eval_data or args.data or args.eval_task or args.task,
    }
    for kind, (count, hash_now) in problems.items():
        count_then, hash_then = (state.get("problems") or problems)[kind]
        if (count, hash_now) != (count_then, hash_then):
            raise ValueError(
                f"--resume {args.resume}: the {kind} problems of {sources[kind]} are not those that the run had "
                f"({count} now, {count_then} then). Restore them, and the arguments in args.json that choose them, or "
                "start a new run"
            )
    before = read_checkpoint_args(checkpoint)
    now = {name: value for name, value in asdict(args).items() if name not in ("resume", "steps", "dry_run", "out")}
    edited = {name: value for name, value in now.items() if name in before and before[name] != value}
    if "model" in edited:
        raise ValueError(
            f"--resume {args.resume}: its args.json says --model {args.model} now, and the run goes on from its own "
            f"weights, which began as {before['model']}. Set it back, or start a new run"
        )
    if edited:
        changes = ", ".join(f"{name} {before[name]} to {value}" for name, value in edited.items())
        ranks.print_once(f"args.json has been edited since {checkpoint.name}. From the next step on: {changes}")


def print_plan(args) -> None:
    """--dry_run: print what would be done, from the model's configuration, tokenizer and data only."""
    tokenizer = load_tokenizer(args.model, args.max_model_len)
    train_set, test_set = load_problems(args, tokenizer)
    (first,) = tokenize(tokenizer, [train_set[0].prompt], chat(args))
    shape, world = load_config(args.model), ranks.world_size()
    longest_pass = max(args.micro_tokens, args.max_model_len)  # a row is never split
    weights, gib = memory.describe(
        shape, world, longest_pass, args.kv_cache_gib, 4 if args.dtype == "float32" else 2,
        args.gradient_checkpointing, longest_row=args.max_model_len,
    )  # fmt: skip
    ranks.print_once(
        f"{args.model}: {weights}, {world} process(es)\n"
        f"{args.task}: {len(train_set)} training problems; {len(test_set)} of {args.eval_task or args.task} held out\n"
        f"the first, as the model reads it: {tokenizer.decode(first)!r}\n"
        f"{args.steps} steps of {args.prompts} problems x {args.group} responses of up to {args.max_tokens} tokens, "
        f"{args.minibatches} minibatches each, learning rate {args.lr:g}, {args.dtype}\n"
        f"{describe_layers(shape)}\n"
        f"credit {args.credit}, q {args.q}, gamma {args.gamma_amp}, WAAD window {args.window}, "
        f"FAI horizon {args.horizon}\n"
        f"{gib}\n"
        "dry run: nothing was started"
    )


def describe_layers(config) -> str:
    """What a configuration says about a model's layers; which have softmax attention is seen with the weights."""
    config = config.get_text_config()
    kinds = Counter(getattr(config, "layer_types", None) or [])
    listed = f" ({', '.join(f'{count} {kind}' for kind, count in kinds.items())})" if len(kinds) > 1 else ""
    count = getattr(config, "num_hidden_layers", "?")
    return (
        f"{count} layers{listed}. WAAD and FAI are taken from those with softmax attention; whether "
        "they can be is checked before the first step, and by python -m node.check"
    )


def describe_attention(model, layers: list[int]) -> str:
    """Where the credit comes from: the sampled layers, and what is special about their attention."""
    ids = _some_tokens(model)
    with_softmax = softmax_layers(model, ids)
    with torch.no_grad(), recording(model, layers) as recorded:
        token_logprobs(model, ids, ids > 0)
    first, config = recorded[layers[0]], model.config.get_text_config()
    special = [f"scores capped at {first.softcap:g}"] if first.softcap else []
    special += ["attention sinks"] if first.sinks is not None else []
    kinds = getattr(config, "layer_types", None) or []
    windows = [layer for layer in layers if layer < len(kinds) and "sliding" in kinds[layer]]
    special += [f"a window of {config.sliding_window} tokens in layers {windows}"] if windows else []
    return (
        f"WAAD and FAI from layers {', '.join(map(str, layers))}, chosen among {len(with_softmax)} with softmax "
        f"attention, {first.query.shape[1]} heads each" + "".join(f"; {text}" for text in special)
    )


def _some_tokens(model) -> torch.Tensor:
    """A row of 32 tokens, to try the model on. [1,32]"""
    vocabulary = model.config.get_text_config().vocab_size
    return torch.arange(32, device=next(model.parameters()).device)[None] % vocabulary


def load(args, source: str | Path, device: torch.device, state: dict | None = None):
    """Load the model (float32, on the device, sharded), the tokenizer, the training and the held-out problems.

    source: a model, or a checkpoint to resume from; then state is the checkpoint's.

    Raises ValueError for what would stop the run later: too few problems, an output head that cannot be scored, or
    attention that cannot be recorded although the credit needs it.
    """
    tokenizer = load_tokenizer(str(source), args.max_model_len)
    train_set, test_set = load_problems(args, tokenizer)
    if state:
        check_resumed(args, Path(source), state, identify_problems(train_set, test_set))
    model = load_sharded(str(source), device, args.dtype)
    if args.credit in NEED_ATTENTION:  # measuring the heads also checks all that the credit relies on
        ids = _some_tokens(model)
        heads = measure_heads(model, ids, ids > 0, args.layers, args.head_quantile)
        ranks.print_once(describe_attention(model, heads.layers))
    else:
        check_logits(model)
    ranks.reshard(model)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        for module in model.modules():  # these recompute only in training mode; load_config has set dropout to 0
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True
    return model, tokenizer, train_set, test_set
