"""GRPO with attention-guided credit, the whole loop (arXiv 2510.13554, Fig. 1 and Sec. 5).

    python train.py                                        the embedded model learns Countdown, on two CPU cores
    python train.py --credit uniform                       plain GRPO, to compare
    python train.py --model Qwen/Qwen3-0.6B --task countdown4 --max_tokens 1024 --context 1280 --lr 1e-6

Where this departs from the paper, and why:
1. The paper scores with a third model under eager attention, to have maps. Here WAAD and FAI come from the scoring pass
   that GRPO makes anyway for pi_old, without maps (metrics.py); the numbers are the same.
2. Groups of equal reward have zero advantage, hence zero gradient: they are left out of scoring and update.
3. The head split is measured on 32 responses at the first step and every --heads_every steps, not on all at each.
4. Where the paper is silent: the advantage's std is the sample's (n - 1); AdamW without weight decay, its learning rate
   reached over five steps; gradients clipped to norm 1; group size 8 and epsilon 0.2.
5. The trainer computes in float32. On a GPU vLLM samples in bfloat16, so the two differ by more than rounding to 1e-7.
6. The defaults are the embedded model's; the paper's, where given, are in README.md.
"""

import json
import random
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import HfArgumentParser, set_seed
from transformers.hf_argparser import HfArg

import credit
import tasks
from eval import evaluate, mean_interval
from grpo import check_head, group_advantages, micro_batches, shape_advantages, token_logprobs, update
from heads import Heads, layer_range, split_heads
from linkage import Stability
from metrics import Signals, measure_spans, observe
from rollout import encode, load_model, pack, start_actor

SPAN_ROWS = 32  # responses that a head split is measured on
RHYTHM = ("coupled", "local", "global")  # the credits that need WAAD and FAI

# The largest mean |logp_vllm - logp_torch| that rounding can explain; beyond it the sampler has other weights.
GAP_LIMIT = {"cpu": 1e-3, "cuda": 0.3}


@dataclass
class Args:
    """Train a language model with GRPO and attention-guided credit."""

    model: str = HfArg(default="assets/tiny", help="Folder or hub name of the transformers checkpoint to start from.")
    task: str = HfArg(default="countdown-tiny", help=f"One of: {', '.join(tasks.TASKS)}.")
    out: str | None = HfArg(default=None, help="Folder of the run; it must be new (default: a new one under runs/).")
    engine: Literal["vllm", "torch"] = HfArg(default="vllm", help="The sampler; torch where vLLM is not installed.")
    seed: int = HfArg(default=0, help="Seed of problems, sampling and minibatches.")

    credit: Literal["coupled", "local", "global", "entropy", "random", "uniform"] = HfArg(
        default="coupled", help="Which tokens get more of the advantage (Eq. 14-19); uniform is plain GRPO."
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

    steps: int = HfArg(default=40, help="Training steps (one batch of rollouts each).")
    prompts: int = HfArg(default=32, help="Problems in a batch.")
    group: int = HfArg(default=8, help="G, responses to each problem.")
    updates: int = HfArg(default=4, help="Gradient steps on each batch.")
    micro_tokens: int = HfArg(
        default=2048, help="Tokens in one forward pass; changes memory and speed, not the result."
    )
    lr: float = HfArg(default=2e-4, help="Learning rate of AdamW, reached over the first five steps.")
    epsilon: float = HfArg(default=0.2, help="Clipping of the probability ratio.")
    max_tokens: int = HfArg(default=128, help="Longest response; a longer one is cut and judged as it is.")
    context: int = HfArg(default=512, help="Longest prompt and response together.")
    kv_cache_gib: float = HfArg(default=0.5, help="vLLM's cache: more lets it generate more responses at once.")
    eval_problems: int | None = HfArg(default=None, help="Held-out problems (default: the task's own number).")
    eval_samples: int = HfArg(default=2, help="Sampled responses to each of them.")
    eval_every: int = HfArg(default=20, help="Steps between evaluations; 0: only before and after.")


def score(args: Args, model, input_ids: Tensor, mask: Tensor, rows: Tensor, heads: Heads | None) -> Signals:
    """The scoring pass over some rows: pi_old, entropy and, where credit needs a head split, WAAD and FAI; [R,N]."""
    out, seconds = torch.zeros(4, *mask.shape, device=mask.device), 0.0
    for index, n in micro_batches(mask, rows, args.micro_tokens):
        part = input_ids[index, :n], mask[index, :n]
        if heads:
            signals = observe(model, *part, heads, args.window, horizon(args))
            out[:, index, :n] = torch.stack(signals[:4])
            seconds += signals.seconds
        else:
            with torch.no_grad():
                out[:2, index, :n] = torch.stack(token_logprobs(model, *part, entropy=True))
    return Signals(*out, heads, seconds)


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
        case "coupled":
            how |= dict(alpha=args.alpha, k=args.k, lowest=args.lowest)
            gamma = credit.coupled_rhythm(signals.waad, signals.fai, mask, **how)
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


def train_step(
    args: Args, model, optimizer, actor_infer, problems: list[tasks.Problem], heads: Heads | None, generator
) -> tuple[dict, Heads | None]:
    """Sample, verify, score, credit, update, reload. Returns what to log and the head split (measured if None)."""
    clock = Clock()
    with clock("generate"):
        rollouts = actor_infer.generate([p.prompt for p in problems], args.group, args.max_tokens)  # [P][G]
        rewards = torch.tensor([[tasks.reward(p, r.text) for r in group] for p, group in zip(problems, rollouts)])
    advantages = group_advantages(rewards).flatten().to(model.device)  # [R], R = P * G
    flat = [r for group in rollouts for r in group]
    input_ids, mask, sampled = (x.to(model.device) for x in pack(flat))  # [R,N]
    order = torch.randperm(len(flat), generator=generator).to(model.device)
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
        learned = {} if idle else update(
            model, optimizer, input_ids, mask, old, shaped, minibatches, args.micro_tokens, args.epsilon
        )  # fmt: skip
    with clock("reload"):
        actor_infer.reload(model)

    scored = mask[rows]
    gap = (sampled - old)[rows][scored].abs()
    record = {
        "reward": rewards.mean().item(),
        **learned,
        "entropy": signals.entropy[rows][scored].mean().item(),
        "gap_mean": gap.mean().item(),
        "gap_max": gap.max().item(),
        "gamma": gamma[rows][scored].mean().item(),
        "length": mask.sum().item() / len(flat),
        "truncated": sum(r.truncated for r in flat),
        "empty": sum(not r.text for r in flat),
        "within_horizon": sum(len(r.ids) <= args.horizon[0] for r in flat),  # too short to have an anchor
        "equal_groups": int((rewards == rewards[:, :1]).all(1).sum()),
        "tokens_per_s": mask.sum().item() / sum(clock.seconds.values()),
        "seconds": clock.seconds,
    }
    return record, heads


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
    for name in ("steps", "prompts", "micro_tokens", "max_tokens", "window", "k", "heads_every", "eval_samples"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: must be 1 or more")
    for name in ("lr", "amp", "kv_cache_gib"):
        if getattr(args, name) <= 0:
            raise ValueError(f"--{name} {getattr(args, name)}: must be above 0")
    if args.eval_problems is not None and args.eval_problems < 2:
        raise ValueError(f"--eval_problems {args.eval_problems}: an interval needs 2 or more")


def new_run_folder(args, name: str) -> Path:
    """The run's folder, made, with args.json. args.out must be new; without it, the first free of runs/name-1, -2, …"""
    try:
        if args.out:
            folder = Path(args.out)
            if folder.is_dir() and any(folder.iterdir()):
                raise ValueError(f"--out {args.out} already holds a run: give another folder, or remove it")
        else:
            numbered = (Path(f"runs/{name}-{i}") for i in range(1, 10**6))
            folder = next(f for f in numbered if not f.exists())
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "args.json").write_text(json.dumps(asdict(args), indent=1))
    except OSError as e:
        raise ValueError(f"--out {args.out or 'runs/'}: cannot write there ({e.strerror})") from e
    return folder


def plot(folder: Path, log: list[dict]) -> None:
    """learning_curve.png: training reward of each step, held-out success with its interval, and the response length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = [r for r in log if "reward" in r]
    evals = [r for r in log if "success" in r]
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    left.plot([r["step"] for r in steps], [100 * r["reward"] for r in steps], lw=1, alpha=0.6, label="training batch")
    left.errorbar(
        [r["step"] for r in evals], [100 * r["success"] for r in evals], [100 * r["half_width_95"] for r in evals],
        fmt="o-", capsize=3, label="held out (95 %)",
    )  # fmt: skip
    left.set(xlabel="step", ylabel="success, %", title="Success of sampled responses")
    left.legend()
    right.plot([r["step"] for r in steps], [r["length"] for r in steps], color="tab:green")
    right.set(xlabel="step", ylabel="tokens", title="Length of responses")
    fig.tight_layout()
    fig.savefig(folder / "learning_curve.png", dpi=120)
    plt.close(fig)


def main(args: Args) -> None:
    started = time.perf_counter()
    try:
        check(args)
        train_set = tasks.load(args.task, "train", seed=args.seed)
        test_set = tasks.load(args.task, "test", args.eval_problems)
        if args.prompts > len(train_set):
            raise ValueError(f"--prompts {args.prompts}: {args.task} has {len(train_set)} training problems")
        model, tokenizer = load_model(args.model)
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", args.context)
        if args.context > longest:
            raise ValueError(f"--context {args.context}: {args.model} reads {longest} tokens at most")
        encode(tokenizer, [p.prompt for p in train_set + test_set], args.max_tokens, args.context)
        check_head(model)
        recordable = True
        try:  # a model without recordable attention says so now
            probe = torch.tensor([[0, 1, 2]], device=model.device)
            measure_heads(args, model, probe, probe > 0, rows=torch.tensor([0], device=model.device))
        except ValueError:
            recordable = False
            if args.credit in RHYTHM:
                raise
        folder = new_run_folder(args, f"{args.task}-{args.credit}")
        print(f"{folder}: starting {args.engine} and warming it up (its first call is slow)", flush=True)
        how = dict(context=args.context, seed=args.seed, kv_cache_gib=args.kv_cache_gib)
        actor_infer = start_actor(args.engine, args.model, model=model, tokenizer=tokenizer, **how)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    set_seed(args.seed)  # after the engine, which seeds the global generators too
    generator, rng = torch.Generator().manual_seed(args.seed), random.Random(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.0, fused=True)
    log, heads, pool = [], None, []
    layers = layer_range(model.config.get_text_config().num_hidden_layers, args.layers)
    stability = Stability(layers, args.quantile, args.micro_tokens)

    def write(record: dict) -> None:
        log.append(record)
        with open(folder / "metrics.jsonl", "a") as f:
            f.write(json.dumps(record) + "\n")

    def held_out(step: int) -> Tensor:
        rollouts, rewards = evaluate(actor_infer, test_set, args.eval_samples, args.max_tokens)
        mean, half = mean_interval(per_problem := rewards.mean(1))
        record = {"step": step, "success": mean, "half_width_95": half}
        if recordable:
            record["stability"] = stability(model, rollouts)
        write(record)
        plot(folder, log)
        return per_problem

    def save() -> None:
        model.save_pretrained(folder / "checkpoint")
        tokenizer.save_pretrained(folder / "checkpoint")

    actor_infer.generate([p.prompt for p in train_set[: args.prompts]], args.group, args.max_tokens)
    before = held_out(0)
    print(f"held-out success before: {100 * before.mean():.1f} %", flush=True)

    for step in (bar := tqdm(range(1, args.steps + 1), desc=args.credit)):
        if len(pool) < args.prompts:
            pool += rng.sample(train_set, len(train_set))
        problems, pool = pool[: args.prompts], pool[args.prompts :]
        if (step - 1) % args.heads_every == 0:
            heads = None  # measured anew
        optimizer.param_groups[0]["lr"] = args.lr * min(1, step / 5)
        record, heads = train_step(args, model, optimizer, actor_infer, problems, heads, generator)
        write({"step": step, **record})
        shown = {"reward": ".2f", "gap_mean": ".0e", "entropy": ".2f", "tokens_per_s": ".0f"}
        bar.set_postfix({name: format(record[name], how) for name, how in shown.items()})
        if not record["gap_mean"] <= GAP_LIMIT[model.device.type]:  # not a number counts as too much
            save()
            sys.exit(
                f"error: step {step}: the sampler's log-probabilities differ from the trainer's by "
                f"{record['gap_mean']:.4f} on average, more than rounding can explain: its weights were not reloaded "
                f"(or, if that is not a number, the update diverged: lower --lr). See {folder}/metrics.jsonl"
            )
        if args.eval_every and step % args.eval_every == 0 and step < args.steps:
            save()
            held_out(step)

    save()
    after = held_out(args.steps)
    phases = [r["seconds"] for r in log if "seconds" in r]
    share = {name: sum(p[name] for p in phases) for name in phases[0]}
    print("time: " + ", ".join(f"{name} {100 * s / sum(share.values()):.1f} %" for name, s in share.items()))
    gain, half = mean_interval(after - before)
    minutes, seconds = divmod(round(time.perf_counter() - started), 60)
    print(
        f"held-out success {100 * before.mean():.1f} % -> {100 * after.mean():.1f} %, {100 * gain:+.1f} points "
        f"(95 % interval {100 * (gain - half):+.1f} to {100 * (gain + half):+.1f}), {minutes} min {seconds} s: {folder}"
    )
    actor_infer.close()


if __name__ == "__main__":
    main(*HfArgumentParser(Args).parse_args_into_dataclasses())
