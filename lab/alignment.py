"""Why does a credit learn faster, or not? How well the gradient of one minibatch points to where success rises.

    python -m lab.alignment                                    the tiny model before training
    python -m lab.alignment --model runs/NAME/checkpoint-40    after it

A learning curve is noisy: two runs that differ by nothing but rounding end some points apart. This measures the arms of
lab.experiment at a fixed policy instead. Of many rollouts one half gives the gradient of expected success by its
definition, REINFORCE,

    grad J = mean over responses of (r - b) sum_t grad log pi(y_t),   b the mean reward of the group's other responses

without gamma, division by std or by length. On the other half each arm makes the gradient of a minibatch, as the first
update of a step does (Eq. 12-13 at ratio 1). To first order a step of given length raises success in proportion to the
cosine between the two, so that relative cosines are relative speeds; the noise in grad J lowers all alike.

    one minibatch     mean cosine of the minibatches' gradients: what a single step is worth
    all minibatches   cosine of their mean: what is left when momentum and many steps have averaged the noise
    AdamW             as the first, each weight's gradient divided by its root mean square over the minibatches
    with uniform's    cosine of the arm's whole gradient with uniform's: what is missing to 1 is all that it changes
    signal, noise     the shares that the credited tokens hold. With C their part of uniform's gradient g, signal is
                      <C, grad J> / <g, grad J>, and noise cov(C, g) / var(g) over the minibatches. A little
                      more gamma raises the signal by the one share and the noise by the other, so where noise
                      dominates, a credit points better if its tokens hold more of the signal than of the noise.
    gamma at choices  mean gamma, weighted by entropy, over mean gamma: above 1 where credit goes to tokens that the
                      model is unsure of. Where it is sure, gamma multiplies a gradient of nearly 0.

Differences to uniform in per cent of it, paired by minibatch, 95 % bootstrap over minibatches; grad J is taken as it
came out, so what its own noise does to an arm is in no interval.

How much can gamma gain? If the credited share q of the tokens holds all of the signal and q of the noise, gamma
multiplies the signal by gamma and the noise's variance by q gamma^2 + 1 - q. While noise dominates, the cosine grows by
gamma / sqrt(q gamma^2 + 1 - q): 22 % with 1.5 and 40 %. It can be more where their share of the noise is below q.

    python -m lab.truth --out runs/truth                       what each token was worth, half an hour
    python -m lab.alignment --truth runs/truth --minibatch 2   three arms more, which know it

Two arms of lab/wording.py credit, in Countdown in words, what decides: "content" puts gamma on numbers, operators and
whether to go on, "wording" on the words around them.

With --truth the minibatches are those responses, and all problems sampled here serve grad J. "oracle" puts gamma on the
tokens of truly largest |dV|: what a perfect signal could do with coupled's gamma and q, or with a q below the share of
choices. "VinePPO" has dV itself for its advantage: what there is to be had from knowing where credit belongs. A second
table says which tokens hold the signal and the noise, by what the token is: those of most entropy, then all others.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import HfArgumentParser, set_seed
from transformers.hf_argparser import HfArg

import credit
import tasks
import train
from grpo import check_logits, group_advantages, micro_batches, shape_advantages, token_logprobs
from lab import experiment, truth, wording
from lab.report import visible
from lab.truth_tables import signals_of, without_first
from metrics import Signals
from node import precision
from node.output import markdown
from node.settings import TINY, fill_defaults, load_model, parse_args
from rollout import pad_batch, start_actor

ORACLES = {"oracle": 0.4, "oracle, q 0.1": 0.1}  # and the share of tokens that each credits
FIRST_OUT = {f"{arm}, first token out": arm for arm in ("local", "global", "coupled")}  # arms without lab/sinks.py's
SLICE = 2**22  # weights that are looked at together
LARGE = 10**7  # weights of a model whose gradients are kept in bfloat16: 20 of 135 million take 5 GiB
DEFAULTS = {  # of arguments that are not given: for the tiny model and what is trained from it; for any other model
    "task": ("countdown-tiny", "countdown-words"),
    "max_tokens": (128, 256),
    "kv_cache_gib": (0.5, 8.0),
}
SHOWN = 10  # tokens shown by themselves


@dataclass
class Args:
    """Compare the arms' gradients with that of expected success."""

    model: str = HfArg(default=TINY, help="Folder or hub name of a transformers checkpoint.")
    task: str | None = HfArg(
        default=None,
        help=f"One of: {', '.join(tasks.TASKS)} (default: countdown-tiny for the tiny model, countdown-words).",
    )
    arms: list[str] = HfArg(
        default_factory=lambda: [*experiment.MAIN, *experiment.ABLATIONS],
        help=f"As of lab.experiment, or of: {'; '.join([*FIRST_OUT, *wording.KINDS])}; uniform is added.",
    )
    truth: str | None = HfArg(default=None, help="Folder of lab.truth: the arms' responses, and three arms more.")
    problems: int = HfArg(default=512, help="Training problems; half of them for grad J, all of them with --truth.")
    gamma_amp: float = HfArg(default=1.5, help="Of all arms.")
    group: int = HfArg(default=8, help="G, responses to each problem.")
    minibatch: int = HfArg(default=8, help="Problems in a minibatch.")
    max_tokens: int | None = HfArg(default=None, help="Longest response (default: 128 for the tiny model, 256).")
    kv_cache_gib: float | None = HfArg(default=None, help="vLLM's cache (default: 0.5 for the tiny model, 8).")
    engine: Literal["vllm", "torch"] = HfArg(default="vllm", help="The sampler; torch where vLLM is not installed.")
    seed: int = HfArg(default=0, help="Seed of problems and sampling.")
    out: str = HfArg(default="alignment.md", help="File for the table.")


def gradient(model, input_ids: Tensor, mask: Tensor, weights: Tensor, rows: Tensor, tokens: int = 1024) -> Tensor:
    """The gradient of sum of weights * log pi over the tokens of the rows, all weights of the model in a line."""
    for index, n in micro_batches(mask, rows[weights[rows].any(1)], tokens):
        with precision.autocast_for(model):
            logprobs, _ = token_logprobs(model, input_ids[index, :n], mask[index, :n])
            (logprobs * weights[index, :n]).sum().backward()
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])
    model.zero_grad()
    return flat


def inner(a: Tensor, b: Tensor) -> Tensor:
    """The inner products of rows of a and of b, [rows of a, rows of b] float32, a slice of the weights at a time."""
    return sum(x.float() @ y.float().T for x, y in zip(a.split(SLICE, 1), b.split(SLICE, 1)))


def speeds(gradients: Tensor, target: Tensor, draws: Tensor) -> np.ndarray:
    """The three cosines of the docstring's head under each weighting of the minibatches. [draws,3]

    gradients [M,weights], target [weights], draws [draws,M], each row summing to 1.
    """
    gram, along, length = inner(gradients, gradients), inner(gradients, target[None])[:, 0], target.norm()
    each = along / (gram.diagonal().sqrt() * length).clamp(min=1e-20)
    squares, dots = torch.zeros(2, len(gradients), device=target.device)
    for x, t in zip(gradients.split(SLICE, 1), target.split(SLICE)):
        x = x.float() / x.float().square().mean(0).sqrt().clamp(min=1e-12)
        squares, dots = squares + x.square().sum(1), dots + x @ t
    preconditioned = dots / (squares.sqrt() * length).clamp(min=1e-20)
    size = torch.einsum("dm,mn,dn->d", draws, gram, draws).sqrt() * length
    return torch.stack([draws @ each, draws @ along / size, draws @ preconditioned], 1).cpu().numpy()


def shares(credited: Tensor, uniform: Tensor, target: Tensor, draws: Tensor) -> np.ndarray:
    """The shares of signal and of noise that the credited tokens hold, under each weighting: [draws,2].

    credited and uniform [M,weights]: the minibatches' gradients from the credited tokens and from all of them.
    """
    signal = (draws @ inner(credited, target[None])) / (draws @ inner(uniform, target[None]))

    def covariance(gram: Tensor) -> Tensor:
        return draws @ gram.diagonal() - torch.einsum("dm,mn,dn->d", draws, gram, draws)

    noise = covariance(inner(credited, uniform)) / covariance(inner(uniform, uniform))
    return torch.stack([signal[:, 0], noise], 1).cpu().numpy()


def gamma_of(
    name: str, args: Args, signals: dict[str, Signals], mask: Tensor, known: dict[str, Tensor]
) -> tuple[Tensor, str]:
    """An arm's gamma [B,N] and the advantages it applies to; `known` are the arms whose tokens [B,N] are."""
    if name in known:
        return 1 + (args.gamma_amp - 1) * known[name], "both"
    flags = [*experiment.ARMS[FIRST_OUT.get(name, name)], f"--gamma_amp={args.gamma_amp}"]
    (arm,) = HfArgumentParser(train.Args).parse_args_into_dataclasses(flags)
    seen = signals["first token out" if name in FIRST_OUT else "all heads" if arm.all_heads else ""]
    gamma = credit.assign_credit(
        arm.credit, seen, mask, q=arm.q, amp=arm.gamma_amp, alpha=arm.alpha, k=arm.k, lowest=arm.lowest,
        produced=arm.on_produced, generator=torch.Generator().manual_seed(args.seed),
    )  # fmt: skip
    return gamma, arm.sign


def checked(args: Args) -> truth.Measured | None:
    """The measurement of --truth, if any; ValueError for arguments that cannot be."""
    arms = [*experiment.MAIN, *experiment.ABLATIONS, *experiment.TRIED, *FIRST_OUT, *wording.KINDS]
    if unknown := set(args.arms) - {*arms}:
        raise ValueError(f"--arms {', '.join(sorted(unknown))}: not of {'; '.join(arms)}")
    if set(args.arms) & {*wording.KINDS} and args.task != "countdown-words":
        raise ValueError(f"--arms {' '.join(wording.KINDS)}: are of --task countdown-words, not {args.task}")
    if args.group < 2 or args.minibatch < 1:
        raise ValueError(f"--group {args.group} --minibatch {args.minibatch}: two responses and one problem at least")
    if not Path(args.out).absolute().parent.is_dir():
        raise ValueError(f"--out {args.out}: no such folder")
    if not args.truth:
        if args.problems % (2 * args.minibatch) or args.problems < 4 * args.minibatch:
            raise ValueError(
                f"--problems {args.problems}: must be a multiple of {2 * args.minibatch}, twice that or more"
            )
        return None
    found = truth.read(args.truth)
    count = found.args.responses // args.group
    if found.values is None:
        raise ValueError(f"--truth {args.truth}: has not come to its end: python -m lab.truth --resume {args.truth}")
    for name in ("model", "task", "group", "max_tokens"):
        if getattr(found.args, name) != getattr(args, name):
            raise ValueError(f"--{name} {getattr(args, name)}: --truth {args.truth} has {getattr(found.args, name)}")
    if count % args.minibatch or count < 2 * args.minibatch:
        raise ValueError(f"--minibatch {args.minibatch}: does not divide the {count} problems of --truth, or only once")
    return found


def main(args: Args) -> None:
    try:
        args, note = fill_defaults(args, DEFAULTS, args.model)
        print(note)
        found = checked(args)
        model, tokenizer = load_model(args.model)
        check_logits(model)
        problems = tasks.load(args.task, "train", args.problems, seed=args.seed + bool(found))  # others than --truth's
        set_seed(args.seed)  # torch's sampler draws from the global generator; vLLM sets its own
        actor = start_actor(args.engine, args.model, 512, args.seed, args.kv_cache_gib, model, tokenizer)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    rollouts = actor.generate([p.prompt for p in problems], args.group, args.max_tokens, progress=True)
    actor.close()
    rewards = torch.tensor(
        [[tasks.get(args.task).reward(p, r.text) for r in group] for p, group in zip(problems, rollouts)]
    )
    rollouts, device = [r for group in rollouts for r in group], model.device
    first = len(rollouts) if found else len(rollouts) // 2  # responses for grad J; the rest is the arms'
    baseline = (rewards.sum(1, keepdim=True) - rewards) / (args.group - 1)
    centred = (rewards - baseline).flatten()[:first, None].to(device)
    input_ids, mask, _ = (x.to(device) for x in pad_batch(rollouts[:first]))
    target = gradient(model, input_ids, mask, centred * mask, torch.arange(first, device=device))

    if found:
        rollouts, rewards = found.rollouts, found.rewards.view(-1, args.group)
    else:
        rollouts, rewards = rollouts[first:], rewards[first // args.group :]
    input_ids, mask, _ = (x.to(device) for x in pad_batch(rollouts))  # [B,N]
    signals = {name: signals_of(model, input_ids, mask, all_heads=bool(name)) for name in ("", "all heads")}
    if set(args.arms) & FIRST_OUT.keys():
        signals["first token out"] = without_first(signals[""], model, input_ids, mask)
    known = {}
    if set(args.arms) & {*wording.KINDS}:
        known |= dict(zip(wording.KINDS, wording.marked(tokenizer, input_ids, mask)))
    if found:
        decisive = found.values.delta[0].abs().to(device)
        known |= {name: credit.top_q(decisive, mask, q) for name, q in ORACLES.items()}
    advantages = group_advantages(rewards).flatten().to(device)
    per_token = mask / mask.sum(1, keepdim=True).clamp(min=1)
    minibatches = torch.arange(len(mask), device=device).split(args.minibatch * args.group)
    share = np.full(len(minibatches), 1 / len(minibatches))
    resampled = np.random.default_rng(0).multinomial(len(share), share, 2000) / len(share)
    draws = torch.tensor(np.vstack([share, resampled])).float().to(device)  # [1 + resamples, M]: first as it is

    def gradients(weights: Tensor) -> Tensor:
        kept = torch.bfloat16 if len(target) > LARGE else torch.float32
        found = torch.empty(len(minibatches), len(target), dtype=kept, device=device)
        for row, part in zip(found, minibatches):
            row.copy_(gradient(model, input_ids, mask, weights * per_token, part))
        return found

    def cell(values: np.ndarray, form: str) -> str:
        value, low, high = (format(x, form) for x in (values[0], *np.quantile(values[1:], [0.025, 0.975])))
        return f"{value} ({low} to {high})"

    columns = [
        "one minibatch",
        "all minibatches",
        "AdamW",
        "with uniform's",
        "signal",
        "noise",
        "mean γ",
        "γ at choices",
    ]
    table = [["arm", *columns]]
    uniform = gradients(shape_advantages(advantages, torch.ones_like(per_token)))
    base, own = speeds(uniform, target, draws), inner(uniform, uniform).sum()
    table.append(["uniform", *(f"{cosine:.3f}" for cosine in base[0]), "1.000", "", "", "1.00", "1.00"])
    arms = [*([*ORACLES, "VinePPO"] if found else []), *(a for a in args.arms if a != "uniform")]
    for name in tqdm(arms, desc="arms"):
        if name == "VinePPO":
            gamma, weights = None, found.values.delta[0].to(device)
        else:
            gamma, sign = gamma_of(name, args, signals, mask, known)
            weights = shape_advantages(advantages, gamma, sign)
        arm = gradients(weights)
        gain = 100 * (speeds(arm, target, draws) / base - 1)  # [draws,3]
        cells = [cell(x, "+.1f") for x in gain.T]
        cells.append(f"{inner(arm, uniform).sum() / (own * inner(arm, arm).sum()).sqrt():.3f}")
        if gamma is None:
            cells += [""] * 4
        else:
            held = (shares(arm, uniform, target, draws) - 1) / (args.gamma_amp - 1)  # of C = (arm - g) / (gamma - 1)
            cells += [cell(100 * x, ".0f") for x in held.T]
            entropy = signals[""].entropy[mask]
            mean, choices = gamma[mask].mean(), (gamma[mask] * entropy).sum() / entropy.sum()
            cells += [f"{mean:.2f}", f"{choices / mean:.2f}"]
        table.append([name, *cells])
        Path(args.out).write_text(markdown(table) + "\n")  # arm by arm: on a large model each takes minutes
        del arm
    text = markdown(table)
    if found:
        square, entropy = found.values.square[0].to(device), signals[""].entropy
        kinds = torch.zeros(len(tokenizer), device=device).index_add(0, input_ids[mask], entropy[mask]).topk(SHOWN)
        rest = ~torch.isin(input_ids, kinds.indices) & mask
        rows = [["token", "of all tokens, %", "of entropy", "of ΔV²", "signal", "noise"]]
        for token in (*kinds.indices.tolist(), None):
            at = rest if token is None else (input_ids == token) & mask
            held = shares(gradients(shape_advantages(advantages, at.float())), uniform, target, draws)
            parts = [100 * (x * at).sum() / (x * mask).sum() for x in (mask, entropy, square)]
            name = "all others" if token is None else f"`{visible(tokenizer.decode([token]))}`"
            rows.append([name, *(f"{part:.0f}" for part in parts), *(cell(100 * x, ".0f") for x in held.T)])
        text += "\n\n" + markdown(rows)
    Path(args.out).write_text(text + "\n")
    print(
        f"{text}\n\nuniform: cosine with the gradient of success; others: % more than uniform. {len(minibatches)} "
        f"minibatches of {args.minibatch * args.group} responses, {100 * rewards.mean():.1f} % right: {args.out}"
    )


if __name__ == "__main__":
    main(parse_args(Args))
