"""One training step to look at: one group of responses, from the sampled text to the new weights.

    python -m examples.step                            the tiny model (assets/tiny), under half a minute on two cores
    python -m examples.step --problem 20 --seed 1      another group
    python -m examples.step --out examples/figures   makes the committed page and the README's picture again

It prints the numbers as text and writes two files:
- step.html, a page with every number, in ten sections. It needs no other file. Its form is step_page.html.
- gamma.svg, a picture of one response. The colour of a token is its gamma.

Every number comes from the functions that train, with train.py's default arguments. Two things are computed twice:
- WAAD and FAI come from full attention maps as well. The page says whether both ways agree.
- gamma of section 8 is computed again by the page's script, because a reader can change the settings there. The tests
  compare the script with credit.py.

The page itself lists where this differs from a training step of train.py (step_page.list_departures).
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
from transformers import set_seed
from transformers.hf_argparser import HfArg

import metrics
import tasks
import train
from attention import Recorded, attention_maps, recording
from credit import Coupled, assign_credit, coupled_parts
from examples import step_page
from grpo import (
    check_logits,
    clipped_loss,
    find_clipped,
    group_advantages,
    probability_ratio,
    shape_advantages,
    token_logprobs,
    update,
)
from node import prepare
from node.output import visible, write_whole
from node.run import Clock
from node.settings import TINY, load_model, parse_args
from rollout import Rollout, TorchActor, pad_batch

GRADIENT_STEPS = 2
AGREE = 1e-5  # how far WAAD and FAI may differ from those of full maps
LEGIBLE = 50  # tokens: a response of about this length is good to look at
CERTAIN = 0.99  # above this pi_old the model had no choice, so the gradient of log pi is near 0
# The arguments of train.py that the page shows.
SETTINGS = ("q", "gamma_amp", "alpha", "k", "window", "horizon", "epsilon", "lr", "head_quantile", "heads_every")
RGB = {"local": (47, 129, 247), "global": (240, 70, 80)}


@dataclass
class Args:
    """Follow one group of responses through one training step, and write it as a page."""

    model: str = HfArg(default=TINY, help="Folder or hub name of a transformers checkpoint.")
    task: str | None = HfArg(
        default=None,
        help=f"One of: {', '.join(tasks.TASKS)} (default: countdown-tiny for the tiny model, else countdown4).",
    )
    seed: int = HfArg(default=0, help="Seed of the sampling.")
    problem: int = HfArg(default=22, help="Number of the problem in the task's training list, from 0.")
    out: str = HfArg(default="runs/step", help="Folder for step.html and gamma.svg. Older ones there are replaced.")


class Step(NamedTuple):
    """What one training step on one group computes: G responses, right-padded to N tokens."""

    rollouts: list[Rollout]
    rewards: Tensor  # [1,G]
    advantages: Tensor  # [G]
    input_ids: Tensor  # [G,N]
    mask: Tensor  # [G,N] bool, the response tokens
    sampler_logprobs: Tensor  # [G,N]
    signals: metrics.Signals
    recorded: dict[int, Recorded]  # queries and keys, by layer
    parts: Coupled
    gamma: dict[str, Tensor]  # by credit, [G,N] each
    token_advantages: Tensor  # [G,N], advantage times gamma of coupled
    updates: list[dict[str, float]]  # what grpo.update returns, by gradient step
    logprobs: list[Tensor]  # before the first gradient step and after each, [G,N]
    clipped: Tensor  # [G,N] bool, at the second gradient step
    moved: list[Tensor]  # how far each weight has moved
    handed_logprobs: Tensor  # [G,N], the sampler's after it has the new weights


def take_step(model, tokenizer, problem: tasks.Problem, args: train.Args) -> Step:
    """One training step on one group. The model given is the sampler's. It ends with the new weights."""
    # Sections 1-3: sample, verify, advantages.
    sampler = TorchActor(model, tokenizer, args.max_model_len)
    (rollouts,), rewards, *_ = train.sample_batch(args, sampler, [problem], Clock())
    advantages = group_advantages(rewards).flatten().to(model.device)  # [G]
    input_ids, mask, sampler_logprobs = (x.to(model.device) for x in pad_batch(rollouts))  # [G,N]

    # Sections 4-7: the head split, then the scoring pass: log pi_old, entropy, WAAD, FAI.
    rows = torch.arange(len(rollouts), device=model.device)
    heads = train.split_into_local_and_global(args, model, input_ids, mask)
    signals = train.score(args, model, input_ids, mask, rows, heads)
    # The scoring pass does not return queries and keys. The page draws maps from them, so the pass is made once more.
    with torch.no_grad(), recording(model, heads.layers) as recorded:
        token_logprobs(model, input_ids, mask)

    # Section 8: gamma.
    parts = coupled_parts(signals.waad, signals.fai, mask, args.q, args.k)
    gamma = {
        name: assign_credit(name, signals, mask, q=args.q, amp=args.gamma_amp, alpha=args.alpha, k=args.k)
        for name in ("local", "global", "coupled")
    }
    token_advantages = shape_advantages(advantages, gamma["coupled"], args.sign)  # [G,N]

    # Section 9: two gradient steps on a copy, so that the old weights stay for comparison.
    trained = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(trained.parameters(), args.lr, weight_decay=0.0, fused=True)
    batch = input_ids, mask, signals.logprobs, token_advantages
    updates, logprobs = [], [signals.logprobs]
    for _ in range(GRADIENT_STEPS):
        updates.append(update(trained, optimizer, *batch, [rows], args.micro_tokens, args.epsilon))
        with torch.no_grad():
            logprobs.append(token_logprobs(trained, input_ids, mask)[0])
    clipped = find_clipped(logprobs[1], signals.logprobs, token_advantages, mask, args.epsilon)

    # Section 10: the sampler gets the new weights.
    with torch.no_grad():
        moved = [(new - old).abs() for new, old in zip(trained.parameters(), model.parameters())]
        sampler.reload(trained)
        handed_logprobs, _ = token_logprobs(sampler.model, input_ids, mask)
    return Step(
        rollouts=rollouts,
        rewards=rewards,
        advantages=advantages,
        input_ids=input_ids,
        mask=mask,
        sampler_logprobs=sampler_logprobs,
        signals=signals,
        recorded=recorded,
        parts=parts,
        gamma=gamma,
        token_advantages=token_advantages,
        updates=updates,
        logprobs=logprobs,
        clipped=clipped,
        moved=moved,
        handed_logprobs=handed_logprobs,
    )


def choose_response(step: Step) -> int:
    """The response to follow: a right one if there is one, with a dominated anchor, of a length that can be read."""
    has_dominated, lengths = step.parts.dominated.any(1), step.mask.sum(1)

    def rank(b: int) -> tuple:
        return -step.rewards[0, b], not has_dominated[b], abs(lengths[b] - LEGIBLE)

    return min(range(len(step.mask)), key=rank)


# ---- WAAD and FAI from full maps ----


def compare_with_full_maps(step: Step, b: int, t: int, args: train.Args) -> tuple[dict, list[dict]]:
    """WAAD and FAI of response b a second time, from full maps; the band of row t; and two of the maps to look at."""
    heads, mask, (low, high) = step.signals.heads, step.mask[b : b + 1], args.horizon
    layers = [take_response(step.recorded[layer], b) for layer in heads.layers]
    maps = torch.stack([attention_maps(layer)[0] for layer in layers])  # [layers,H,N,N]
    full_waad = metrics.waad(maps[heads.is_local].mean(0)[None], mask, args.window)[0]  # [N]
    full_fai = metrics.fai(maps[heads.is_global].mean(0)[None], mask, (low, high))[0]  # [N]

    # WAAD_t = W * (sum of row t) - sum of weight times band, where band[i] = A[t,t-i], the mean over the local heads.
    band, row_sum = torch.zeros(args.window), 0.0
    for block in metrics._band_blocks(list(zip(layers, heads.is_local)), mask, args.window - 1):
        if block.rows.start <= t < block.rows.stop:
            row = t - block.rows.start
            distance = block.distance[row]  # [columns]
            near = (distance >= 0) & (distance < args.window)
            band[distance[near].cpu()] += block.attention[0, :, row, near].sum(0).cpu()
            row_sum += block.row_sum[0, :, row].sum().cpu()  # 1 a head, or with sinks less
    band, row_sum = (x / heads.is_local.sum().cpu() for x in (band, row_sum))
    weights = args.window - torch.arange(args.window)
    from_band = args.window * row_sum - (weights * band).sum()

    waad_gap = (full_waad - step.signals.waad[b]).abs().max().item()
    fai_gap = (full_fai - step.signals.fai[b]).abs().max().item()
    band_gap = (from_band - step.signals.waad[b, t].cpu()).abs().item()
    comparison = {
        "weights": weights.tolist(),
        "band": band.tolist(),
        "products": (weights * band).tolist(),
        "sum": (weights * band).sum().item(),
        "from_band": from_band.item(),
        "waad": step.signals.waad[b, t].item(),
        "from_map": full_waad[t].item(),
        "waad_gap": waad_gap,
        "fai_gap": fai_gap,
        "limit": AGREE,
        "agrees": max(waad_gap, fai_gap, band_gap) <= AGREE,
    }

    # The maps of the head of lowest span and of the head of highest span, without padding.
    end = int(mask[0].nonzero().max()) + 1
    order = heads.spans.flatten().argsort(stable=True).tolist()
    shown = []
    for group, place in (("local", order[0]), ("global", order[-1])):
        layer, head = divmod(place, heads.spans.shape[1])
        png = draw_map(maps[layer, head, :end, :end].cpu().numpy(), RGB[group])
        shown.append({"group": group, "layer": heads.layers[layer], "head": head, "png": png})
    return comparison, shown


def take_response(layer: Recorded, b: int) -> Recorded:
    """What was recorded of response b alone."""
    seen = layer.attn_mask
    if seen is not None and len(seen) > 1:
        seen = seen[b : b + 1]
    query, key, lse = (x[b : b + 1] for x in (layer.query, layer.key, layer.lse))
    return layer._replace(query=query, key=key, lse=lse, attn_mask=seen)


def draw_map(attention: np.ndarray, rgb: tuple[int, int, int]) -> str:
    """A map [N,N] as a PNG in base64: one colour, opaque where A is 1. The power 0.4 makes small A visible."""
    alpha = (255 * attention.clip(0, 1) ** 0.4).round()
    file = io.BytesIO()
    imsave(file, np.dstack([*(np.full_like(alpha, c) for c in rgb), alpha]).astype(np.uint8), format="png")
    return base64.b64encode(file.getvalue()).decode()


# ---- the step as lists and plain numbers ----


def describe(step: Step, tokenizer, args: train.Args) -> dict:
    """Every number of the page and of the printed text, as lists and plain numbers. Token text is made visible."""
    b = choose_response(step)
    first = int(step.mask[b].int().argmax())  # place of the followed response's first token
    texts = [[visible(tokenizer.decode([i])) for i in row] for row in step.input_ids.tolist()]
    tokens = describe_tokens(step, b, first, texts[b])

    # The token whose WAAD the page computes by hand: the first dominated anchor, because section 8 needs it.
    by_hand = next((t for t, token in enumerate(tokens) if token["dominated"]), 0)
    comparison, maps = compare_with_full_maps(step, b, first + by_hand, args)

    facts = {
        "model": "the tiny model" if args.model == TINY else args.model,
        "task": args.task,
        "followed": b,
        "prompt_tokens": first,
        "prompt_ids": step.rollouts[b].prompt_ids,
        "tokens": tokens,
        **describe_group(step, args.epsilon),
        **describe_heads(step),
        "maps": maps,
        "identity": comparison | {"token": by_hand},
        "tau_waad": step.parts.tau_waad[b].item(),
        "tau_delta": step.parts.tau_delta[b].item(),
        "five": describe_most_uncertain(step, texts),
        "handed": describe_handover(step),
        "settings": {name: getattr(args, name) for name in SETTINGS}
        | {"certain": CERTAIN, "warmup_steps": train.WARMUP_STEPS, "span_rows": train.SPAN_ROWS},
    }
    for t, token in enumerate(tokens):
        token["clip"] = step_page.clip_rule(facts, t)
    return facts | {"says": step_page.sentences(facts)}


def describe_tokens(step: Step, b: int, first: int, texts: list[str]) -> list[dict]:
    """All numbers of each token of response b. Token 0 stands at place `first` of the row, after the prompt."""
    mask, old_logprobs, parts = step.mask, step.logprobs[0], step.parts
    columns = {
        "old_logprob": old_logprobs,
        "certain": old_logprobs.exp() > CERTAIN,
        "entropy": step.signals.entropy,
        "waad": step.signals.waad,
        "fai": step.signals.fai,
        "delta": parts.delta,
        "t_loc": parts.t_loc,
        "t_glob": parts.t_glob,
        "dominated": parts.dominated,
        "intro": torch.where(parts.dominated, parts.intro - first, -1),  # number of the token, -1: none
        **step.gamma,
        "token_advantage": step.token_advantages,
        "clipped": step.clipped,
        "ratios": torch.stack([probability_ratio(x, old_logprobs, mask) for x in step.logprobs], -1),
    }
    places = mask[b].nonzero()[:, 0].tolist()
    return [{"text": texts[t]} | {name: values[b, t].tolist() for name, values in columns.items()} for t in places]


def describe_group(step: Step, epsilon: float) -> dict:
    """The responses with reward, advantage and losses; the losses of the group; what the gradient steps did."""
    old_logprobs = step.logprobs[0]  # of the pass before the first gradient step, so pi_old

    def losses(rows: slice) -> list[float]:
        """Before the first gradient step, and after each."""
        return [
            clipped_loss(x[rows], old_logprobs[rows], step.token_advantages[rows], step.mask[rows], epsilon).item()
            for x in step.logprobs
        ]

    responses = [
        {
            "text": visible(rollout.text),
            "ids": rollout.ids,
            "truncated": rollout.truncated,
            "reward": step.rewards[0, i].item(),
            "advantage": step.advantages[i].item(),
            "losses": losses(slice(i, i + 1)),
        }
        for i, rollout in enumerate(step.rollouts)
    ]
    # Of the group as a whole.
    return {
        "responses": responses,
        "rewards_mean": step.rewards.mean().item(),
        "rewards_std": step.rewards.std().item(),
        "gap": (step.sampler_logprobs - old_logprobs)[step.mask].abs().max().item(),
        "losses": losses(slice(None)),
        "updates": step.updates,
        "clipped_in_group": int(step.clipped.sum()),
        "tokens_in_group": int(step.mask.sum()),
    }


def describe_heads(step: Step) -> dict:
    """The sampled heads in the order of their spans, and the shapes of the queries and keys that the pass keeps."""
    split = step.signals.heads
    listed = []
    for i, layer in enumerate(split.layers):
        for head, span in enumerate(split.spans[i].tolist()):
            group = "local" if split.is_local[i, head] else "global" if split.is_global[i, head] else "neither"
            listed.append({"layer": layer, "head": head, "span": span, "group": group})
    listed.sort(key=lambda head: head["span"])
    recorded = step.recorded[split.layers[0]]
    return {
        "layers": split.layers,
        "query": list(recorded.query.shape),
        "key": list(recorded.key.shape),
        "heads": listed,
    }


def describe_most_uncertain(step: Step, texts: list[list[str]], count: int = 5) -> list[dict]:
    """The tokens of the group with the highest entropy, and their log-probs before and after the gradient steps."""
    entropy = step.signals.entropy.masked_fill(~step.mask, -1)
    highest = entropy.flatten().argsort(descending=True, stable=True)[:count].tolist()
    rows = []
    for place in highest:
        i, t = divmod(place, step.mask.shape[1])
        rows.append(
            {
                "text": texts[i][t],
                "response": i,
                "entropy": step.signals.entropy[i, t].item(),
                "token_advantage": step.token_advantages[i, t].item(),
                "logprobs": [x[i, t].item() for x in step.logprobs],
            }
        )
    return rows


def describe_handover(step: Step) -> dict:
    """How far the weights moved, and how far the sampler's log-probs are from the trained model's."""
    trained_logprobs = step.logprobs[-1]
    return {
        "tensors": len(step.moved),
        "weights": sum(moved.numel() for moved in step.moved),
        "changed": sum(int((moved > 0).sum()) for moved in step.moved),
        "farthest": max(moved.max().item() for moved in step.moved),
        "before": (step.logprobs[0] - trained_logprobs)[step.mask].abs().max().item(),
        "after": (step.handed_logprobs - trained_logprobs)[step.mask].abs().max().item(),
    }


def main(args: Args) -> None:
    # 1. Take the step. A wrong argument ends the program with one line.
    try:
        asked = train.Args(model=args.model, task=args.task, seed=args.seed, prompts=1, minibatches=1, engine="torch")
        settings = prepare.complete_args(asked, train.DEFAULTS)
        problems = tasks.load(settings.task, "train")
        if not 0 <= args.problem < len(problems):
            raise ValueError(f"--problem {args.problem}: {settings.task} has problems 0 to {len(problems) - 1}")
        model, tokenizer = load_model(args.model)
        check_logits(model)
        folder = Path(args.out)
        folder.mkdir(parents=True, exist_ok=True)
        set_seed(args.seed)
        step = take_step(model, tokenizer, problems[args.problem], settings)
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")

    # 2. Write and print it.
    facts = describe(step, tokenizer, settings) | {
        "prompt": visible(problems[args.problem].prompt),
        "command": f"python -m examples.step {shlex.join(sys.argv[1:])}".strip(),
    }
    write_whole(folder / "step.html", step_page.page(facts))
    write_whole(folder / "gamma.svg", step_page.picture(facts))
    print(step_page.text(facts))
    right = sum(response["reward"] for response in facts["responses"])
    verdict = "" if facts["identity"]["agrees"] else " IT DISAGREES WITH FULL MAPS."
    print(
        f"one training step on {len(facts['responses'])} responses, {right:g} of them right; response "
        f"{facts['followed'] + 1} token by token.{verdict} page: {folder}/step.html, picture: {folder}/gamma.svg"
    )


if __name__ == "__main__":
    main(parse_args(Args))
