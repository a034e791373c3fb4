"""One step of the algorithm to look at: one group of responses, from the sampled text to the new weights.

    python -m lab.step                          the embedded model, under half a minute on two cores
    python -m lab.step --problem 20 --seed 1    another group
    python -m lab.step --out lab/figures        makes the committed page and the README's picture again

Writes step.html, one page that needs no other file, and gamma.svg, the followed response coloured by gamma; prints what
the page says. Every number comes from the functions that train, with train.py's default arguments. One line is computed
a second way, as a check: WAAD and FAI from full maps. step_page.html is the page's form.

Where this departs from a step of train.py, and why:
1. One group, so that it can be read; sampled by transformers, so that nothing needs to be installed for it.
2. Both gradient steps are made on the whole group, so that the second one meets ratios other than 1 and clips some.
   They have the full learning rate, which train.py reaches over its first steps.
3. The pass is made once more with queries and keys kept, to show maps and a band of one.
"""

import base64
import copy
import io
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.image import imsave
from torch import Tensor
from transformers import HfArgumentParser, set_seed
from transformers.hf_argparser import HfArg

import metrics
import tasks
import train
from attention import Recorded, attention_maps, recording
from credit import Coupled, assign_credit, coupled_parts
from grpo import check_head, clipped_loss, group_advantages, probability_ratio, shape_advantages, token_logprobs, update
from lab import step_page
from lab.report import visible
from node import prepare
from node.output import write_whole
from node.settings import TINY, load_model
from rollout import Rollout, TorchActor, pad_batch

GRADIENT_STEPS = 2
AGREE = 1e-5  # how far WAAD and FAI may lie from those of full maps
LEGIBLE = 50  # tokens of a response that is good to look at
# Of train.py's arguments, those that the page shows.
SETTINGS = ("q", "gamma_amp", "alpha", "k", "window", "horizon", "epsilon", "lr", "head_quantile")
RGB = {"local": (47, 129, 247), "global": (240, 70, 80)}


@dataclass
class Args:
    """Follow one group of responses through one step of training, and write it as a page."""

    model: str = HfArg(default=TINY, help="Folder or hub name of a transformers checkpoint.")
    task: str | None = HfArg(
        default=None,
        help=f"One of: {', '.join(tasks.TASKS)} (default: countdown-tiny for the embedded model, else countdown4).",
    )
    seed: int = HfArg(default=0, help="Seed of the sampling.")
    problem: int = HfArg(default=22, help="Number of the problem in the task's training list, from 0.")
    out: str = HfArg(default="runs/step", help="Folder for step.html and gamma.svg; what it has of them is replaced.")


class Step(NamedTuple):
    """What one step on one group computes: G responses right-padded to N tokens, in the order of the ten steps."""

    rollouts: list[Rollout]
    rewards: Tensor  # [1,G]
    advantages: Tensor  # [G]
    input_ids: Tensor  # [G,N]
    mask: Tensor  # [G,N] bool
    sampler_logprobs: Tensor  # [G,N]
    signals: metrics.Signals
    recorded: dict[int, Recorded]  # by layer
    parts: Coupled
    gamma: dict[str, Tensor]  # by credit, [G,N]
    shaped: Tensor  # [G,N]
    updates: list[dict[str, float]]  # what update returns, by gradient step
    logprobs: list[Tensor]  # before the first step and after each, [G,N]
    clipped: Tensor  # [G,N] bool, at the second step
    moved: list[Tensor]  # how far each weight has moved
    handed_logprobs: Tensor  # [G,N], the sampler's after it has the new weights


def take_step(model, tokenizer, problem: tasks.Problem, args: train.Args) -> Step:
    """The ten steps on one group. The model given is the sampler's; it ends with the new weights."""
    actor_infer = TorchActor(model, tokenizer, args.max_model_len)
    (rollouts,), rewards = train.sample_batch(args, actor_infer, [problem])
    advantages = group_advantages(rewards).flatten().to(model.device)
    input_ids, mask, sampler_logprobs = (x.to(model.device) for x in pad_batch(rollouts))
    rows = torch.arange(len(rollouts), device=model.device)
    heads = train.split_into_local_and_global(args, model, input_ids, mask)
    signals = train.score(args, model, input_ids, mask, rows, heads)
    with torch.no_grad(), recording(model, heads.layers) as recorded:
        token_logprobs(model, input_ids, mask)
    parts = coupled_parts(signals.waad, signals.fai, mask, args.q, args.k)
    gamma = {
        name: assign_credit(name, signals, mask, q=args.q, amp=args.gamma_amp, alpha=args.alpha, k=args.k)
        for name in ("local", "global", "coupled")
    }
    shaped = shape_advantages(advantages, gamma["coupled"], args.sign)

    trained = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(trained.parameters(), args.lr, weight_decay=0.0, fused=True)
    batch = input_ids, mask, signals.logprobs, shaped
    updates, logprobs = [], [signals.logprobs]
    for _ in range(GRADIENT_STEPS):
        updates.append(update(trained, optimizer, *batch, [rows], args.micro_tokens, args.epsilon))
        with torch.no_grad():
            logprobs.append(token_logprobs(trained, input_ids, mask)[0])
    clipped = stopped(logprobs[1], signals.logprobs, shaped, mask, args.epsilon)

    with torch.no_grad():
        moved = [(new - old).abs() for new, old in zip(trained.parameters(), model.parameters())]
        actor_infer.reload(trained)
        handed_logprobs, _ = token_logprobs(actor_infer.model, input_ids, mask)
    return Step(
        rollouts, rewards, advantages, input_ids, mask, sampler_logprobs, signals, recorded, parts, gamma, shaped,
        updates, logprobs, clipped, moved, handed_logprobs,
    )  # fmt: skip


def stopped(logprobs: Tensor, old_logprobs: Tensor, shaped: Tensor, mask: Tensor, epsilon: float) -> Tensor:
    """Where clipping stops the gradient: response tokens on whose log-prob clipped_loss does not depend. [G,N] bool

    >>> shaped, mask = torch.tensor([[1.0, 1.0, -1.0, -1.0]]), torch.ones(1, 4, dtype=torch.bool)
    >>> stopped(torch.tensor([[1.3, 0.7, 1.3, 0.7]]).log(), torch.zeros(1, 4), shaped, mask, 0.2)
    tensor([[ True, False, False,  True]])
    """
    logprobs = logprobs.clone().requires_grad_()
    clipped_loss(logprobs, old_logprobs, shaped, mask, epsilon).backward()
    return mask & (shaped != 0) & (logprobs.grad == 0)


def choose(step: Step) -> int:
    """The response to follow: a right one if there is one, with a dominated anchor, of a length that can be read."""
    dominated, lengths = step.parts.dominated.any(1), step.mask.sum(1)
    return min(range(len(step.mask)), key=lambda b: (-step.rewards[0, b], not dominated[b], abs(lengths[b] - LEGIBLE)))


def against_full_maps(step: Step, b: int, t: int, args: train.Args) -> tuple[dict, list[dict]]:
    """WAAD and FAI of response b from full maps, beside those that train; the band of row t; and two of the maps."""
    heads, mask, (low, high) = step.signals.heads, step.mask[b : b + 1], args.horizon
    layers = [of_response(step.recorded[layer], b) for layer in heads.layers]
    maps = torch.stack([attention_maps(layer)[0] for layer in layers])  # [layers,H,N,N]
    full_waad = metrics.waad(maps[heads.is_local].mean(0)[None], mask, args.window)
    full_fai = metrics.fai(maps[heads.is_global].mean(0)[None], mask, (low, high))

    local_heads, band = list(zip(layers, heads.is_local)), torch.zeros(args.window)  # A[t,t-i], mean over local heads
    for block in metrics._band_blocks(local_heads, mask, args.window - 1):
        row_of_block = t - block.rows.start
        if block.rows.start <= t < block.rows.stop:
            distance = block.distance[row_of_block]
            near = (distance >= 0) & (distance < args.window)
            band[distance[near].cpu()] += block.attention[0, :, row_of_block, near].sum(0).cpu()
    band /= heads.is_local.sum().cpu()
    weights = args.window - torch.arange(args.window)
    row = {
        "weights": weights.tolist(), "band": band.tolist(), "products": (weights * band).tolist(),
        "sum": (weights * band).sum().item(), "from_band": (args.window - (weights * band).sum()).item(),
        "waad": step.signals.waad[b, t].item(), "from_map": full_waad[0, t].item(),
        "waad_gap": (full_waad[0] - step.signals.waad[b]).abs().max().item(),
        "fai_gap": (full_fai[0] - step.signals.fai[b]).abs().max().item(),
        "limit": AGREE,
    }  # fmt: skip
    row["agrees"] = max(row["waad_gap"], row["fai_gap"], abs(row["from_band"] - row["waad"])) <= AGREE

    end = int(mask[0].nonzero().max()) + 1
    order = heads.spans.flatten().argsort(stable=True).tolist()
    shown = []
    for group, place in (("local", order[0]), ("global", order[-1])):
        layer, head = divmod(place, heads.spans.shape[1])
        png = map_png(maps[layer, head, :end, :end].cpu().numpy(), RGB[group])
        shown.append({"group": group, "layer": heads.layers[layer], "head": head, "png": png})
    return row, shown


def of_response(layer: Recorded, b: int) -> Recorded:
    """What was recorded of response b alone."""
    seen = layer.visible
    if seen is not None and len(seen) > 1:
        seen = seen[b : b + 1]
    return Recorded(layer.query[b : b + 1], layer.key[b : b + 1], layer.scale, layer.lse[b : b + 1], seen)


def map_png(attention: np.ndarray, rgb: tuple[int, int, int]) -> str:
    """A map [N,N] as a PNG in base64: one colour, opaque where attention is 1, so that any ground can lie beneath."""
    alpha = (255 * attention.clip(0, 1) ** 0.4).round()
    file = io.BytesIO()
    imsave(file, np.dstack([*(np.full_like(alpha, c) for c in rgb), alpha]).astype(np.uint8), format="png")
    return base64.b64encode(file.getvalue()).decode()


def described(step: Step, tokenizer, args: train.Args) -> dict:
    """Every number of the page and of the printed text, as lists and plain numbers. Token text is made visible."""
    b = choose(step)
    mask, heads, old_logprobs = step.mask, step.signals.heads, step.logprobs[0]
    at = mask[b].nonzero()[:, 0]  # places of the followed response's tokens
    columns = {
        "old_logprob": old_logprobs, "entropy": step.signals.entropy, "waad": step.signals.waad,
        "fai": step.signals.fai, "delta": step.parts.delta, "t_loc": step.parts.t_loc, "t_glob": step.parts.t_glob,
        "dominated": step.parts.dominated, **step.gamma, "shaped": step.shaped, "clipped": step.clipped,
        "intro": torch.where(step.parts.dominated, step.parts.intro - at[0], -1),  # number of the token, -1: none
        "ratios": torch.stack([probability_ratio(x, old_logprobs, mask) for x in step.logprobs], -1),
    }  # fmt: skip
    texts = [[visible(tokenizer.decode([i])) for i in row] for row in step.input_ids.tolist()]
    tokens = [{"text": texts[b][t], **{k: x[b, t].tolist() for k, x in columns.items()}} for t in at.tolist()]
    row = next((i for i, x in enumerate(tokens) if x["dominated"]), 0)
    identity, maps = against_full_maps(step, b, int(at[row]), args)
    identity |= {"token": row}

    def losses(rows: slice) -> list[float]:
        return [
            clipped_loss(x[rows], old_logprobs[rows], step.shaped[rows], mask[rows], args.epsilon).item()
            for x in step.logprobs
        ]

    layer = step.recorded[heads.layers[0]]
    groups = heads.is_local.int() + 2 * heads.is_global.int()
    places = mask.nonzero()
    drawn = torch.randperm(len(places), generator=torch.Generator().manual_seed(args.seed))[:5].sort().values
    found = {
        "followed": b, "prompt_tokens": int(at[0]), "tokens": tokens,
        "prompt_ids": step.rollouts[b].prompt_ids, "rewards_mean": step.rewards.mean().item(),
        "rewards_std": step.rewards.std().item(),
        "responses": [
            {"text": visible(r.text), "ids": r.ids, "truncated": r.truncated, "reward": step.rewards[0, i].item(),
             "advantage": step.advantages[i].item(), "losses": losses(slice(i, i + 1))}
            for i, r in enumerate(step.rollouts)
        ],
        "gap": (step.sampler_logprobs - old_logprobs)[mask].abs().max().item(),
        "layers": heads.layers, "query": list(layer.query.shape), "key": list(layer.key.shape),
        "heads": sorted(
            ({"layer": heads.layers[i], "head": h, "span": heads.spans[i, h].item(),
              "group": ("neither", "local", "global")[groups[i, h]]}
             for i in range(groups.shape[0]) for h in range(groups.shape[1])),
            key=lambda head: head["span"],
        ),
        "maps": maps, "identity": identity,
        "tau_waad": step.parts.tau_waad[b].item(), "tau_delta": step.parts.tau_delta[b].item(),
        "losses": losses(slice(None)), "updates": step.updates,
        "clipped_in_group": int(step.clipped.sum()), "tokens_in_group": int(mask.sum()),
        "five": [
            {"text": texts[i][t], "response": i,
             "shaped": step.shaped[i, t].item(), "logprobs": [x[i, t].item() for x in step.logprobs]}
            for i, t in places[drawn.to(places.device)].tolist()
        ],
        "handed": {
            "tensors": len(step.moved), "weights": sum(m.numel() for m in step.moved),
            "changed": sum(int((m > 0).sum()) for m in step.moved), "farthest": max(m.max().item() for m in step.moved),
            "before": (old_logprobs - step.logprobs[-1])[mask].abs().max().item(),
            "after": (step.handed_logprobs - step.logprobs[-1])[mask].abs().max().item(),
        },
        "settings": {name: getattr(args, name) for name in SETTINGS},
    }  # fmt: skip
    for t, token in enumerate(tokens):
        token["rule"], token["clip"] = step_page.credit_rule(found, t), step_page.clip_rule(found, t)
    return found | {"says": step_page.sentences(found)}


def main(args: Args) -> None:
    try:
        asked = train.Args(model=args.model, task=args.task, seed=args.seed, prompts=1, minibatches=1, engine="torch")
        settings = prepare.complete_args(asked, train.DEFAULTS)
        problems = tasks.load(settings.task, "train")
        if not 0 <= args.problem < len(problems):
            raise ValueError(f"--problem {args.problem}: {settings.task} has problems 0 to {len(problems) - 1}")
        model, tokenizer = load_model(args.model)
        check_head(model)
        folder = Path(args.out)
        folder.mkdir(parents=True, exist_ok=True)
        set_seed(args.seed)
        step = take_step(model, tokenizer, problems[args.problem], settings)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    found = described(step, tokenizer, settings) | {
        "model": args.model, "task": settings.task, "prompt": visible(problems[args.problem].prompt),
        "command": f"python -m lab.step {shlex.join(sys.argv[1:])}".strip(),
    }  # fmt: skip
    write_whole(folder / "step.html", step_page.page(found))
    write_whole(folder / "gamma.svg", step_page.picture(found))
    print(step_page.text(found))
    right = sum(r["reward"] for r in found["responses"])
    agrees = "" if found["identity"]["agrees"] else " IT DISAGREES WITH FULL MAPS."
    print(
        f"one step on {len(found['responses'])} responses, {right:g} of them right; response "
        f"{found['followed'] + 1} token by token.{agrees} {folder}/step.html, picture: {folder}/gamma.svg"
    )


if __name__ == "__main__":
    main(*HfArgumentParser(Args).parse_args_into_dataclasses())
