"""The evidence, to look at: does attention show the preplan-and-anchor rhythm (arXiv 2510.13554, Sec. 4)?

    python -m lab.analyze                                         the tiny model, on held-out problems
    python -m lab.analyze --model Qwen/Qwen3-4B-Base --task gsm8k
    python -m lab.analyze --resume FOLDER                         one that was stopped goes on

Samples a response to each problem, looks at every head's maps, and writes a folder: index.html (the responses to hover
over, all tables, all pictures, in one file), the pictures as PNG, tables.md, and analysis.json with every figure.

Where this departs from the paper, and why:
1. What a peak is, it does not say; linkage.py states ours.
2. The continuation that a forced token is compared with is the greedy one from the same place with the token that stood
   there, so that the token is all that differs; the sampled rest would differ by its own chance as well.
3. Matched controls, separators by themselves (Table 1), the same links for other layers and splits, and for a model of
   the same shape with random weights are added: position and structure alone could make a link.
4. Entropy is that of the model's own distribution (temperature 1), as training sees it, whatever the sampling was.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
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
from attention import attention_maps, recording
from eval import evaluate
from grpo import check_logits
from heads import layer_range, split_heads
from lab import linkage, perturb, pictures, sinks, truth
from lab.signals import untrained
from node.output import markdown, minutes
from node.run import new_folder, refuse_other_args, write_args
from node.settings import TINY, check_length, fill_defaults, load_model, parse_args
from rollout import Chat, Rollout, pad_batch, start_actor, tokenize

PAGES = 6  # responses shown on the page
DEFAULTS = {  # of arguments that are not given: for the tiny model and what is trained from it; for any other model
    "task": ("countdown-tiny", "gsm8k"),
    "max_tokens": (128, 1024),
    "kv_cache_gib": (0.5, 8.0),
}


@dataclass
class Args:
    """Look for the preplan-and-anchor rhythm in a model's attention."""

    model: str = HfArg(default=TINY, help="Folder or hub name of a transformers checkpoint.")
    task: str | None = HfArg(default=None, help=f"One of: {', '.join(tasks.TASKS)} (default: countdown-tiny or gsm8k).")
    data: str | None = HfArg(default=None, help="Local JSON, JSONL or parquet file in place of the task's dataset.")
    problems: int = HfArg(default=70, help="Held-out problems, one response each.")
    chat: bool = HfArg(default=False, help="Put each prompt into the model's chat template (default: plain text).")
    drop_first: bool = HfArg(default=False, help="Look at attention without the first token's column (lab/sinks.py).")
    temperature: float = HfArg(default=0.7, help="Of the sampled responses.")
    max_tokens: int | None = HfArg(default=None, help="Longest response and continuation (default: 128 or 1024).")
    top_k: int = HfArg(default=3, help="Other tokens forced at a position.")
    positions: int = HfArg(default=3, help="Positions of highest, and of lowest FAI in a response; 0: no Table 1.")
    engine: Literal["vllm", "torch"] = HfArg(default="vllm", help="The sampler; torch where vLLM is not installed.")
    kv_cache_gib: float | None = HfArg(default=None, help="vLLM's cache (default: 0.5 for the tiny model, 8).")
    seed: int = HfArg(default=0, help="Seed of sampling and of the random weights.")
    micro_tokens: int = HfArg(default=2048, help="Tokens in one forward pass.")
    out: str | None = HfArg(default=None, help="Folder to write; it must be new (default: a new one under runs/).")
    resume: str | None = HfArg(default=None, help="Folder that a stopped analysis goes on in; given alone.")


def other_ways(looks: dict[str, linkage.PerHead]) -> dict[str, dict]:
    """Table 2 for the bottom and top layers, for other head splits of the middle ones, and with FAI by norm."""
    ways = {f"{where} layers": (where, 0.3) for where in ("bottom", "middle", "top")}
    ways |= {f"split {q:.0%}": ("middle", q) for q in (0.2, 0.4, 0.5)}
    ways |= {"FAI × ‖W_O v‖": ("by norm", 0.3)} if "by norm" in looks else {}
    return {name: linkage.table(linkage.responses_of(looks[where], q)[0]) for name, (where, q) in ways.items()}


def described(task, tokenizer, problem, rollout, response: linkage.Response) -> dict:
    """One response for the page: its tokens, and what the tip of each says."""
    tokens = [tokenizer.decode([t]) for t in rollout.ids]
    waad, fai, entropy = (torch.tensor(np.nan_to_num(response[n]))[None].float() for n in ("WAAD", "FAI", "entropy"))
    mask = torch.ones_like(waad, dtype=torch.bool)
    gamma = {
        "local": credit.local_chunk(waad, mask),
        "global": credit.global_anchor(fai, mask),
        "coupled": credit.coupled_rhythm(waad, fai, mask),
        "entropy": credit.high_entropy(entropy, mask),
    }
    delta = credit.waad_change(waad, mask)
    tips = [
        f"{pictures.visible(token)}\nposition {t}\nWAAD {waad[0, t]:.2f}\nΔ {delta[0, t]:.2f}\n"
        f"FAI {response['FAI'][t]:.4f}\nentropy {entropy[0, t]:.3f}\n"
        + "\n".join(f"γ {name} {g[0, t]:.2f}" for name, g in gamma.items())
        for t, token in enumerate(tokens)
    ]
    return {
        "prompt": problem.prompt, "correct": task.reward(problem, rollout.text) == 1, "tokens": tokens,
        "shades": {"WAAD": response["WAAD"], "FAI": response["FAI"]}, "tips": tips,
    }  # fmt: skip


def mean_maps(model, rollout: Rollout, layers: list[int], spans: Tensor, drop_first: bool = False) -> list[np.ndarray]:
    """Eq. 8 for one response: mean maps of the local and of the global heads, response rows and columns; [T,T] each."""
    ids, first = [*rollout.prompt_ids, *rollout.ids], len(rollout.prompt_ids)
    with torch.no_grad(), recording(model, layers) as recorded:
        model.get_decoder()(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
    found = [sinks.without_first(recorded[layer]) if drop_first else recorded[layer] for layer in layers]
    maps = torch.cat([attention_maps(layer)[0] for layer in found])  # [heads,N,N]
    maps = maps[:, first - drop_first :, first - drop_first :].cpu()  # [heads,T,T]
    return [maps[group].mean(0).numpy() for group in split_heads(spans)]


def main(args: Args) -> None:
    started = time.perf_counter()
    try:
        folder = Path(args.resume) if args.resume else None
        if folder:
            refuse_other_args(args)
            args = truth.read_args(folder, Args)
        else:
            args, note = fill_defaults(args, DEFAULTS, args.model)
            print(note)
        for name, least in (("problems", 10), ("max_tokens", 16), ("top_k", 1), ("positions", 0), ("micro_tokens", 1)):
            if getattr(args, name) < least:
                raise ValueError(f"--{name} {getattr(args, name)}: must be {least} or more")
        problems = tasks.load(args.task, "test", args.problems, data=args.data)
        model, tokenizer = load_model(args.model)
        check_logits(model)
        others = model.config.get_text_config().vocab_size - len(tokenizer.all_special_ids) - 1
        if args.top_k > others:
            raise ValueError(f"--top_k {args.top_k}: there are {others} other tokens to force")
        if not 0 <= args.temperature < float("inf"):
            raise ValueError(f"--temperature {args.temperature}: 0 (greedy) or above")
        prompts, template = [p.prompt for p in problems], Chat() if args.chat else None
        longest_prompt = max(map(len, tokenize(tokenizer, prompts, template)))
        max_model_len = longest_prompt + 2 * args.max_tokens  # a continuation may be as long as a response
        check_length(args.model, model.config, max_model_len, f"--max_tokens {args.max_tokens}")
        if folder is None:
            folder = new_folder(args.out, f"analysis-{args.task}")
            write_args(args, folder)
        print(f"{folder}: starting {args.engine}", flush=True)
        actor = start_actor(
            args.engine, args.model, max_model_len, args.seed, args.kv_cache_gib, model, tokenizer, chat=template
        )
        # 1. Sample.
        set_seed(args.seed)
        if not (folder / "responses.jsonl").exists():
            groups, verdicts = evaluate(actor, args.task, problems, 1, args.max_tokens, args.temperature)
            truth.write_rollouts(folder, [r for (r,) in groups], verdicts.flatten().tolist())
        rollouts, rewards = truth.read_rollouts(folder)
        rewards = torch.tensor(rewards)
        long = [i for i, r in enumerate(rollouts) if len(r.ids) > linkage.H_LO + 10]
        if len(long) < 2:
            raise ValueError(f"{args.model}: {len(long)} of {len(rollouts)} responses are longer than "
                             f"{linkage.H_LO + 10} tokens; nothing can be said of them")  # fmt: skip
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")

    # 2. Look at every head's maps.
    input_ids, mask, _ = (x.to(model.device) for x in pad_batch(rollouts))
    count = model.config.get_text_config().num_hidden_layers
    layers = {where: layer_range(count, where) for where in ("middle", "bottom", "top")}

    def look(whose, where: str, **how) -> linkage.PerHead:
        how = {"drop_first": args.drop_first, **how}
        return linkage.per_head(whose, input_ids, mask, layers[where], args.micro_tokens, **how)

    looks = {where: look(model, where) for where in tqdm(layers, "maps")}
    taken = None
    if sinks.can_weigh(model, layers["middle"]):
        looks["by norm"] = look(model, "middle", by_norm=True)
        taken = looks["by norm"].first
    other_spans = look(model, "middle", drop_first=not args.drop_first).spans
    responses, overlap = linkage.responses_of(looks["middle"])
    floor = linkage.responses_of(look(untrained(model, args.seed), "middle"))[0]
    share = f"{100 * rewards.mean():.1f} % of {len(rollouts)} responses right"
    print(f"{args.model}: {share}, {mask.sum()} tokens", flush=True)
    found = {
        "args": asdict(args),
        "success": rewards.mean().item(),
        "receiver heads in H_glob": overlap,
        "first token": sinks.table(looks["middle"].spans, other_spans, looks["middle"].first, taken),
        "table 2": linkage.table(responses),
        "floor": linkage.table(floor),
        "other ways": other_ways(looks),
    }  # fmt: skip
    # 3. Force other tokens.
    if args.positions:
        seen = (model, tokenizer, rollouts, responses, input_ids, mask)
        counts = (args.max_tokens, folder / "continuations.jsonl", args.positions, args.top_k)
        found["table 1"] = perturb.table(actor, *seen, *counts)
    actor.close()

    # 4. Write the pictures, the page and the tables.
    right = [i for i in long if rewards[i] == 1] or long
    shown = min(right, key=lambda i: abs(len(rollouts[i].ids) - 45))  # short, but with more than one thought
    maps = mean_maps(model, rollouts[shown], layers["middle"], looks["middle"].spans, args.drop_first)
    tokens = [pictures.visible(tokenizer.decode([t])) for t in rollouts[shown].ids]
    pictures.maps_figure(*maps, responses[shown], tokens, folder / "maps.png")
    order = [shown, *(i for i in long if i != shown)][:PAGES]
    texts = [described(tasks.get(args.task), tokenizer, problems[i], rollouts[i], responses[i]) for i in order]
    title, tables = f"Preplan and anchor in {args.model}", pictures.tables(found)
    intro = f"{len(rollouts)} responses to {args.data or args.task}, temperature {args.temperature}, "
    intro += f"{100 * found['success']:.1f} % right. "
    intro += f"{100 * overlap:.0f} % of the receiver heads are global heads (30 % by chance)."
    (folder / "index.html").write_text(pictures.page(title, intro, tables, texts, [folder / "maps.png"]))
    text = "\n\n".join(f"### {name}\n\n{markdown(rows)}" for name, rows in tables.items())
    (folder / "tables.md").write_text(f"{args.model}: {intro}\n\n{text}")
    (folder / "analysis.json").write_text(json.dumps(found, indent=1))

    print(text)
    lifts = ", ".join(f"{name} {100 * found['table 2'][name]['lift'][0]:+.0f} %" for name in pictures.PAPER_LINKS)
    print(f"lifts over random: {lifts}; {minutes(time.perf_counter() - started)}: {folder}/index.html")


if __name__ == "__main__":
    main(parse_args(Args))
