"""Do heads, WAAD and FAI stay what they are while a model learns? A run of train.py at every checkpoint it has kept.

    python train.py --keep 3 --out runs/demo     the demo, with its checkpoints of steps 20 and 40
    python -m lab.drift --run runs/demo

All are looked at on the same responses, which the model before training gives to the run's held-out problems, and
compared with it. Writes drift.png into the run's folder.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from scipy import stats
from tqdm import tqdm
from transformers import set_seed
from transformers.hf_argparser import HfArg

import train
from heads import layer_range, split_heads
from lab import linkage, report, truth
from node import checkpoint, prepare
from node.output import markdown, minutes
from node.settings import load_model, parse_args
from rollout import pad_batch, start_actor

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass
class Args:
    """Compare the attention of a run's checkpoints with that of the model before training."""

    run: str = HfArg(help="Folder of a run of train.py; its checkpoints are those that --keep has left.")
    responses: int = HfArg(default=128, help="To as many of its held-out problems.")


def drift(first: linkage.PerHead, now: linkage.PerHead, quantile: float = 0.3) -> dict[str, float]:
    """How far the signals on the same responses have moved, and whether the links still hold.

    Overlap (Jaccard) of the local and of the global heads; rank correlation of WAAD and of FAI (Spearman, mean over
    responses, each look with its own head split); the lifts of now.
    """
    (before, _), (after, _) = (linkage.responses_of(looks, quantile) for looks in (first, now))
    groups = zip(split_heads(first.spans, quantile), split_heads(now.spans, quantile))
    out = {
        name: ((a & b).sum() / (a | b).sum()).item() for name, (a, b) in zip(("local heads", "global heads"), groups)
    }
    for name in ("WAAD", "FAI"):
        pairs = [(a[name][~np.isnan(a[name])], b[name][~np.isnan(b[name])]) for a, b in zip(before, after)]
        ranks = [stats.spearmanr(a, b).statistic for a, b in pairs if len(a) > 2 and np.ptp(a) > 0 and np.ptp(b) > 0]
        out[f"{name} rank correlation"] = float(np.mean(ranks)) if ranks else float("nan")
    return out | linkage.lifts(after)


def figure(moved: dict[int, dict[str, float]], evaluations: list[dict], path: Path) -> None:
    """Through a run: held-out success, then how far heads, WAAD and FAI have moved by step, then the lifts."""
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), sharex=True)
    success, half = (100 * np.array([r[name] for r in evaluations]) for name in ("success", "half_width_95"))
    left.errorbar([r["step"] for r in evaluations], success, half, fmt="o-", capsize=3, color="black")
    left.set(title="held-out success, %", xlabel="step")
    for name, style in (("local heads", "o-"), ("global heads", "s-"), ("WAAD rank correlation", "^--"),
                        ("FAI rank correlation", "v--")):  # fmt: skip
        label = f"{name}, overlap" if name.endswith("heads") else name
        middle.plot([*moved], [found[name] for found in moved.values()], style, label=label)
    middle.set(title="against the model before training", xlabel="step", ylim=(0, 1.05))
    for name in report.PAPER_LINKS:
        right.plot([*moved], [100 * found[name] for found in moved.values()], "o-", label=name)
    right.axhline(0, color="black", lw=0.8)
    right.set(title="lift over random, %", xlabel="step")
    for ax in (middle, right):
        ax.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main(args: Args) -> None:
    started = time.perf_counter()
    folder = Path(args.run)
    try:
        run = truth.read_args(folder, train.Args)
        kept = checkpoint.list_checkpoints(folder)
        if not kept:
            raise ValueError(f"--run {args.run}: has no checkpoint")
        records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        evaluations = [r for r in records if "success" in r]
        model, tokenizer = load_model(run.model)
        problems = prepare.load_problems(run, tokenizer)[1][: args.responses]
        actor = start_actor(
            run.engine, run.model, run.max_model_len, run.seed, run.kv_cache_gib, model, tokenizer, dtype=run.dtype
        )
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    set_seed(run.seed)  # torch's sampler draws from the global generator; vLLM sets its own
    groups = actor.generate([p.prompt for p in problems], 1, run.max_tokens)
    actor.close()
    layers = layer_range(model.config.get_text_config().num_hidden_layers, run.layers)
    input_ids, mask, _ = (x.to(model.device) for x in pad_batch([r for (r,) in groups]))

    def look(whose) -> linkage.PerHead:
        return linkage.per_head(whose, input_ids, mask, layers, run.micro_tokens, dtype=run.dtype)

    first = look(model)
    moved = {0: drift(first, first, run.head_quantile)}
    for path in tqdm(kept, desc="checkpoints"):
        step = int(path.name.removeprefix("checkpoint-"))
        moved[step] = drift(first, look(load_model(str(path))[0]), run.head_quantile)
    rows = [["", *(f"step {step}" for step in moved)]]
    rows += [[name, *(f"{found[name]:.2f}" for found in moved.values())] for name in moved[0]]
    print(markdown(rows))
    figure(moved, evaluations, folder / "drift.png")
    took = minutes(time.perf_counter() - started)
    print(f"{len(kept)} checkpoints on {len(mask)} responses, {took}: {folder / 'drift.png'}")


if __name__ == "__main__":
    main(parse_args(Args))
