"""Success on held-out problems: greedy pass@1, sampled avg@k and pass@j, with the trainer's sampler and verifier.

python eval.py --model runs/countdown-tiny-coupled-1/checkpoint-40
python eval.py --model A B --task aime24 math500 --samples 16 --out results.json
"""

import json
import math
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import set_seed
from transformers.hf_argparser import HfArg

import tasks
from node import ranks
from node.checkpoint import list_checkpoints, read_args
from node.output import markdown, mean_interval, write_whole
from node.settings import TINY, check_rows, fill_defaults, load_tokenizer, parse_args
from rollout import Rollout, chat, encode, start_actor
from tasks.boxes import boxed_in_thinking_only

DEFAULTS = {  # of arguments that are not given: for the tiny model and what was trained from it; for any other model
    "task": (["countdown-tiny"], ["countdown4"]),
    "max_tokens": (128, 1024),
    "max_model_len": (512, 2048),
    "kv_cache_gib": (0.5, 8.0),
}


@dataclass
class Args:
    """Evaluate checkpoints on benchmarks: greedy pass@1, sampled avg@k and pass@j, with 95 % intervals."""

    model: list[str] = HfArg(default_factory=lambda: [TINY], help="Folders or hub names of transformers checkpoints.")
    task: list[str] | None = HfArg(
        default=None,
        help=f"One or several tasks, each {tasks.HELP} (default: countdown-tiny for the tiny model, countdown4 for any "
        "other).",
    )
    data: str | None = HfArg(
        default=None,
        help=f"Local file to read in place of the task's dataset: {tasks.COLUMNS}; with one task only.",
    )
    problems: int | None = HfArg(default=None, help="Held-out problems (default: each task's own number).")
    samples: int | None = HfArg(
        default=None, help="Sampled responses to each problem (default: each task's own number)."
    )
    temperature: float = HfArg(default=1.0, help="Temperature of the sampled responses.")
    chat: bool = HfArg(default=False, help="Put each prompt into the model's chat template, as a user's message.")
    system: str | None = HfArg(default=None, help="--chat: a system message before it.")
    thinking: Literal["on", "off"] | None = HfArg(
        default=None, help="--chat: let the model think before it answers, or not, if its template knows that."
    )
    stop: list[str] | None = HfArg(
        default=None, help="Texts that end a response (default: each task's own, and none with --chat)."
    )
    reward_processes: int = HfArg(default=1, help="Processes that judge responses at the same time, for slow rewards.")
    max_tokens: int | None = HfArg(
        default=None, help="Longest response (default: 128 for the tiny model, 1024 for any other)."
    )
    max_model_len: int | None = HfArg(
        default=None, help="Longest prompt and response together (default: 512 for the tiny model, 2048 for any other)."
    )
    kv_cache_gib: float | None = HfArg(
        default=None,
        help="GiB of vLLM's cache, which must hold one sequence (default: 0.5 for the tiny model, 8 for any other).",
    )
    engine: Literal["vllm", "torch"] = HfArg(
        default="vllm", help="The sampler; torch is transformers' generate, for machines without vLLM."
    )
    seed: int = HfArg(default=0, help="Seed of the problems and the sampling.")
    out: str | None = HfArg(
        default=None,
        help="JSON file for the scores and all responses; results that it already holds are not computed again.",
    )


def respond(
    actor,
    task: str,
    problems: list[tasks.Problem],
    n: int,
    max_tokens: int,
    temperature: float = 1.0,
    stop: Sequence[str] | None = None,
    reward_processes: int = 1,
) -> tuple[list[list[Rollout]], tasks.Judged]:
    """n responses to each problem of a task, [P][n], and how they were judged. A reward that raises is 0."""
    prompts = [p.prompt for p in problems]
    rollouts = actor.generate(prompts, n, max_tokens, temperature, stop, progress=ranks.rank() == 0)
    texts = [[response.text for response in responses] for responses in rollouts]
    judged = tasks.judge(task, problems, texts, reward_processes)
    if errors := judged.errors:
        print(f"{task}: {len(errors)} rewards raised and count as 0. The first: {errors[0]}", file=sys.stderr)
    return rollouts, judged


def evaluate(*args, **settings) -> tuple[list[list[Rollout]], Tensor]:
    """As respond, called with the same arguments. Returns the responses, and their rewards, [P,n] float32."""
    rollouts, judged = respond(*args, **settings)
    return rollouts, torch.tensor(judged.rewards)


def pass_at(j: int, rewards: Tensor) -> Tensor:
    """Unbiased estimate of the chance that at least one of j responses is right (Chen et al. 2021).

    1 - C(n-c, j) / C(n, j), where c of the n rewards of a problem are 1. rewards [P,n]; 1 <= j <= n. Returns [P].
    Raises ValueError for rewards between 0 and 1: nothing is right or wrong then.

    >>> pass_at(2, torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    tensor([0.5000, 0.0000])
    """
    if not ((rewards == 0) | (rewards == 1)).all():
        raise ValueError("pass@j needs rewards of 0 or 1")
    n = rewards.shape[1]
    return torch.tensor([1 - math.comb(n - int(c), j) / math.comb(n, j) for c in rewards.sum(1)])


def sizes(k: int) -> list[int]:
    """The j of pass@j: powers of two, and k.

    >>> sizes(4), sizes(6)
    ([1, 2, 4], [1, 2, 4, 6])
    """
    return sorted({2**i for i in range(k.bit_length())} | {k})


def measure(actor, task: str, problems: list[tasks.Problem], k: int, args: Args) -> dict:
    """Scores with the half-widths of their intervals, shares of truncated responses, and all responses."""
    # A greedy response to each problem, and k sampled ones.
    given = dict(
        max_tokens=args.max_tokens, stop=tasks.stops(task, args.stop, args.chat), reward_processes=args.reward_processes
    )
    greedy, judged_greedy = respond(actor, task, problems, 1, temperature=0.0, **given)
    sampled, judged = respond(actor, task, problems, k, temperature=args.temperature, **given)
    # The scores of each problem. With fractional rewards there is no pass@j.
    first, rewards = torch.tensor(judged_greedy.rewards), torch.tensor(judged.rewards)  # [P,1], [P,k]
    per_problem = {"greedy pass@1": first[:, 0], f"avg@{k}": rewards.mean(1)}
    if ((rewards == 0) | (rewards == 1)).all():
        per_problem |= {f"pass@{j}": pass_at(j, rewards) for j in sizes(k)}
    # All responses of each problem, the greedy one first.
    responses = [
        [{"text": r.text, "reward": w, "truncated": r.truncated} for r, w in zip(g + s, [*a.tolist(), *b.tolist()])]
        for g, s, a, b in zip(greedy, sampled, first, rewards)
    ]
    return {
        "scores": {x: dict(zip(("mean", "half_width_95"), mean_interval(v))) for x, v in per_problem.items()},
        "truncated": {
            "greedy": sum(r[0]["truncated"] for r in responses) / len(problems),
            "sampled": sum(x["truncated"] for r in responses for x in r[1:]) / (len(problems) * k),
        },
        "no_verdict": judged_greedy.no_verdict + judged.no_verdict,
        "boxed_in_thinking_only": sum(boxed_in_thinking_only(x["text"]) for r in responses for x in r),
        "responses": [
            {"prompt": p.prompt, "answer": getattr(p, "answer", None), "greedy": r[0], "sampled": r[1:]}
            for p, r in zip(problems, responses)
        ],
    }


def percent(score: dict[str, float]) -> str:
    """A score in per cent, as the table shows it.

    >>> percent({"mean": 0.25, "half_width_95": 0.0375})
    '25.0 ± 3.8'
    """
    return f"{100 * score['mean']:.1f} ± {100 * score['half_width_95']:.1f}"


def table(results: list[dict]) -> str:
    """A Markdown table in per cent: a row for each checkpoint, greedy pass@1 and avg@k of each benchmark."""
    columns = dict.fromkeys((r["task"], name) for r in results for name in ("greedy pass@1", f"avg@{r['k']}"))
    rows = [["model", *(f"{task} {name}" for task, name in columns)]]
    for model in dict.fromkeys(r["model"] for r in results):
        scores = {(r["task"], name): s for r in results if r["model"] == model for name, s in r["scores"].items()}
        rows.append([model, *(percent(scores[c]) if c in scores else "" for c in columns)])
    return markdown(rows) + "\n"


def line(result: dict) -> str:
    """All scores of one result, in one line."""
    scores = ", ".join(f"{name} {percent(score)}" for name, score in result["scores"].items())
    greedy, sampled = (100 * result["truncated"][kind] for kind in ("greedy", "sampled"))
    notes = [f"truncated: {greedy:.1f} % of the greedy responses, {sampled:.1f} % of the sampled ones"]
    if count := result.get("no_verdict"):
        notes.append(f"without a verdict, so 0: {count}")
    if count := result.get("boxed_in_thinking_only"):
        notes.append(f"with a box inside <think> only: {count}")
    return f"{result['model']}, {result['problems']} of {result['task']}: {scores} % ({'; '.join(notes)})"


def last_checkpoint(model: str) -> str:
    """The last checkpoint, if this is the folder of a run; else the name as it is."""
    is_model = (Path(model) / "config.json").is_file()
    if is_model or not (Path(model) / "args.json").is_file():
        return model
    found = list_checkpoints(Path(model))
    if not found:
        raise ValueError(f"--model {model}: this run has no checkpoint yet")
    print(f"{model} is a run: its last checkpoint is {found[-1]}")
    return str(found[-1])


def compare_with_training(model: str, args: Args) -> list[str]:
    """What to say if train.py trained this checkpoint with other prompts or lengths, or on these same problems."""
    trained, warnings = read_args(model), []
    if args.data and trained.get("data") and Path(args.data).resolve() == Path(trained["data"]).resolve():
        warnings.append(
            f"warning: {model} was trained on {args.data}, all but the problems that train.py held out, so its scores "
            "say little about new problems"
        )
    names = ("chat", "system", "thinking", "max_tokens")
    pairs = {name: (trained[name], getattr(args, name)) for name in names if name in trained}
    if trained.get("task") in args.task:  # each task has its own stops
        then = tasks.stops(trained["task"], trained["stop"], trained["chat"])
        pairs["stop"] = then, tasks.stops(trained["task"], args.stop, args.chat)
    others = [
        f"--{name} {then} then, {now} now" for name, (then, now) in pairs.items() if (then or None) != (now or None)
    ]
    if others:
        warnings.append(
            f"warning: {model} was trained with other settings, so these scores are not those of its run: "
            f"{'; '.join(others)}"
        )
    return warnings


def plan(args: Args) -> list[tuple[dict, list[tasks.Problem]]]:
    """What to evaluate: (settings, problems) of each checkpoint and benchmark. ValueError for what cannot work."""
    # The arguments.
    for name in ("samples", "max_tokens", "reward_processes"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name} {value}: must be 1 or more")
    if not 0 <= args.seed < 2**31:
        raise ValueError(f"--seed {args.seed}: must be from 0 to {2**31 - 1}")
    if not args.kv_cache_gib > 0:
        raise ValueError(f"--kv_cache_gib {args.kv_cache_gib}: must be above 0")
    if not args.temperature > 0:
        raise ValueError(f"--temperature {args.temperature}: must be above 0 (the greedy response is always made)")
    if args.data and len(args.task) > 1:
        raise ValueError(f"--data {args.data} holds the problems of one task: give one --task")
    # The problems of each benchmark, the same for every checkpoint.
    problems = {task: tasks.load(task, "test", args.problems, args.seed, args.data) for task in args.task}
    for task, found in problems.items():
        if len(found) < 2:
            raise ValueError(f"--problems {len(found)} of {task}: an interval needs 2 or more")
    # Each checkpoint on each benchmark, if its prompts fit. The settings are what a stored result is found by.
    steps = []
    for model in args.model:
        tokenizer = load_tokenizer(model, args.max_model_len)
        for task, found in problems.items():
            prompts = encode(tokenizer, [p.prompt for p in found], args.max_tokens, args.max_model_len, chat(args))
            check_rows(tokenizer, prompts)
            names = ("temperature", "max_tokens", "seed", "data", "chat", "system", "thinking")
            given = {name: getattr(args, name) for name in names}
            given["stop"] = tasks.stops(task, args.stop, args.chat)
            k = args.samples or tasks.samples(task)
            steps.append(({"model": model, "task": task, "problems": len(found), "k": k, **given}, found))
    return steps


def read(out: Path) -> list[dict]:
    """The results that the file holds so far. ValueError if it holds something else."""
    if out.suffix != ".json":
        raise ValueError(f"--out {out}: must end in .json (the table goes into a .md beside it)")
    try:
        results = json.loads(out.read_text(encoding="utf-8"))["results"] if out.exists() else []
        if all(isinstance(r, dict) for r in results):
            return results
        raise ValueError("not a list of results")
    except (ValueError, TypeError, KeyError) as e:
        raise ValueError(f"--out {out} exists and is not a result file of eval.py: give another name") from e


def write(out: Path, args: Args, results: list[dict]) -> None:
    """Write all results so far."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, json.dumps({"args": asdict(args), "results": results}, indent=1, default=str, skipkeys=True))


def find(results: list[dict], settings: dict) -> dict | None:
    """The result with these settings, if it is there."""
    return next((r for r in results if r.items() >= settings.items()), None)


def main(args: Args) -> None:
    # Check everything that can be wrong before anything long starts.
    try:
        args = replace(args, model=list(dict.fromkeys(map(last_checkpoint, args.model))))
        args, note = fill_defaults(args, DEFAULTS, *args.model)
        print(note)
        steps = plan(args)
        for model in args.model:
            for warning in compare_with_training(model, args):
                print(warning)
        out = Path(args.out) if args.out else None
        results = read(out) if out else []
        if out:
            write(out, args, results)  # so that a place where nothing can be written is known now
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")

    # One engine for each checkpoint that has something left to be evaluated. Results are written one by one.
    for settings, _ in steps:
        if find(results, settings):
            print(f"already in {out}: {settings['model']}, {settings['task']}")
    for model in args.model:
        todo = [(settings, p) for settings, p in steps if settings["model"] == model and not find(results, settings)]
        if not todo:
            continue
        try:
            actor = start_actor(
                args.engine, model, args.max_model_len, args.seed, args.kv_cache_gib, chat=chat(args)
            )  # fmt: skip
        except (ValueError, OSError) as e:
            sys.exit(f"error: {e}")
        with closing(actor):
            for settings, problems in todo:
                set_seed(args.seed)  # here, so that no score depends on what was evaluated before it
                found = measure(actor, settings["task"], problems, settings["k"], args)
                results.append(settings | found)
                if out:
                    write(out, args, results)
                print(line(results[-1]), flush=True)

    # The table of what was asked for, new or found in the file.
    wanted = [find(results, settings) for settings, _ in steps]
    print("\n" + table(wanted))
    if out:
        out.with_suffix(".md").write_text(table(wanted), encoding="utf-8")
    where = f"{out}, with every response; {out.with_suffix('.md')}" if out else "not kept (--out FILE.json keeps them)"
    print(f"{len(wanted)} results in per cent, with 95 % intervals over problems: {where}")


if __name__ == "__main__":
    main(parse_args(Args))
