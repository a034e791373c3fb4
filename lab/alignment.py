"""Why does a credit learn faster, or not? How well the gradient of one minibatch points to where success rises.

    python -m lab.alignment                                    the embedded model before training
    python -m lab.alignment --model runs/NAME/checkpoint-40    after it

A learning curve is noisy: two runs that differ by nothing but rounding end some points apart. This measures the arms of
experiment.py at a fixed policy instead. Of many rollouts one half gives the gradient of expected success by its
definition, REINFORCE,

    grad J = mean over responses of (r - b) sum_t grad log pi(y_t),   b the mean reward of the group's other responses

without gamma, division by std or by length. On the other half each arm makes the gradient of a minibatch, as the first
update of a step does (Eq. 12-13 at ratio 1). To first order a step of given length raises success in proportion to the
cosine between the two, so that relative cosines are relative speeds; the noise in grad J lowers all alike.

    one minibatch     mean cosine of the minibatches' gradients: what a single step is worth
    all minibatches   cosine of their mean: what is left when momentum and many steps have averaged the noise
    AdamW             as the first, each weight's gradient divided by its root mean square over the minibatches
    gamma at choices  mean gamma, weighted by entropy, over mean gamma: above 1 where credit goes to tokens that the
                      model is unsure of. Where it is sure, gamma multiplies a gradient of nearly 0.

Differences to uniform in per cent of it, paired by minibatch, 95 % bootstrap over minibatches.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

import credit
import tasks
import train
from grpo import check_head, group_advantages, micro_batches, shape_advantages, token_logprobs
from lab import experiment
from node.output import markdown
from rollout import EMBEDDED, load_model, pad_batch, start_actor


@dataclass
class Args:
    """Compare the arms' gradients with that of expected success."""

    model: str = HfArg(default=EMBEDDED, help="Folder or hub name of a transformers checkpoint.")
    task: str = HfArg(default="countdown-tiny", help=f"One of: {', '.join(tasks.TASKS)}.")
    arms: list[str] = HfArg(
        default_factory=lambda: [*experiment.MAIN, *experiment.ABLATIONS], help="As experiment.py's; uniform is added."
    )
    problems: int = HfArg(default=512, help="Training problems; half of them for grad J.")
    gamma_amp: float = HfArg(default=1.5, help="Of all arms.")
    group: int = HfArg(default=8, help="G, responses to each problem.")
    minibatch: int = HfArg(default=8, help="Problems in a minibatch.")
    max_tokens: int = HfArg(default=128, help="Longest response.")
    engine: Literal["vllm", "torch"] = HfArg(default="vllm", help="The sampler; torch where vLLM is not installed.")
    seed: int = HfArg(default=0, help="Seed of problems and sampling.")
    out: str = HfArg(default="alignment.md", help="File for the table.")


def gradient(model, input_ids: Tensor, mask: Tensor, weights: Tensor, rows: Tensor, tokens: int = 2048) -> Tensor:
    """The gradient of sum of weights * log pi over the tokens of the rows, all weights of the model in a line."""
    for index, n in micro_batches(mask, rows[weights[rows].any(1)], tokens):
        logprobs, _ = token_logprobs(model, input_ids[index, :n], mask[index, :n])
        (logprobs * weights[index, :n]).sum().backward()
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])
    model.zero_grad()
    return flat


def speeds(gradients: Tensor, target: Tensor, draws: Tensor) -> np.ndarray:
    """The three cosines of the docstring's head under each weighting of the minibatches. [draws,3]

    gradients [M,weights], target [weights], draws [draws,M], each row summing to 1.
    """
    with_rms = gradients / gradients.square().mean(0).sqrt().clamp(min=1e-12)
    each, preconditioned = (
        torch.nn.functional.cosine_similarity(x, target[None], dim=1, eps=1e-20) for x in (gradients, with_rms)
    )
    size = torch.einsum("dm,mn,dn->d", draws, gradients @ gradients.T, draws).sqrt() * target.norm()
    return torch.stack([draws @ each, draws @ (gradients @ target) / size, draws @ preconditioned], 1).cpu().numpy()


def main(args: Args) -> None:
    if unknown := set(args.arms) - {*experiment.MAIN, *experiment.ABLATIONS}:
        sys.exit(f"error: --arms {', '.join(sorted(unknown))}: not of {'; '.join(experiment.ARMS)}")
    if args.group < 2 or args.minibatch < 1:
        sys.exit(f"error: --group {args.group} --minibatch {args.minibatch}: two responses and one problem at least")
    if not Path(args.out).absolute().parent.is_dir():
        sys.exit(f"error: --out {args.out}: no such folder")
    if args.problems % (2 * args.minibatch) or args.problems < 4 * args.minibatch:
        sys.exit(f"error: --problems {args.problems}: must be a multiple of {2 * args.minibatch}, twice that or more")
    try:
        model, tokenizer = load_model(args.model)
        check_head(model)
        problems = tasks.load(args.task, "train", args.problems, seed=args.seed)
        actor = start_actor(args.engine, args.model, 512, args.seed, model=model, tokenizer=tokenizer)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    rollouts = actor.generate([p.prompt for p in problems], args.group, args.max_tokens, progress=True)
    actor.close()
    rewards = torch.tensor([[tasks.reward(p, r.text) for r in group] for p, group in zip(problems, rollouts)])
    device = model.device
    input_ids, mask, _ = (x.to(device) for x in pad_batch([r for group in rollouts for r in group]))  # [B,N]
    rows, signals = torch.arange(len(mask), device=device), []  # without and with all heads
    for all_heads in (False, True):
        arm = replace(train.Args(), all_heads=all_heads)
        heads = train.measure_heads(arm, model, input_ids, mask, rows[: train.SPAN_ROWS])
        signals.append(train.score(arm, model, input_ids, mask, rows, heads))

    first, second = rows.chunk(2)
    baseline = (rewards.sum(1, keepdim=True) - rewards) / (args.group - 1)
    target = gradient(model, input_ids, mask, (rewards - baseline).flatten()[:, None].to(device) * mask, first)
    advantages, per_token = (
        group_advantages(rewards).flatten().to(device),
        mask / mask.sum(1, keepdim=True).clamp(min=1),
    )
    minibatches = second.split(args.minibatch * args.group)
    share = np.full(len(minibatches), 1 / len(minibatches))
    resampled = np.random.default_rng(0).multinomial(len(share), share, 2000) / len(share)
    draws = (
        torch.tensor(np.vstack([share, resampled])).float().to(device)
    )  # [1 + resamples, minibatches]: first as it is

    table, uniform = [["arm", "one minibatch", "all minibatches", "AdamW", "mean γ", "γ at choices"]], None
    for name in tqdm(["uniform", *(a for a in args.arms if a != "uniform")], desc="arms"):
        flags = [*experiment.ARMS[name], f"--gamma_amp={args.gamma_amp}"]
        (arm,) = HfArgumentParser(train.Args).parse_args_into_dataclasses(flags)
        gamma = credit.assign_credit(
            arm.credit, signals[arm.all_heads], mask, arm.q, arm.gamma_amp, arm.alpha, arm.k, arm.lowest,
            arm.on_produced, torch.Generator().manual_seed(args.seed),
        )  # fmt: skip
        weights = shape_advantages(advantages, gamma, arm.sign) * per_token
        speed = speeds(
            torch.stack([gradient(model, input_ids, mask, weights, part) for part in minibatches]), target, draws
        )
        if uniform is None:
            uniform, cells = speed, [f"{cosine:.3f}" for cosine in speed[0]]
        else:
            gain = 100 * (speed / uniform - 1)  # [draws,3]
            ends = np.quantile(gain[1:], [0.025, 0.975], axis=0).T
            cells = [f"{g:+.1f} ({low:+.1f} to {high:+.1f})" for g, (low, high) in zip(gain[0], ends)]
        entropy = signals[0].entropy[mask]
        mean, choices = gamma[mask].mean(), (gamma[mask] * entropy).sum() / entropy.sum()
        table.append([name, *cells, f"{mean:.2f}", f"{choices / mean:.2f}"])
    text = markdown(table)
    Path(args.out).write_text(text + "\n")
    print(
        f"{text}\n\nuniform: cosine with the gradient of success; others: % more than uniform. {len(minibatches)} "
        f"minibatches of {args.minibatch * args.group} responses, {100 * rewards.mean():.1f} % right: {args.out}"
    )


if __name__ == "__main__":
    main(*HfArgumentParser(Args).parse_args_into_dataclasses())
