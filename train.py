"""GRPO with attention-guided credit, the whole loop (arXiv 2510.13554, Fig. 1 and Sec. 5).

    python train.py                                        the embedded model learns Countdown, on two CPU cores
    python train.py --credit uniform                       plain GRPO, to compare
    python train.py --resume runs/countdown-tiny-coupled-1 a run that was stopped, by whatever, goes on
    ./paper.sh math-4b-1k                                  Qwen3-4B-Base on eight GPUs, as in the paper

Where this departs from the paper, and why:
1. The paper scores with a third model under eager attention, to have maps. Here WAAD and FAI come from the scoring pass
   that GRPO makes anyway for pi_old, without maps (metrics.py); the numbers are the same.
2. Groups of equal reward have zero advantage, hence zero gradient: they are left out of scoring and update.
3. The head split is measured on 32 responses at the first step and every --heads_every steps, not on all at each.
4. Where the paper is silent: the advantage's std is the sample's (n - 1); AdamW without weight decay, its learning rate
   reached over five steps; gradients clipped to norm 1; group size 8 and epsilon 0.2.
5. On a CPU all is float32. On a GPU vLLM samples and the trainer's passes run in bfloat16 (over float32 weights);
   the two round differently, so the gap between them is far above the CPU's 1e-7.
6. The defaults are the embedded model's; the paper's settings are in paper.sh.
"""

import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, HfArgumentParser, set_seed
from transformers.modeling_layers import GradientCheckpointingLayer

import checkpoint
import credit
import memory
import parallel
import tasks
from config import STEPS, Args, check, resumed, write_args
from eval import evaluate, mean_interval
from grpo import check_head, group_advantages, micro_batches, shape_advantages, token_logprobs, update
from heads import Heads, layer_range, split_heads
from linkage import Stability
from metrics import Signals, measure_spans, observe
from rollout import encode, load_model, load_tokenizer, pack, start_actor
from runs import Log, new_run_folder, plot, stops_softly, take

SPAN_ROWS = 32  # responses that a head split is measured on
RHYTHM = ("coupled", "scaled", "local", "global")  # the credits that need WAAD and FAI

# The largest mean |logp_vllm - logp_torch| that rounding can explain; beyond it the sampler has other weights.
GAP_LIMIT = {"cpu": 1e-3, "cuda": 0.3}
SKIP_LIMIT = 3  # steps in a row with a gradient that is not finite


def score(args: Args, model, input_ids: Tensor, mask: Tensor, rows: Tensor, heads: Heads | None) -> Signals:
    """The scoring pass over some rows: pi_old, entropy and, where credit needs a head split, WAAD and FAI; [R,N]."""
    out, seconds = torch.zeros(4, *mask.shape, device=mask.device), 0.0
    passes = micro_batches(mask, rows, args.micro_tokens)
    for i in range(parallel.rank(), -(-len(passes) // parallel.world()) * parallel.world(), parallel.world()):
        index, n = passes[i % len(passes)]
        part = input_ids[index, :n], mask[index, :n]
        if heads:
            signals = observe(model, *part, heads, args.window, horizon(args))
            found, seconds = torch.stack(signals[:4]), seconds + signals.seconds
        else:
            with torch.no_grad():
                found = torch.stack(token_logprobs(model, *part, entropy=True))
        if i < len(passes):  # else it only keeps the other ranks company
            out[: len(found), index, :n] = found
    return Signals(*parallel.total(out), heads, seconds)


def measure_heads(args: Args, model, input_ids: Tensor, mask: Tensor, rows: Tensor) -> Heads:
    """The head split as these rollouts show it. Spans are averages, so a sample of the batch will do."""
    layers = layer_range(model.config.get_text_config().num_hidden_layers, args.layers)
    spans = 0.0
    for index, n in micro_batches(mask, rows, args.micro_tokens):
        part = mask[index, :n]
        spans += measure_spans(model, input_ids[index, :n], part, layers) * part.sum() / mask[rows].sum()
    local, far = split_heads(spans, args.quantile)
    everything = torch.ones_like(local)
    return Heads(layers, spans, *((everything, everything) if args.all_heads else (local, far)))


def horizon(args: Args) -> tuple[int, int | None]:
    """FAI's (H_lo, H_hi)."""
    return (args.horizon[0], args.horizon[1] if len(args.horizon) == 2 else None)


def gammas(args: Args, signals: Signals, mask: Tensor, generator: torch.Generator) -> Tensor:
    """The credit of each token, Eq. 14-19. [R,N]"""
    how = dict(q=args.q, amp=args.amp)
    match args.credit:
        case "coupled" | "scaled":
            how |= dict(alpha=args.alpha, k=args.k, lowest=args.lowest)
            gamma = credit.coupled_rhythm(signals.waad, signals.fai, mask, **how)
            gamma = credit.scaled(gamma, mask) if args.credit == "scaled" else gamma
        case "local":
            gamma = credit.local_chunk(signals.waad, mask, **how, lowest=args.lowest)
        case "global":
            gamma = credit.global_anchor(signals.fai, mask, **how, lowest=args.lowest)
        case "entropy":
            gamma = credit.high_entropy(signals.entropy, mask, **how, lowest=args.lowest)
        case "random":
            gamma = credit.random_tokens(mask, **how, generator=generator)
        case "uniform":
            gamma = credit.uniform(mask)
    return credit.on_produced(gamma, mask) if args.on_produced else gamma


class Clock:
    """Seconds by phase of a step: with clock("generate"): ..."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str):
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


def sample(args: Args, actor_infer, problems: list[tasks.Problem]) -> tuple[list[list], Tensor, Tensor]:
    """G responses to each problem and their rewards [P,G]; each rank samples and verifies its share.

    With --dynamic, problems come in batches, and groups of equal reward are replaced by those of the next batch.
    Also returns the rewards of all that was sampled.
    """
    groups, rewards = [], []
    for start in range(0, len(problems), args.prompts):
        mine = parallel.share(problems[start : start + args.prompts])
        rollouts = actor_infer.generate([p.prompt for p in mine], args.group, args.max_tokens) if mine else []
        verified = parallel.gather([(g, [tasks.reward(p, r.text) for r in g]) for p, g in zip(mine, rollouts)])
        rewards += [r for _, r in verified]
        groups += [(g, r) for g, r in verified if not args.dynamic or len(set(r)) > 1]
        if len(groups) >= args.prompts:
            break
    groups = groups[: args.prompts] or verified
    return [g for g, _ in groups], torch.tensor([r for _, r in groups]), torch.tensor(rewards)


def train_step(
    args: Args, model, optimizer, actor_infer, problems: list[tasks.Problem], heads: Heads | None, generator
) -> tuple[dict, Heads | None]:
    """Sample, verify, score, credit, update, reload. Returns what to log and the head split (measured if None)."""
    clock = Clock()
    with clock("generate"):
        rollouts, rewards, sampled_rewards = sample(args, actor_infer, problems)  # [P][G], [P,G]
        actor_infer.sleep()
    device = next(model.parameters()).device
    advantages = group_advantages(rewards).flatten().to(device)  # [R], R = P * G
    flat = [r for group in rollouts for r in group]
    input_ids, mask, sampled = (x.to(device) for x in pack(flat))  # [R,N]
    order = torch.randperm(len(flat), generator=generator).to(device)
    rows = order[advantages[order] != 0]  # groups of equal reward teach nothing and are not scored
    idle = len(rows) == 0
    if idle:
        rows = order[: args.group]  # the gap is measured all the same

    with clock("credit"):
        if heads is None and args.credit in RHYTHM:
            heads = measure_heads(args, model, input_ids, mask, rows[:SPAN_ROWS])
    with clock("score"):
        signals = score(args, model, input_ids, mask, rows, heads)
    with clock("credit"):
        gamma = gammas(args, signals, mask, generator)
        shaped = shape_advantages(advantages, gamma, args.sign)  # [R,N]
    clock.seconds["score"] -= signals.seconds  # WAAD and FAI are made inside the scoring pass
    clock.seconds["credit"] += signals.seconds

    with clock("update"):
        old, minibatches = signals.logprobs, order.tensor_split(args.updates)
        if args.importance_cap:
            shaped = shaped * (old - sampled).exp().clamp(max=args.importance_cap)
        learned = {"loss": 0.0, "grad_norm": 0.0, "skipped": 0} if idle else update(
            model, optimizer, input_ids, mask, old, shaped, minibatches, args.micro_tokens, args.epsilon,
            args.epsilon_high, parallel.rank(), parallel.world(),
        )  # fmt: skip
        learned["loss"] = parallel.total(torch.tensor(learned["loss"])).item()
    with clock("reload"):
        actor_infer.reload(model)

    scored = mask[rows]
    gap = (sampled - old)[rows][scored].abs()
    record = {
        "reward": sampled_rewards.mean().item(),
        **learned,
        "entropy": signals.entropy[rows][scored].mean().item(),
        "gap_mean": gap.mean().item(),
        "gap_max": gap.max().item(),
        "gamma": gamma[rows][scored].mean().item(),
        "length": mask.sum().item() / len(flat),
        "truncated": sum(r.truncated for r in flat),
        "empty": sum(not r.text for r in flat),
        "within_horizon": sum(len(r.ids) <= args.horizon[0] for r in flat),  # too short to have an anchor
        "problems": len(sampled_rewards),
        "equal_groups": int((sampled_rewards == sampled_rewards[:, :1]).all(1).sum()),
        "tokens_per_s": mask.sum().item() / sum(clock.seconds.values()),
        "seconds": clock.seconds,
    }
    return record, heads


def prepare(args: Args, source: str):
    """Tokenizer, training and held-out problems; a training problem too long for --context is left out.

    Raises ValueError for arguments and data that cannot work.
    """
    check(args)
    tokenizer = load_tokenizer(source, args.context)
    test_set = tasks.load(args.eval_task or args.task, "test", args.eval_problems, data=args.eval_data)
    encode(tokenizer, [p.prompt for p in test_set], args.max_tokens, args.context)
    every = tasks.load(args.task, "train", seed=args.seed, data=args.data)
    lengths = map(len, tokenizer([p.prompt for p in every]).input_ids)
    train_set = [p for p, n in zip(every, lengths) if n + args.max_tokens <= args.context]
    if args.prompts > len(train_set):
        raise ValueError(
            f"--prompts {args.prompts}: {args.task} has {len(every)} training problems, {len(train_set)} of them short "
            f"enough for a context of {args.context} tokens with responses of {args.max_tokens}"
        )
    if len(train_set) < len(every) and parallel.rank() == 0:
        print(f"{args.task}: {len(every) - len(train_set)} of {len(every)} problems are too long and left out")
    return tokenizer, train_set, test_set


def plan(args: Args) -> None:
    """--dry_run: say what would be done, from the model's configuration, tokenizer and data alone."""
    _, train_set, test_set = prepare(args, args.model)
    shape = AutoConfig.from_pretrained(args.model)
    gib = memory.estimate(
        shape, parallel.world(), args.micro_tokens, args.kv_cache_gib, checkpointing=args.checkpointing
    )
    print(
        f"{args.model}: {memory.parameters(shape)[0]:,} weights, {parallel.world()} process(es)\n"
        f"{args.task}: {len(train_set)} training problems; {len(test_set)} of {args.eval_task or args.task} held out\n"
        f"the first: {train_set[0].prompt!r}\n"
        f"{args.steps} steps of {args.prompts} problems x {args.group} responses of up to {args.max_tokens} tokens, "
        f"{args.updates} updates each, learning rate {args.lr:g}\n"
        f"credit {args.credit}, q {args.q}, gamma {args.amp}, WAAD window {args.window}, FAI horizon {args.horizon}\n"
        f"GiB on each GPU, computed: {', '.join(f'{name} {size:.1f}' for name, size in gib.items() if size >= 0.05)}\n"
        "dry run: nothing was started"
    )


def load(args: Args, source: str):
    """Model, tokenizer, training and held-out problems, and whether attention can be recorded.

    Raises ValueError for whatever would stop the run later.
    """
    tokenizer, train_set, test_set = prepare(args, source)
    model, _ = load_model(source, "cpu")
    check_head(model)
    recordable = True
    try:  # a model without recordable attention says so now
        probe = torch.tensor([[0, 1, 2]])
        measure_heads(args, model, probe, probe > 0, rows=torch.tensor([0]))
    except ValueError:
        recordable = False
        if args.credit in RHYTHM:
            raise
    if args.checkpointing:
        model.gradient_checkpointing_enable()
        for module in model.modules():  # only these look at it: dropout, if there is any, stays off
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True
    return model, tokenizer, train_set, test_set, recordable


def main(args: Args) -> None:
    started, found = time.perf_counter(), None
    try:
        if args.resume:
            args, folder = resumed(args), Path(args.resume)
        args = replace(args, steps=STEPS if args.steps is None else args.steps)
        if args.dry_run:
            return plan(args) if parallel.rank() == 0 else None
        device = parallel.start()
        if args.resume:
            found = checkpoint.latest(folder)
            if found and args.steps < found[1]["step"]:
                raise ValueError(f"--steps {args.steps}: {found[0]} has {found[1]['step']} already")
            if parallel.rank() == 0:
                write_args(args, folder)  # more steps than before, perhaps
        source, state = found or (args.model, {})
        model, tokenizer, train_set, test_set, recordable = load(args, str(source))
        if not args.resume:
            name = f"{args.task}-{args.credit}"
            folder = Path(parallel.gather([str(new_run_folder(args, name)) if parallel.rank() == 0 else ""])[0])
        model = parallel.shard(model, device)
        optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.0, fused=True)
        if parallel.rank() == 0:
            where = f"from {source} " if found else ""
            print(f"{folder}: starting {args.engine} {where}and warming it up (its first call is slow)", flush=True)
        how = dict(context=args.context, seed=args.seed + parallel.rank(), kv_cache_gib=args.kv_cache_gib)
        actor_infer = start_actor(args.engine, str(source), model=model, tokenizer=tokenizer, **how)
    except (ValueError, OSError) as e:
        parallel.fail(e)
    actor_infer.generate([p.prompt for p in train_set[: args.prompts]], 1, min(args.max_tokens, 128))
    set_seed(args.seed + parallel.rank())  # after the engine, which seeds the global generators too
    generator = torch.Generator().manual_seed(args.seed)
    layers = layer_range(model.config.get_text_config().num_hidden_layers, args.layers)
    stability = Stability(layers, args.quantile, args.micro_tokens)
    step, position, heads, before, skips = 0, 0, None, None, 0
    if state:
        step, position, before, skips = (state[name] for name in ("step", "position", "before", "skips"))
        if state["heads"]:
            heads = Heads(state["heads"][0], *(x.to(device) for x in state["heads"][1:]))
        stability.restore(state["stability"])
        generator.set_state(state["generator"])
        checkpoint.restore(source, state, model, optimizer)
    log = Log(folder, step if args.resume else None)

    def held_out() -> Tensor:
        mine = parallel.share(test_set)
        mine = evaluate(actor_infer, mine, args.eval_samples, args.max_tokens) if mine else ([], torch.tensor([]))
        rollouts, rewards = zip(*parallel.gather(list(zip(mine[0], mine[1].tolist()))))
        mean, half = mean_interval(per_problem := torch.tensor(rewards).mean(1))
        record = {"step": step, "success": mean, "half_width_95": half}
        if recordable:
            record["stability"] = stability(model, rollouts)
        log(record)
        if parallel.rank() == 0:
            plot(folder, log.records)
        return per_problem

    def save() -> None:
        kept = {
            "position": position, "before": before, "skips": skips, "heads": heads and tuple(heads),
            "stability": stability.state(), "generator": generator.get_state(),
        }  # fmt: skip
        try:
            checkpoint.save(folder, step, model, tokenizer, optimizer, kept, args.keep)
        except OSError as e:
            parallel.fail(e)

    bar = tqdm(initial=step, total=args.steps, desc=args.credit, disable=parallel.rank() > 0)
    with stops_softly() as asked_to_stop:
        while True:
            if step in (0, args.steps) or (args.eval_every and step % args.eval_every == 0) or log.owed:
                log.owed = False
                after = held_out()
                if step == 0:
                    before = after
                    if parallel.rank() == 0:
                        bar.write(f"held-out success before: {100 * before.mean():.1f} %")
            if step >= args.steps:
                break
            step += 1
            if (step - 1) % args.heads_every == 0:
                heads = None  # measured anew
            count = args.prompts * (4 if args.dynamic else 1)
            problems = take(train_set, position, count, args.seed)
            optimizer.param_groups[0]["lr"] = args.lr * min(1, step / 5)
            record, heads = train_step(args, model, optimizer, actor_infer, problems, heads, generator)
            position += record["problems"]
            log({"step": step, **record})
            shown = {"reward": ".2f", "gap_mean": ".0e", "entropy": ".2f", "tokens_per_s": ".0f"}
            bar.set_postfix({name: format(record[name], how) for name, how in shown.items()})
            bar.update()
            if not record["gap_mean"] <= GAP_LIMIT[device.type]:  # not a number counts as too much
                if record["gap_mean"] > 0:
                    save()
                parallel.fail(
                    f"step {step}: the sampler's log-probabilities differ from the trainer's by "
                    f"{record['gap_mean']:.4f} on average, more than rounding can explain: its weights were not "
                    f"reloaded (or, if that is not a number, the update diverged: lower --lr). See {log.path}"
                )
            skips = skips + 1 if record["skipped"] else 0
            if skips == SKIP_LIMIT:
                parallel.fail(
                    f"step {step}: gradients were not finite in {skips} steps in a row; those updates were not made. "
                    f"Lower --lr, or go on from the last checkpoint. See {log.path}"
                )
            stopping = parallel.any_rank(bool(asked_to_stop))
            if stopping or step % args.save_every == 0 or step == args.steps:
                save()
            if stopping and step < args.steps:
                bar.close()
                if parallel.rank() == 0:
                    print(
                        f"stopped after step {step}, as asked; to go on: python train.py --resume {folder}", flush=True
                    )
                break
    bar.close()
    if step == args.steps and parallel.rank() == 0:
        phases = [r["seconds"] for r in log.records if "seconds" in r]
        share = {name: sum(p[name] for p in phases) for name in phases[0]}
        print("time: " + ", ".join(f"{name} {100 * s / sum(share.values()):.1f} %" for name, s in share.items()))
        gain, half = mean_interval(after - before)
        minutes, seconds = divmod(round(time.perf_counter() - started), 60)
        print(
            f"held-out success {100 * before.mean():.1f} % -> {100 * after.mean():.1f} %, {100 * gain:+.1f} points "
            f"(95 % interval {100 * (gain - half):+.1f} to {100 * (gain + half):+.1f}), "
            f"{minutes} min {seconds} s: {folder}"
        )
    actor_infer.close()
    parallel.stop()


if __name__ == "__main__":
    main(*HfArgumentParser(Args).parse_args_into_dataclasses())
