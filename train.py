"""GRPO with attention-guided credit, the whole loop (arXiv 2510.13554, Fig. 1 and Sec. 5).

    python train.py                                         the tiny model learns Countdown, on two CPU cores
    python train.py --credit uniform                        plain GRPO, to compare
    python train.py --resume runs/countdown-tiny-coupled-1  continue a run that was stopped
    node/paper.sh math-4b-1k                                Qwen3-4B-Base on eight GPUs, as in the paper

Read examples/minimal.py first: it is the same loop in one file, from attention maps. This one samples with vLLM,
needs no maps, runs on several GPUs, and can be stopped and resumed. `main` is the outer loop. `train_step` is one
training step; its numbered comments are the rows of the table in README.md.

Several GPUs. torchrun starts this program once per GPU; each copy is a rank. All ranks hold the same small things:
problems, rollouts, rewards, advantages, random order. Each does its share of the two large things, and then they
exchange results. A rank samples its share of the problems (`ranks.my_share`, `ranks.all_gather`), and it makes its
share of the forward and backward passes (`share_passes`, `ranks.all_reduce_sum`). FSDP2 keeps a part of the weights
on each rank and averages gradients. With one process these functions return what they are given.

Where this departs from the paper, and why:

1. The paper scores with a third copy of the model under eager attention, to have maps. Here WAAD and FAI come from the
   scoring pass that GRPO makes anyway for pi_old, without maps (metrics.py). The numbers are the same.
2. Groups of equal reward have advantage 0, hence gradient 0. They are not computed, but count in the mean of the loss.
3. The head split is measured on 32 responses at the first step and then every --heads_every steps, by its own pass.
4. vLLM and the trainer's passes compute in bfloat16 on a GPU, over float32 weights, and in float32 on most CPUs
   (--dtype). In bfloat16, vLLM and the trainer round differently, so gap_mean is far above float32's 1e-7. The scoring
   pass and the update pass also round differently there, so before the first update the ratio is only about 1.

Where the paper is silent, we chose: the standard deviation of a group divides by n - 1; AdamW without weight decay; the
learning rate grows over five steps; gradients are clipped to norm 1; group size 8 and epsilon 0.2. credit.py lists the
choices for gamma.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import get_constant_schedule_with_warmup
from transformers.hf_argparser import HfArg

import tasks
from credit import CREDITS, NEED_ATTENTION, assign_credit
from eval import evaluate
from grpo import group_advantages, micro_batches, shape_advantages, share_passes, token_logprobs, update
from heads import Heads
from metrics import Signals, measure_heads, observe
from node import checkpoint, precision, prepare, ranks
from node.folder import open_folder
from node.run import DYNAMIC_BATCHES, Clock, Run
from node.samples import choose_sample
from node.settings import TINY, parse_args
from node.stale import find_stale_weight, try_reload
from rollout import Rollout, chat, pad_batch, start_actor

WARMUP_STEPS = 5  # the learning rate grows over these
SPAN_ROWS = 32  # responses that the head split is measured on
# Default values: (for the tiny model, for any other model). Learning rate, batch and response length of the second are
# the paper's.
DEFAULTS = {
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
    tiny, other = DEFAULTS[name]
    return HfArg(default=None, help=f"{text} (default: {tiny} for the tiny model, {other} for any other).")


@dataclass
class Args:
    """Train a language model with GRPO and attention-guided credit."""

    # What is trained, and on what
    model: str = HfArg(default=TINY, help="Folder or hub name of the transformers checkpoint to start from.")
    task: str | None = by_model("task", f"Problems and their reward: {tasks.HELP}")
    data: str | None = HfArg(
        default=None,
        help=f"Local file to read in place of the task's dataset: {tasks.COLUMNS}; without --eval_data, a part of it "
        "is held out.",
    )
    eval_task: str | None = HfArg(default=None, help="Task of the held-out problems (default: --task).")
    eval_data: str | None = HfArg(default=None, help="Local file to read in place of the held-out task's dataset.")
    chat: bool = HfArg(default=False, help="Put each prompt into the model's chat template, as a user's message.")
    system: str | None = HfArg(default=None, help="--chat: a system message before it.")
    thinking: Literal["on", "off"] | None = HfArg(
        default=None, help="--chat: let the model think before it answers, or not, if its template knows that."
    )
    stop: list[str] | None = HfArg(
        default=None, help="Texts that end a response (default: the task's own, and none with --chat)."
    )
    reward_processes: int = HfArg(default=1, help="Processes on each rank that judge responses at the same time.")
    seed: int = HfArg(default=0, help="Seed of problems, sampling and minibatches.")

    # The run
    out: str | None = HfArg(default=None, help="New folder for the run (default: the next free one under runs/).")
    resume: str | None = HfArg(
        default=None, help="Folder of a run to continue; only --steps and --dry_run may be given beside it."
    )
    dry_run: bool = HfArg(default=False, help="Check arguments and data, print the plan and the memory, start nothing.")
    engine: Literal["vllm", "torch"] = HfArg(
        default="vllm", help="The sampler; torch is transformers' generate, for machines without vLLM."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = HfArg(default="auto", help=precision.HELP)
    steps: int | None = by_model("steps", "Training steps, one batch of rollouts each")
    eval_problems: int | None = HfArg(default=None, help="Held-out problems (default: the task's own number).")
    eval_samples: int = HfArg(default=2, help="Sampled responses to each held-out problem.")
    eval_every: int = HfArg(default=20, help="Steps between evaluations; 0 evaluates only before and after.")
    save_every: int = HfArg(default=20, help="Steps between checkpoints; the last step is always saved.")
    keep: int = HfArg(default=2, help="How many checkpoints are kept.")
    report: Literal["none", "tensorboard", "wandb"] = HfArg(
        default="none", help="Also send the numbers of metrics.jsonl to TensorBoard or to Weights & Biases."
    )

    # The credit
    credit: Literal[CREDITS] = HfArg(
        default="coupled",
        help="Which tokens get a larger advantage (Eq. 14-19); uniform is plain GRPO, and scaled gives every token the "
        "mean gamma of coupled.",
    )
    q: float = HfArg(default=0.4, help="Share of a response's tokens to credit.")
    gamma_amp: float = HfArg(
        default=1.5,
        help="gamma of a credited token, the factor on its advantage; coupled: of an anchor that shares nothing.",
    )
    alpha: float = HfArg(default=0.5, help="coupled: share of a dominated anchor's bonus that goes to its intro token.")
    k: int = HfArg(default=3, help="coupled: how many tokens before an anchor are searched for its intro token.")
    sign: Literal["both", "positive", "negative"] = HfArg(default="both", help="Advantages that gamma multiplies.")
    window: int = HfArg(default=10, help="W of WAAD: distances above W count as W.")
    horizon: list[int] = HfArg(
        default_factory=lambda: [10, 100], help="H_lo and H_hi of FAI; H_lo alone means to the end of the response."
    )
    layers: Literal["middle", "bottom", "top", "all"] = HfArg(
        default="middle", help="Part of the model's softmax layers that the five are taken from."
    )
    head_quantile: float = HfArg(default=0.3, help="Share of the sampled heads in the local and in the global group.")
    heads_every: int = HfArg(default=10, help="Steps between two measurements of the head split.")
    all_heads: bool = HfArg(default=False, help="Ablation: both groups are all sampled heads.")
    lowest: bool = HfArg(default=False, help="Ablation: credit the lowest q instead of the highest.")
    on_produced: bool = HfArg(
        default=False, help="Ablation: give gamma_t to token t+1, which the logits at position t predict."
    )

    # GRPO
    prompts: int | None = by_model("prompts", "Problems in a batch")
    group: int = HfArg(default=8, help="G, responses to each problem.")
    minibatches: int | None = by_model("minibatches", "Gradient steps on a batch, each on its own part of it")
    lr: float | None = by_model("lr", f"Learning rate of AdamW, reached after {WARMUP_STEPS} steps")
    epsilon: float = HfArg(default=0.2, help="Clip range of the probability ratio.")
    epsilon_high: float | None = HfArg(
        default=None, help="Upper clip range (default: --epsilon; DAPO's clip-higher is 0.28)."
    )
    tis_cap: float | None = HfArg(
        default=None,
        help="Truncated importance sampling: weigh tokens by trainer over sampler probability, up to this cap "
        "(default: no weights).",
    )
    loss: Literal["response", "token"] = HfArg(
        default="response",
        help="Mean over responses of each one's mean (the paper), or over a minibatch's tokens (DAPO).",
    )
    mask_truncated: bool = HfArg(
        default=False,
        help="Responses that were cut off at --max_tokens get advantage 0, so nothing is learned from them.",
    )
    dynamic: bool = HfArg(
        default=False, help=f"Draw up to {DYNAMIC_BATCHES} batches until --prompts groups have unequal rewards."
    )

    # Lengths, memory
    max_tokens: int | None = by_model(
        "max_tokens", "Longest response in tokens; a longer one is cut and judged as it is"
    )
    max_model_len: int | None = by_model("max_model_len", "Longest prompt and response together, in tokens")
    micro_tokens: int = HfArg(
        default=2048, help="Tokens in one pass; changes memory and speed, the result only by rounding."
    )
    gradient_checkpointing: bool = HfArg(
        default=False, help="Recompute layers in the backward pass: less memory, more time."
    )
    kv_cache_gib: float | None = by_model("kv_cache_gib", "GiB of vLLM's cache; more lets it generate more at once")


class Batch(NamedTuple):
    """What was sampled, and how it was judged."""

    groups: list[list[Rollout]]  # [P][G], G responses to each of P problems
    rewards: Tensor  # [P,G]
    errors: list[str]  # a line for each reward that raised; it counts as 0
    no_verdict: int  # responses that the judge failed to judge; they count as 0


def sample_batch(args: Args, sampler, problems: list[tasks.Problem], clock: Clock) -> Batch:
    """G responses to each problem, and their rewards."""
    mine = ranks.my_share(problems)
    stop = tasks.stops(args.task, args.stop, args.chat)
    with clock("generate"):
        groups = sampler.generate([p.prompt for p in mine], n=args.group, max_tokens=args.max_tokens, stop=stop)
    with clock("reward"):
        texts = [[response.text for response in group] for group in groups]
        rewards, errors, no_verdict = tasks.judge(args.task, mine, texts, args.reward_processes)
    rewards = torch.tensor(ranks.all_gather(rewards))
    return Batch(ranks.all_gather(groups), rewards, ranks.gather_lists(errors), sum(ranks.all_gather([no_verdict])))


def sample_dynamic(args: Args, sampler, problems: list[tasks.Problem], clock: Clock) -> tuple[Batch, Tensor]:
    """--dynamic: sample batch after batch and keep the groups of unequal reward, until --prompts groups are found.

    problems: enough for all batches. Returns (the groups kept, the rewards of everything sampled). If every group has
    equal rewards, the last batch is returned; its gradient is 0.
    """
    kept_groups, kept_rewards, all_rewards, errors, no_verdict = [], [], [], [], 0
    for start in range(0, len(problems), args.prompts):
        batch = sample_batch(args, sampler, problems[start : start + args.prompts], clock)
        all_rewards.append(batch.rewards)
        errors += batch.errors
        no_verdict += batch.no_verdict
        for group, group_rewards in zip(batch.groups, batch.rewards):
            if (group_rewards != group_rewards[0]).any():
                kept_groups.append(group)
                kept_rewards.append(group_rewards)
        if len(kept_groups) >= args.prompts:
            break
    if kept_groups:
        batch = batch._replace(
            groups=kept_groups[: args.prompts], rewards=torch.stack(kept_rewards[: args.prompts])
        )  # fmt: skip
    return batch._replace(errors=errors, no_verdict=no_verdict), torch.cat(all_rewards)


def split_into_local_and_global(args: Args, model, input_ids: Tensor, mask: Tensor) -> Heads:
    """The head split of these rows, a sample of the batch. All ranks measure the same rows, so all get the same split.

    Heads at the border of a group may change sides from one sample to the next: see lab/results/directions.md.
    """
    heads = measure_heads(
        model, input_ids, mask, layers=args.layers, quantile=args.head_quantile, micro_tokens=args.micro_tokens
    )
    if args.all_heads:
        all_of_them = torch.ones_like(heads.is_local)
        heads = heads._replace(is_local=all_of_them, is_global=all_of_them)
    return heads


def rows_to_score(advantages: Tensor, order: Tensor, at_least: int) -> Tensor:
    """The numbers of the rows whose advantage is not 0, in this order. If there is none, a few others: see below."""
    rows = order[advantages[order] != 0]
    # A step without any gradient still logs how far sampler and trainer differ (gap_mean). That takes some rows.
    return rows if len(rows) else order[:at_least]


def importance_weights(trainer_logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> Tensor:
    """--tis_cap, truncated importance sampling: trainer over sampler probability of each token, at most cap. [B,N]"""
    return (trainer_logprobs - sampler_logprobs).exp().clamp(max=cap)


def score(args: Args, model, input_ids: Tensor, mask: Tensor, rows: Tensor, heads: Heads | None) -> Signals:
    """The scoring pass over some rows: log pi_old, entropy and, if there is a head split, WAAD and FAI.

    [B,N] each, 0 in the other rows. It is made in passes of --micro_tokens, which the ranks share.
    """
    horizon = (args.horizon[0], args.horizon[1] if len(args.horizon) == 2 else None)
    signals = torch.zeros(4, *mask.shape, device=mask.device)  # log-probs, entropy, WAAD, FAI
    passes = micro_batches(mask, rows, args.micro_tokens)
    for (row_numbers, width), is_mine in share_passes(passes, ranks.rank(), ranks.world_size()):
        ids, response = input_ids[row_numbers, :width], mask[row_numbers, :width]
        if heads:
            seen = observe(model, ids, response, heads, window=args.window, horizon=horizon)[:4]
        else:
            with torch.no_grad():
                seen = token_logprobs(model, ids, response, entropy=True)
        if is_mine:
            signals[: len(seen), row_numbers, :width] = torch.stack(seen)
    logprobs, entropy, waad, fai = ranks.all_reduce_sum(signals)
    return Signals(logprobs, entropy, waad, fai, heads)


def train_step(
    args: Args,
    model,
    optimizer,
    sampler,
    problems: list[tasks.Problem],
    heads: Heads | None,
    generator: torch.Generator,
    credit: Callable[..., Tensor] | None = None,
) -> tuple[dict, Heads | None]:
    """One training step. Returns what to log, and the head split (measured if it was None and is needed).

    credit: a credit function of your own, in place of --credit (credit.assign_credit says what it is called with).
    """
    clock, device = Clock(), next(model.parameters()).device
    autocast = precision.autocast(args.dtype, device)  # on a CPU; on a GPU FSDP2 does the casting

    # 1, 2. Sample G responses to each problem and verify them. Then the sampler frees the GPU.
    if args.dynamic:
        batch, all_rewards = sample_dynamic(args, sampler, problems, clock)
    else:
        batch = sample_batch(args, sampler, problems, clock)
        all_rewards = batch.rewards  # [P,G]
    with clock("generate"):
        sampler.sleep()

    # From here on one row per response: [B,N] with B = P * G. `order` shuffles the rows.
    rollouts = [response for group in batch.groups for response in group]
    input_ids, mask, sampler_logprobs = (x.to(device) for x in pad_batch(rollouts))
    order = torch.randperm(len(rollouts), generator=generator).to(device)

    # 3. Advantages inside each group (Eq. 6). Rows with advantage 0 have gradient 0, so they are not scored.
    advantages = group_advantages(batch.rewards).flatten().to(device)  # [B]
    if args.mask_truncated:
        advantages[torch.tensor([response.truncated for response in rollouts])] = 0
    rows = rows_to_score(advantages, order, at_least=args.group)
    is_scored = torch.zeros_like(mask)
    is_scored[rows] = mask[rows]  # [B,N], the response tokens that get signals; the others have advantage 0

    # 4. Which heads look near, which look far (Eq. 7, 8). main sets heads to None every --heads_every steps.
    with clock("credit"), autocast:
        if heads is None and (credit or args.credit in NEED_ATTENTION):
            some_rows = order[:SPAN_ROWS]
            heads = split_into_local_and_global(args, model, input_ids[some_rows], mask[some_rows])

    # 5-7. One forward pass without gradient: log pi_old, entropy, WAAD and FAI (Eq. 9, 10).
    with clock("score"), autocast:
        signals = score(args, model, input_ids, mask, rows, heads)

    # 8. gamma of each token (Eq. 14-19); 1 in the rows that are not scored.
    with clock("credit"):
        settings = dict(q=args.q, amp=args.gamma_amp, alpha=args.alpha, k=args.k, lowest=args.lowest)
        gamma = assign_credit(
            credit or args.credit, signals, is_scored, input_ids, **settings, produced=args.on_produced,
            generator=generator, model=model,
        )  # [B,N]  # fmt: skip

    # 9. The clipped loss with advantage * gamma in place of the advantage, on each minibatch (Eq. 12, 13).
    token_advantages = shape_advantages(advantages, gamma, args.sign)  # [B,N]
    if args.tis_cap:
        token_advantages = token_advantages * importance_weights(signals.logprobs, sampler_logprobs, args.tis_cap)
    with clock("update"), autocast:
        stats = update(
            model, optimizer, input_ids, mask, old_logprobs=signals.logprobs, advantages=token_advantages,
            minibatches=order.tensor_split(min(args.minibatches, len(order))),  # --dynamic may have found few groups
            micro_tokens=args.micro_tokens, epsilon=args.epsilon, epsilon_high=args.epsilon_high,
            token_level=args.loss == "token", rank=ranks.rank(), world=ranks.world_size(),
        )  # fmt: skip
        for name in ("loss", "clip_fraction", "kl"):  # each rank has its share of the sum
            stats[name] = ranks.all_reduce_sum(torch.tensor(stats[name])).item()

    # 10. The new weights go to the sampler, in place. Then some of its tensors are compared with the trainer's.
    with clock("reload"):
        sampler.reload(model)
    with clock("check"):
        stale_weights = ranks.all_gather([find_stale_weight(sampler, model, generator)])

    record = {
        "reward": all_rewards.mean().item(),
        "lr": optimizer.param_groups[0]["lr"],
        **stats,  # loss, clip_fraction, kl, grad_norm, skipped
        **describe_tokens(signals, gamma, sampler_logprobs, is_scored),
        "stale_weight": next((name for name in stale_weights if name), None),  # differs between sampler and trainer
        **describe_rollouts(batch, all_rewards, args.horizon[0]),
        "tokens_per_s": mask.sum().item() / sum(clock.seconds.values()),
        "seconds": clock.seconds,
        "sample": choose_sample(rollouts, batch.rewards, advantages, gamma, mask),  # one group, for samples.jsonl
    }
    return record, heads


def describe_tokens(signals: Signals, gamma: Tensor, sampler_logprobs: Tensor, is_scored: Tensor) -> dict:
    """What metrics.jsonl says about the scored tokens of a step. All [B,N]."""
    gap = (sampler_logprobs - signals.logprobs)[is_scored].abs()  # |log p_sampler - log p_trainer|
    return {
        "entropy": signals.entropy[is_scored].mean().item(),
        "gap_mean": gap.mean().item(),
        "gap_max": gap.max().item(),
        "gamma": gamma[is_scored].mean().item(),
    }


def describe_rollouts(batch: Batch, all_rewards: Tensor, horizon_low: int) -> dict:
    """What metrics.jsonl says about the responses of a step. batch: those that were trained on."""
    rollouts = [response for group in batch.groups for response in group]
    return {
        "responses": len(rollouts),
        "length": sum(len(r.ids) for r in rollouts) / len(rollouts),
        "truncated": sum(r.truncated for r in rollouts),
        "empty": sum(not r.text for r in rollouts),
        "zero_reward": int((batch.rewards == 0).sum()),
        "within_horizon": sum(len(r.ids) <= horizon_low for r in rollouts),  # too short to have an anchor
        "problems": len(all_rewards),
        "equal_groups": int((all_rewards == all_rewards[:, :1]).all(1).sum()),
        "unequal_groups": int((batch.rewards != batch.rewards[:, :1]).any(1).sum()),
        "reward_errors": len(batch.errors),
        "first_reward_error": batch.errors[0] if batch.errors else None,
        "no_verdict": batch.no_verdict,
    }


def main(args: Args, credit: Callable[..., Tensor] | None = None) -> None:
    """A whole run: start or resume it; then train, log, evaluate and save. credit: as in train_step."""
    # Check everything that can be wrong before anything long starts.
    with ranks.errors_in_one_line():
        args = prepare.complete_args(args, DEFAULTS)
        if args.dry_run:
            return prepare.print_plan(args)
        device = ranks.start()
    with ranks.errors_in_one_line(), open_folder(args) as folder:  # a run that does not start leaves no folder
        saved_at, state = checkpoint.find_latest(args.resume)  # None, None for a new run
        source = saved_at or args.model
        model, tokenizer, train_set, test_set = prepare.load(args, source, device, state)
        # The schedule below starts at run.step: a new run with a fifth of lr, a resumed one where it was. For that
        # torch requires initial_lr.
        weights = {"params": [*model.parameters()], "initial_lr": args.lr}
        optimizer = torch.optim.AdamW([weights], args.lr, weight_decay=0.0, fused=True)
        problems = prepare.identify_problems(train_set, test_set)
        run = Run(args, folder, model, tokenizer, optimizer, state=state, problems=problems)
        run.say(f"{run.folder}: starting {args.engine} from {source}")
        sampler = start_actor(
            args.engine, str(source), args.max_model_len, args.seed, args.kv_cache_gib, model, tokenizer,
            sleep_mode=True, dtype=args.dtype, chat=chat(args),
        )  # fmt: skip
        # Does vLLM compute this model as the trainer does, and take over changed weights? If not, ValueError.
        if found := try_reload(sampler, model, train_set, args.max_tokens, args.dtype):
            run.say(found)
        if state:
            sampler.sleep()  # restoring takes 16 bytes a weight at once
            checkpoint.restore(saved_at, model, optimizer)
            sampler.reload(model)
        schedule = get_constant_schedule_with_warmup(optimizer, WARMUP_STEPS, last_epoch=run.step)

    def evaluate_held_out() -> None:
        run.begin_evaluation()
        task = args.eval_task or args.task
        _, rewards = evaluate(
            sampler, task, ranks.my_share(test_set), args.eval_samples, args.max_tokens,
            stop=tasks.stops(task, args.stop, args.chat), reward_processes=args.reward_processes,
        )  # fmt: skip
        run.log_evaluation(torch.tensor(ranks.all_gather(rewards.tolist())).mean(1), test_set)

    with run.stopping_softly():  # Ctrl-C and SIGTERM end the run, saved: see node/run.py
        if run.evaluation_is_due:
            evaluate_held_out()
        while not run.is_done:
            if run.step % args.heads_every == 0:
                run.heads = None  # measure the split again
            problems, generator = run.begin_step(train_set)
            record, run.heads = train_step(
                args, model, optimizer, sampler, problems, run.heads, generator, credit
            )  # fmt: skip
            schedule.step()
            run.finish_step(record)  # logs, saves when due, stops a run that cannot go on
            if run.evaluation_is_due:
                evaluate_held_out()
    ranks.print_once(run.summary())
    sampler.close()
    ranks.stop()


if __name__ == "__main__":
    main(parse_args(Args))
