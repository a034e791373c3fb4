"""GRPO with attention-guided credit, the whole loop (arXiv 2510.13554, Fig. 1 and Sec. 5).

    python train.py                                        the embedded model learns Countdown, on two CPU cores
    python train.py --credit uniform                       plain GRPO, to compare
    python train.py --resume runs/countdown-tiny-coupled-1 a run that was stopped goes on
    node/paper.sh math-4b-1k                               Qwen3-4B-Base on eight GPUs, as in the paper

Where this departs from the paper, and why:
1. The paper scores with a third model under eager attention, to have maps. Here WAAD and FAI come from the scoring pass
   that GRPO makes anyway for pi_old, without maps (metrics.py); the numbers are the same.
2. Groups of equal reward have zero advantage, hence zero gradient: they are left out of scoring and update.
3. The head split is measured on 32 responses at the first step and every --heads_every steps, not on all at each, by
   a pass of its own.
4. Where the paper is silent: the advantage's std is the sample's (n - 1); AdamW without weight decay, its learning rate
   reached over five steps; gradients clipped to norm 1; group size 8 and epsilon 0.2.
5. vLLM samples and the trainer's passes run in bfloat16 (over float32 weights) on a GPU, and on a CPU that has it for
   all but small models; else in float32 (--dtype). In bfloat16 the two round differently: gap_mean is far above
   float32's 1e-7, and the first ratio is only about 1. The output head's logits are bfloat16 too, as is common.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import HfArgumentParser, get_constant_schedule_with_warmup, set_seed
from transformers.hf_argparser import HfArg

import tasks
from credit import CREDITS, NEED_ATTENTION, assign_credit
from eval import evaluate
from grpo import group_advantages, micro_batches, shape_advantages, share_of_passes, token_logprobs, update
from heads import Heads, layer_range, split_heads
from metrics import Signals, measure_spans, observe
from node import checkpoint, precision, prepare, ranks
from node.reload import first_difference
from node.run import Clock, Run
from rollout import EMBEDDED, pad_batch, start_actor

WARMUP_STEPS = 5  # the learning rate grows over these
SPAN_ROWS = 32  # responses that the head split is measured on
DEFAULTS = {  # of arguments that are not given: for the embedded model; for any other model, the paper's
    "task": ("countdown-tiny", "countdown4"),
    "steps": (40, 500),
    "prompts": (32, 64),
    "minibatches": (4, 16),
    "lr": (2e-4, 1e-6),
    "max_tokens": (128, 1024),
    "max_model_len": (512, 2048),
    "kv_cache_gib": (0.5, 8.0),
}


def by_model(name: str, text: str):
    """An argument whose default depends on the model."""
    embedded, real = DEFAULTS[name]
    return HfArg(default=None, help=f"{text} (default: {embedded} for the embedded model, {real} for any other).")


@dataclass
class Args:
    """Train a language model with GRPO and attention-guided credit."""

    model: str = HfArg(default=EMBEDDED, help="Folder or hub name of the transformers checkpoint to start from.")
    task: str | None = by_model("task", f"One of: {', '.join(tasks.TASKS)}")
    data: str | None = HfArg(default=None, help="Local JSON, JSONL or parquet file in place of the task's dataset.")
    eval_task: str | None = HfArg(default=None, help="Task of the held-out problems (default: the same).")
    eval_data: str | None = HfArg(default=None, help="Local file in place of its dataset.")
    out: str | None = HfArg(default=None, help="Folder of the run; it must be new (default: a new one under runs/).")
    resume: str | None = HfArg(default=None, help="Run to go on with, a folder; beside it only --steps and --dry_run.")
    dry_run: bool = HfArg(default=False, help="Check arguments and data, print the plan and memory, start nothing.")
    engine: Literal["vllm", "torch"] = HfArg(default="vllm", help="The sampler; torch where vLLM is not installed.")
    dtype: Literal["auto", "float32", "bfloat16"] = HfArg(default="auto", help=precision.HELP)
    seed: int = HfArg(default=0, help="Seed of problems, sampling and minibatches.")

    credit: Literal[CREDITS] = HfArg(
        default="coupled",
        help="Which tokens get more of the advantage (Eq. 14-19); uniform is plain GRPO; scaled gives every token the "
        "mean gamma of coupled.",
    )
    q: float = HfArg(default=0.4, help="Share of tokens to credit.")
    gamma_amp: float = HfArg(default=1.5, help="The factor on their advantage.")
    alpha: float = HfArg(default=0.5, help="Coupled: the share that a dominated anchor hands to its intro.")
    k: int = HfArg(default=3, help="Coupled: how far before an anchor its intro may lie.")
    sign: Literal["both", "positive", "negative"] = HfArg(default="both", help="Which advantages gamma multiplies.")
    window: int = HfArg(default=10, help="W, where WAAD stops counting.")
    horizon: list[int] = HfArg(default_factory=lambda: [10, 100], help="FAI's H_lo H_hi; H_lo alone: to the end.")
    layers: Literal["middle", "bottom", "top", "all"] = HfArg(default="middle", help="Where five layers are sampled.")
    head_quantile: float = HfArg(default=0.3, help="Share of the sampled heads in the local, and in the global group.")
    heads_every: int = HfArg(default=10, help="Steps between measurements of the head split.")
    all_heads: bool = HfArg(default=False, help="Ablation: both groups are all sampled heads.")
    lowest: bool = HfArg(default=False, help="Ablation: credit the lowest q instead of the highest.")
    on_produced: bool = HfArg(default=False, help="Ablation: credit the token a row produced, not the row's own.")

    steps: int | None = by_model("steps", "Training steps, one batch of rollouts each")
    prompts: int | None = by_model("prompts", "Problems in a batch")
    group: int = HfArg(default=8, help="G, responses to each problem.")
    minibatches: int | None = by_model("minibatches", "Parts of a batch, a gradient step on each")
    micro_tokens: int = HfArg(default=2048, help="Tokens in one pass; changes memory and speed, not the result.")
    gradient_checkpointing: bool = HfArg(default=False, help="Keep only each layer's input: less memory, more time.")
    lr: float | None = by_model("lr", f"Learning rate of AdamW, reached over {WARMUP_STEPS} steps")
    epsilon: float = HfArg(default=0.2, help="Clipping of the probability ratio.")
    epsilon_high: float | None = HfArg(default=None, help="Upper clip, if another (clip-higher of DAPO: 0.28).")
    tis_cap: float | None = HfArg(
        default=None,
        help="Truncated importance sampling: weigh tokens by trainer over sampler probability, up to this.",
    )
    dynamic: bool = HfArg(default=False, help="Draw up to four batches until --prompts groups have unequal rewards.")
    max_tokens: int | None = by_model("max_tokens", "Longest response; a longer one is cut and judged as it is")
    max_model_len: int | None = by_model("max_model_len", "Longest prompt and response together")
    kv_cache_gib: float | None = by_model("kv_cache_gib", "vLLM's cache: more lets it generate more at once")
    eval_problems: int | None = HfArg(default=None, help="Held-out problems (default: the task's own number).")
    eval_samples: int = HfArg(default=2, help="Sampled responses to each of them.")
    eval_every: int = HfArg(default=20, help="Steps between evaluations; 0: only before and after.")
    save_every: int = HfArg(default=20, help="Steps between checkpoints; the last step is always saved.")
    keep: int = HfArg(default=2, help="Checkpoints kept.")


def sample(args: Args, actor_infer, problems: list[tasks.Problem]) -> tuple[list[list], Tensor, Tensor]:
    """G responses to each problem and their rewards [P,G]; each rank samples and verifies its share.

    With --dynamic, problems come in batches, and groups of equal reward are replaced by those of the next batch.
    Also returns the rewards of all that was sampled.
    """
    kept, all_rewards = [], []
    for start in range(0, len(problems), args.prompts):
        mine = ranks.share(problems[start : start + args.prompts])
        groups = actor_infer.generate([p.prompt for p in mine], args.group, args.max_tokens)
        rewards = [[tasks.reward(p, r.text) for r in group] for p, group in zip(mine, groups)]
        groups, rewards = ranks.all_gather(groups), ranks.all_gather(rewards)
        all_rewards += rewards
        kept += [(g, r) for g, r in zip(groups, rewards) if not args.dynamic or len(set(r)) > 1]
        if len(kept) >= args.prompts:
            break
    kept = kept[: args.prompts] or list(zip(groups, rewards))  # no group differs: the last batch, which teaches nothing
    return [g for g, _ in kept], torch.tensor([r for _, r in kept]), torch.tensor(all_rewards)


def measure_heads(args: Args, model, input_ids: Tensor, mask: Tensor, rows: Tensor) -> Heads:
    """The head split as these rows show it. Spans are averages, so a sample of the batch will do."""
    layers = layer_range(model.config.get_text_config().num_hidden_layers, args.layers)
    spans = 0.0
    for index, n in micro_batches(mask, rows, args.micro_tokens):
        response = mask[index, :n]
        spans += measure_spans(model, input_ids[index, :n], response, layers) * response.sum() / mask[rows].sum()
    is_local, is_global = split_heads(spans, args.head_quantile)
    everything = torch.ones_like(is_local)
    return Heads(layers, spans, *((everything, everything) if args.all_heads else (is_local, is_global)))


def score(args: Args, model, input_ids: Tensor, mask: Tensor, rows: Tensor, heads: Heads | None) -> Signals:
    """pi_old, entropy and, where there is a head split, WAAD and FAI of some rows; [B,N], 0 in the other rows."""
    horizon = (args.horizon[0], args.horizon[1] if len(args.horizon) == 2 else None)
    found = torch.zeros(4, *mask.shape, device=mask.device)
    passes = micro_batches(mask, rows, args.micro_tokens)
    for (index, n), counts in share_of_passes(passes, ranks.rank(), ranks.world_size()):
        batch = input_ids[index, :n], mask[index, :n]
        if heads:
            signals = observe(model, *batch, heads, args.window, horizon)[:4]
        else:
            with torch.no_grad():
                signals = token_logprobs(model, *batch, entropy=True)
        if counts:
            found[: len(signals), index, :n] = torch.stack(signals)
    return Signals(*ranks.all_reduce_sum(found), heads)


def train_step(
    args: Args, model, optimizer, actor_infer, problems: list[tasks.Problem], heads: Heads | None, generator
) -> tuple[dict, Heads | None]:
    """Sample, verify, score, credit, update, reload. Returns what to log and the head split (measured if None)."""
    clock, device = Clock(), next(model.parameters()).device
    passes = precision.passes(args.dtype, device)
    with clock("generate"):
        groups, rewards, all_rewards = sample(args, actor_infer, problems)  # [P][G], [P,G]
        actor_infer.sleep()
    rollouts = [response for group in groups for response in group]
    input_ids, mask, sampler_logprobs = (x.to(device) for x in pad_batch(rollouts))  # [B,N], B = P * G
    advantages = group_advantages(rewards).flatten().to(device)  # [B]
    order = torch.randperm(len(rollouts), generator=generator).to(device)
    rows = order[advantages[order] != 0]  # groups of equal reward teach nothing and are not scored
    if not len(rows):
        rows = order[: args.group]  # the gap is measured all the same
    scored = torch.zeros_like(mask)
    scored[rows] = mask[rows]  # [B,N], the response tokens that have signals

    with clock("credit"), passes:
        if heads is None and args.credit in NEED_ATTENTION:
            heads = measure_heads(args, model, input_ids, mask, order[:SPAN_ROWS])
    with clock("score"), passes:
        signals = score(args, model, input_ids, mask, rows, heads)
        old_logprobs = signals.logprobs
    with clock("credit"):
        gamma = assign_credit(
            args.credit, signals, scored, args.q, args.gamma_amp, args.alpha, args.k, args.lowest, args.on_produced,
            generator,
        )  # [B,N]  # fmt: skip
        shaped = shape_advantages(advantages, gamma, args.sign)  # [B,N]
    minibatches = order.tensor_split(min(args.minibatches, len(order)))  # --dynamic may have found few groups
    with clock("update"), passes:
        if args.tis_cap:
            shaped = shaped * (old_logprobs - sampler_logprobs).exp().clamp(max=args.tis_cap)
        learned = update(
            model, optimizer, input_ids, mask, old_logprobs, shaped, minibatches,
            args.micro_tokens, args.epsilon, args.epsilon_high, ranks.rank(), ranks.world_size(),
        )  # fmt: skip
        learned["loss"] = ranks.all_reduce_sum(torch.tensor(learned["loss"])).item()
    with clock("reload"):
        actor_infer.reload(model)
    with clock("check"):
        stale = [name for name in ranks.all_gather([first_difference(actor_infer, model, generator)]) if name]

    gap = (sampler_logprobs - old_logprobs)[scored].abs()
    record = {
        "reward": all_rewards.mean().item(),
        **learned,
        "entropy": signals.entropy[scored].mean().item(),
        "gap_mean": gap.mean().item(),
        "gap_max": gap.max().item(),
        "stale_weight": stale[0] if stale else None,  # that vLLM does not hold as the trainer does
        "gamma": gamma[scored].mean().item(),
        "length": mask.sum().item() / len(rollouts),
        "truncated": sum(r.truncated for r in rollouts),
        "empty": sum(not r.text for r in rollouts),
        "within_horizon": sum(len(r.ids) <= args.horizon[0] for r in rollouts),  # too short to have an anchor
        "problems": len(all_rewards),
        "equal_groups": int((all_rewards == all_rewards[:, :1]).all(1).sum()),
        "unequal_groups": int((rewards != rewards[:, :1]).any(1).sum()),  # of those kept
        "tokens_per_s": mask.sum().item() / sum(clock.seconds.values()),
        "seconds": clock.seconds,
    }
    return record, heads


def main(args: Args) -> None:
    with ranks.errors_in_one_line():
        args = prepare.complete(args, DEFAULTS)
        if args.dry_run:
            return prepare.print_plan(args)
        device = ranks.start()
        source, state = checkpoint.latest(args.resume) or (args.model, None)
        model, tokenizer, train_set, test_set = prepare.load(args, source, device)
        weights = {"params": [*model.parameters()], "initial_lr": args.lr}
        optimizer = torch.optim.AdamW([weights], args.lr, weight_decay=0.0, fused=True)
        run = Run(args, model, tokenizer, optimizer, state)
        run.say(f"{run.folder}: starting {args.engine} from {source}")
        seed = args.seed + ranks.rank()
        actor_infer = start_actor(
            args.engine, str(source), args.max_model_len, seed, args.kv_cache_gib, model, tokenizer,
            sleep_mode=True, dtype=args.dtype,
        )  # fmt: skip
    set_seed(seed)  # after the engine, which seeds the global generators too
    if state:
        actor_infer.sleep()  # restoring takes 16 bytes a weight at once
        checkpoint.restore(source, state, model, optimizer)
        actor_infer.reload(model)
    schedule = get_constant_schedule_with_warmup(optimizer, WARMUP_STEPS, last_epoch=run.step)

    def evaluate_held_out() -> None:
        mine = ranks.share(test_set)
        _, rewards = evaluate(actor_infer, mine, args.eval_samples, args.max_tokens)
        run.log_evaluation(torch.tensor(ranks.all_gather(rewards.tolist())).mean(1))

    with run.stopping_softly():
        if run.evaluation_is_due:
            evaluate_held_out()
        while not run.over:
            if run.step % args.heads_every == 0:
                run.heads = None  # measured anew
            problems = run.next_problems(train_set)
            record, run.heads = train_step(args, model, optimizer, actor_infer, problems, run.heads, run.generator())
            schedule.step()
            run.finish_step(record)
            if run.evaluation_is_due:
                evaluate_held_out()
    ranks.say(run.summary())
    actor_infer.close()
    ranks.stop()


if __name__ == "__main__":
    main(*HfArgumentParser(Args).parse_args_into_dataclasses())
