"""Directions: how well does the gradient of one minibatch point to where success rises, under each arm?

    python -m lab.alignment                                     the tiny model before training
    python -m lab.alignment --model runs/NAME/checkpoint-40     after it

A learning curve is noisy: two runs that differ by nothing but rounding end some points apart. This measures the arms of
lab/arms.py at a fixed policy instead. Many rollouts give the gradient of expected success by its definition,
REINFORCE,

    grad J = mean over responses of (r - b) sum_t grad log pi(y_t),   b the mean reward of the group's other responses

without gamma, division by std or by length. On other rollouts each arm makes the gradient of a minibatch, as the first
update of a step does (Eq. 12-13 at ratio 1). To first order a step of given length raises success in proportion to the
cosine between the two, so relative cosines are relative speeds. All are given in per cent more than uniform's:

    one minibatch     mean cosine of the minibatches' gradients: what a single step is worth
    all minibatches   cosine of their expectation: what is left when many steps have averaged the noise. The square of
                      its norm is estimated without bias (stats.mean_of_pairs).
    AdamW             what AdamW's own update is worth, <update, grad J>: gradients clipped at norm 1, momentum and
                      second moments from the minibatches before it, of which the first ten only warm the state
    signal, noise     the shares that the credited tokens hold. With C their part of uniform's gradient g, signal is
                      <E C, grad J> / <E g, grad J>, and noise cov(C, g) / var(g) over the minibatches. A little
                      more gamma raises the signal by the one share and the noise by the other, so where noise
                      dominates, a credit points better if its tokens hold more of the signal than of the noise.

Intervals: a jackknife over the minibatches and over the parts that grad J is made of, so that the noise of both is in
them. The record holds the inner products that all this is computed from, and no gradient.

    python -m lab.truth --out runs/truth                       what each token was worth, half an hour
    python -m lab.alignment --truth runs/truth                 three arms more, which know it

With --truth the minibatches are those responses. "oracle" puts gamma on the tokens of truly largest |dV|: what a
perfect signal could do with coupled's gamma and q, or with a q below the share of choices. "VinePPO" has dV itself for
its advantage. "tokens" in the record says which tokens hold the signal and the noise, by what the token is: those of
most entropy, then all others.
"""

import json
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import set_seed
from transformers.hf_argparser import HfArg

import credit
import tasks
from grpo import check_logits, group_advantages, micro_batches, shape_advantages, token_logprobs
from lab import arms, truth
from lab.signals import signals_of, split_of
from lab.stats import Estimate, jackknife, mean_of_pairs, means_without
from metrics import Signals
from node import precision
from node.output import markdown, visible, write_whole
from node.settings import TINY, fill_defaults, load_model, parse_args
from rollout import pad_batch, start_actor

ORACLES = {"oracle": 0.4, "oracle, q 0.1": 0.1}  # and the share of tokens that each credits
SLICE = 2**22  # weights that are looked at together
LARGE = 10**7  # weights of a model whose gradients are kept in bfloat16: 20 of 135 million take 5 GiB
STEP = 64  # responses of a step of training, among which the head split is measured
WARM = 10  # updates that only warm AdamW's state; as many make a block of the jackknife, for momentum links them
SHOWN = 10  # tokens shown by themselves
COLUMNS = ("one minibatch", "all minibatches", "AdamW", "signal", "noise")


@dataclass
class Args:
    """Compare the arms' gradients with that of expected success."""

    model: str = HfArg(default=TINY, help="Folder or hub name of a transformers checkpoint.")
    task: str | None = HfArg(default=None, help=f"One of: {', '.join(tasks.TASKS)} (default: by the model).")
    arms: list[str] = HfArg(default_factory=lambda: [*arms.OF_TOKENS], help=f"Some of: {'; '.join(arms.ARMS)}.")
    truth: str | None = HfArg(default=None, help="Folder of lab.truth: the arms' responses, and three arms more.")
    problems: int = HfArg(default=256, help="Training problems for grad J.")
    parts: int = HfArg(default=32, help="Parts that grad J is made of, for its interval.")
    gamma_amp: float = HfArg(default=1.5, help="Of arms that do not name their own.")
    group: int = HfArg(default=8, help="G, responses to each problem.")
    minibatch: int = HfArg(default=2, help="Problems in a minibatch.")
    minibatches: int = HfArg(default=64, help="Minibatches of each arm; with --truth, as many as it has.")
    max_tokens: int | None = HfArg(default=None, help="Longest response (default: 128 for the tiny model, 256).")
    kv_cache_gib: float | None = HfArg(default=None, help="vLLM's cache (default: 0.5 for the tiny model, 8).")
    engine: Literal["vllm", "torch"] = HfArg(default="vllm", help="The sampler; torch where vLLM is not installed.")
    seed: int = HfArg(default=0, help="Seed of problems and sampling.")
    out: str = HfArg(default="directions.json", help="File for the record.")


# ---- Gradients and their inner products ----


def gradient(model, input_ids: Tensor, mask: Tensor, weights: Tensor, rows: Tensor, tokens: int = 1024) -> Tensor:
    """The gradient of sum of weights * log pi over the tokens of the rows, all weights of the model in a line."""
    for index, n in micro_batches(mask, rows[weights[rows].any(1)], tokens):
        with precision.autocast_for(model):
            logprobs, _ = token_logprobs(model, input_ids[index, :n], mask[index, :n])
            (logprobs * weights[index, :n]).sum().backward()
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])
    model.zero_grad()
    return flat


def gradients(model, input_ids: Tensor, mask: Tensor, weights: Tensor, pieces: tuple[Tensor, ...]) -> Tensor:
    """The gradient of each piece (row numbers). [pieces, weights]"""
    size = sum(p.numel() for p in model.parameters())
    kept = torch.empty(len(pieces), size, dtype=torch.bfloat16 if size > LARGE else torch.float32, device=mask.device)
    for row, piece in zip(kept, pieces):
        row.copy_(gradient(model, input_ids, mask, weights, piece))
    return kept


def inner(a: Tensor, b: Tensor) -> np.ndarray:
    """The inner products of rows of a and of b, [rows of a, rows of b], a slice of the weights at a time."""
    return sum(x.float() @ y.float().T for x, y in zip(a.split(SLICE, 1), b.split(SLICE, 1))).double().cpu().numpy()


def adamw_updates(gradients: Tensor, rows: int):
    """AdamW's updates of unit learning rate for these minibatches (of so many rows) in turn, clipped as in training.

    Yields the updates after the first WARM, [weights] each; the tensor is written anew each time.
    """
    flat = torch.nn.Parameter(torch.zeros_like(gradients[0], dtype=torch.float32))
    optimizer = torch.optim.AdamW([flat], lr=1.0, weight_decay=0.0)
    for i, g in enumerate(gradients):
        flat.data.zero_()
        flat.grad = -g.float() / rows  # a loss falls; it is a mean over rows
        torch.nn.utils.clip_grad_norm_([flat], 1.0)
        optimizer.step()
        if i >= WARM:
            yield flat.detach()


def products(gram: np.ndarray) -> dict[str, list[float]]:
    """What is kept of a matrix of inner products [M,M]: its diagonal, and row i plus column i."""
    return {"diagonal": rounded(gram.diagonal()), "sums": rounded(gram.sum(0) + gram.sum(1))}


def rounded(x) -> list:
    """Six digits."""
    return [rounded(row) for row in x] if np.ndim(x) > 1 else [float(f"{v:.6g}") for v in x]


def measure(arm: Tensor, uniform: Tensor, target: Tensor, rows: int, amp: float | None) -> dict:
    """The record of an arm: inner products of its minibatches' gradients [M,weights] with the parts of grad J."""
    updates = [inner(u[None], target)[0] for u in adamw_updates(arm, rows)]
    return {
        "gamma_amp": amp,
        "along": rounded(inner(arm, target)),  # [M,P]
        **products(inner(arm, arm)),
        "with uniform": products(inner(arm, uniform)),
        "adamw": rounded(np.array(updates).reshape(-1, len(target))),  # [M - WARM, P]
    }


# ---- Statistics of a record ----


def norms(products: dict) -> np.ndarray:
    """The norm of the expected gradient, without each piece and of all; nan where its square is not above 0. [M+1]"""
    squares = mean_of_pairs(np.array(products["diagonal"]), np.array(products["sums"]))
    return np.sqrt(np.where(squares > 0, squares, np.nan))


def cosines(arm: dict) -> tuple[np.ndarray, np.ndarray]:
    """The two cosines with grad J times its norm, with pieces left out: [M+1,P+1] each."""
    along = np.array(arm["along"])
    lengths = np.maximum(np.sqrt(arm["diagonal"]), 1e-30)  # a minibatch of equal rewards has gradient 0, cosine 0
    each = means_without(along / lengths[:, None])
    return each, means_without(along) / norms(arm)[:, None]


def covariance(products: dict) -> np.ndarray:
    """The covariance over minibatches, without each and of all. [M+1]"""
    diagonal = np.array(products["diagonal"])
    return means_without(diagonal[:, None])[:, -1] - mean_of_pairs(diagonal, np.array(products["sums"]))


def shares(part: dict, uniform: dict, scale: float = 1.0) -> tuple[Estimate, Estimate]:
    """Shares of signal and noise, in per cent, of uniform's gradient that a part of it holds.

    part is the record of that part's gradient; or of an arm = uniform + scale * part, and scale is given.
    """
    less = 0.0 if scale == 1.0 else 1.0
    signal = means_without(np.array(part["along"])) / means_without(np.array(uniform["along"])) - less
    noise = covariance(part["with uniform"]) / covariance(uniform) - less
    return jackknife(100 * signal / scale), jackknife(100 * noise / scale)


def adamw_worth(arm: dict) -> np.ndarray:
    """What AdamW's updates are worth, with blocks of WARM updates left out. [blocks+1,P+1]"""
    updates = np.array(arm["adamw"])
    blocks = len(updates) // WARM
    return means_without(updates[: blocks * WARM].reshape(blocks, WARM, -1).sum(1))


def compare(arm: dict, uniform: dict) -> dict[str, Estimate | None]:
    """Per cent more than uniform, by column; signal and noise are shares. None where there are too few minibatches."""
    found: dict[str, Estimate | None] = dict.fromkeys(COLUMNS)
    for name, of_arm, of_uniform in zip(COLUMNS[:2], cosines(arm), cosines(uniform)):
        found[name] = jackknife(100 * (of_arm / of_uniform - 1))
    if len(arm["adamw"]) >= 3 * WARM:
        found["AdamW"] = jackknife(100 * (adamw_worth(arm) / adamw_worth(uniform) - 1))
    if arm["gamma_amp"]:
        found["signal"], found["noise"] = shares(arm, uniform, arm["gamma_amp"] - 1)
    return found


def at_gamma(arm: dict, uniform: dict, amp: float) -> dict:
    """The record of an arm at another gamma_amp, but for AdamW.

    Its gradient is uniform's + (gamma_amp - 1) * C, so all inner products follow from those at one gamma_amp.
    """
    b = (amp - 1) / (arm["gamma_amp"] - 1)
    a = 1 - b  # the new gradient is a * uniform's + b * the arm's
    new = {"gamma_amp": amp, "along": a * np.array(uniform["along"]) + b * np.array(arm["along"]), "adamw": []}
    new["with uniform"] = {}
    for key in ("diagonal", "sums"):
        of_uniform, of_arm, mixed = (np.array(x[key]) for x in (uniform, arm, arm["with uniform"]))
        new[key] = a**2 * of_uniform + b**2 * of_arm + 2 * a * b * mixed
        new["with uniform"][key] = a * of_uniform + b * mixed
    return new


def table(record: dict) -> list[list[str]]:
    """A line an arm; for uniform its two cosines with grad J."""
    uniform = record["arms"]["uniform"]
    length = norms(record["target"])[None]
    cells = [jackknife(c / length).text(".3f") for c in cosines(uniform)]
    rows = [["arm", *COLUMNS], ["uniform: cosine", *cells, "", "", ""]]
    for name, arm in record["arms"].items():
        if name == "uniform":
            continue
        found = compare(arm, uniform)
        forms = ("+.1f", "+.1f", "+.1f", ".0f", ".0f")
        rows.append([name, *("" if e is None else e.text(form) for e, form in zip(found.values(), forms))])
    return rows


def token_table(record: dict) -> list[list[str]]:
    """Which tokens hold the signal and the noise."""
    rows = [["token", "of all tokens, %", "of entropy", "of ΔV²", "signal", "noise"]]
    for name, part in record["tokens"].items():
        held = shares(part, record["arms"]["uniform"])
        rows.append([name, *(f"{x:.0f}" for x in part["shares"]), *(e.text(".0f") for e in held)])
    return rows


# ---- The measurement ----


def checked(args: Args) -> truth.Measured | None:
    """The measurement of --truth, if any; ValueError for arguments that cannot be."""
    if unknown := set(args.arms) - arms.ARMS.keys():
        raise ValueError(f"--arms {', '.join(sorted(unknown))}: not of {'; '.join(arms.ARMS)}")
    if set(args.arms) & arms.BY_TEXT.keys() and args.task != "countdown-words":
        raise ValueError(f"--arms {' '.join(arms.BY_TEXT)}: are of --task countdown-words, not {args.task}")
    if args.group < 2 or args.minibatch < 1 or args.minibatches < 3 or args.parts < 3:
        given = " ".join(f"--{name} {getattr(args, name)}" for name in ("group", "minibatch", "minibatches", "parts"))
        raise ValueError(f"{given}: two responses, one problem, three minibatches and three parts at least")
    if not Path(args.out).absolute().parent.is_dir():
        raise ValueError(f"--out {args.out}: no such folder")
    if args.problems < args.parts or args.problems % args.parts:
        raise ValueError(f"--problems {args.problems}: must be a multiple of {args.parts}, --parts")
    if not args.truth:
        return None
    measured = truth.read(args.truth)
    count = measured.args.responses // args.group
    if measured.values is None:
        raise ValueError(f"--truth {args.truth}: has not come to its end: python -m lab.truth --resume {args.truth}")
    for name in ("model", "task", "group", "max_tokens"):
        if getattr(measured.args, name) != getattr(args, name):
            raise ValueError(f"--{name} {getattr(args, name)}: --truth {args.truth} has {getattr(measured.args, name)}")
    if count % args.minibatch or count < 3 * args.minibatch:
        raise ValueError(
            f"--minibatch {args.minibatch}: must divide the {count} problems of --truth, in 3 parts or more"
        )
    return measured


def main(args: Args) -> None:
    try:
        args, note = fill_defaults(args, truth.DEFAULTS, args.model)
        print(note)
        measured = checked(args)
        model, tokenizer = load_model(args.model)
        check_logits(model)
        count = args.problems + (0 if measured else args.minibatches * args.minibatch)
        problems = tasks.load(args.task, "train", count, seed=args.seed + bool(measured))  # others than --truth's
        set_seed(args.seed)  # torch's sampler draws from the global generator; vLLM sets its own
        actor = start_actor(args.engine, args.model, 512, args.seed, args.kv_cache_gib, model, tokenizer)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    # 1. Sample. The first responses are for grad J, the rest are the arms'.
    groups = actor.generate([p.prompt for p in problems], args.group, args.max_tokens, progress=True)
    actor.close()
    reward = tasks.get(args.task).reward
    rewards = torch.tensor([[reward(p, r.text) for r in group] for p, group in zip(problems, groups)])
    rollouts, device = [r for group in groups for r in group], model.device
    first = args.problems * args.group

    # 2. grad J in parts.
    baseline = (rewards.sum(1, keepdim=True) - rewards) / (args.group - 1)
    centred = (rewards - baseline).flatten()[:first, None].to(device)
    input_ids, mask, _ = (x.to(device) for x in pad_batch(rollouts[:first]))
    target = gradients(model, input_ids, mask, centred * mask, torch.arange(first, device=device).chunk(args.parts))

    # 3. The arms' responses: signals, advantages, minibatches.
    if measured:
        rollouts, rewards = measured.rollouts, measured.rewards.view(-1, args.group)
    else:
        rollouts, rewards = rollouts[first:], rewards[args.problems :]
    input_ids, mask, _ = (x.to(device) for x in pad_batch(rollouts))  # [B,N]
    advantages = group_advantages(rewards).flatten().to(device)
    per_token = mask / mask.sum(1, keepdim=True).clamp(min=1)
    rows = args.minibatch * args.group
    minibatches = torch.arange(len(mask), device=device).split(rows)

    @cache
    def seen(all_heads: bool) -> Signals:
        # Each minibatch has a head split of its own, measured in its step of STEP responses. In training every run and
        # every tenth step has another, and which heads are in it moves the directions.
        parts = []
        for i, own in enumerate(minibatches):
            step = torch.arange(i * rows // STEP * STEP, len(mask), device=device)[:STEP]
            heads = split_of(model, input_ids[step], mask[step], seed=i, all_heads=all_heads)
            parts.append(signals_of(model, input_ids[own], mask[own], heads))
        return Signals(*(torch.cat([part[k] for part in parts]) for k in range(4)), heads)

    def gradients_of(gamma: Tensor, sign: str = "both") -> Tensor:
        return gradients(model, input_ids, mask, shape_advantages(advantages, gamma, sign) * per_token, minibatches)

    uniform = gradients_of(torch.ones_like(per_token))
    record = {
        "args": asdict(args), "responses": len(mask), "success": rewards.mean().item(),
        "target": products(inner(target, target)), "arms": {"uniform": measure(uniform, uniform, target, rows, None)},
    }  # fmt: skip

    # 4. Arm by arm; the record is written after each, because on a large model each takes minutes.
    worth = measured.values.delta[0].to(device) if measured else None  # of each token, [B,N]
    of_worth = [*ORACLES, "VinePPO"] if measured else []
    for name in tqdm([*of_worth, *(a for a in args.arms if a != "uniform")], desc="arms"):
        amp = args.gamma_amp
        if name == "VinePPO":
            amp = None
            arm = gradients(model, input_ids, mask, worth * per_token, minibatches)
        elif name in ORACLES:
            arm = gradients_of(1 + (amp - 1) * credit.top_q(worth.abs(), mask, ORACLES[name]))
        else:
            amp = arms.ARMS[name].settings.get("gamma_amp", amp)
            arm = gradients_of(*arms.gamma_of(arms.ARMS[name], seen, mask, input_ids, model, tokenizer, amp, args.seed))
        record["arms"][name] = measure(arm, uniform, target, rows, amp)
        write_whole(Path(args.out), json.dumps(record))

    # 5. The tokens that hold signal and noise, where it is known what they were worth.
    if measured:
        square, entropy = measured.values.square[0].to(device), seen(False).entropy
        kinds = torch.zeros(len(tokenizer), device=device).index_add(0, input_ids[mask], entropy[mask]).topk(SHOWN)
        rest = ~torch.isin(input_ids, kinds.indices) & mask
        record["tokens"] = {}
        for token in (*kinds.indices.tolist(), None):
            at = rest if token is None else (input_ids == token) & mask
            part = gradients_of(at.float())
            record["tokens"]["all others" if token is None else f"`{visible(tokenizer.decode([token]))}`"] = {
                "shares": [(100 * (x * at).sum() / (x * mask).sum()).item() for x in (mask, entropy, square)],
                "along": rounded(inner(part, target)), "with uniform": products(inner(part, uniform)),
            }  # fmt: skip
    write_whole(Path(args.out), json.dumps(record))
    print("\n\n".join(markdown(t) for t in (table(record), *([token_table(record)] if measured else []))))
    print(f"\nuniform: cosine with the gradient of success; others: % more. {len(minibatches)} minibatches of "
          f"{rows} responses, {100 * record['success']:.1f} % right: {args.out}")  # fmt: skip


if __name__ == "__main__":
    main(parse_args(Args))
