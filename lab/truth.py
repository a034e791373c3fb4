"""Where does credit belong? The value of every token, measured; and how much of it the signals find.

    python -m lab.truth                                     the tiny model before training, half an hour
    python -m lab.truth --model runs/NAME/checkpoint-40     after it
    python -m lab.truth --resume FOLDER                     goes on after a stop; of a finished one, the tables again

V_t is the chance that a response is right after its first t tokens, when the policy goes on from there: the share of
right ones among continuations sampled at its own temperature, up to the length that is left. Token t was worth
dV_t = V_{t+1} - V_t (Monte-Carlo token values: VinePPO, arXiv 2410.01679). A token of large dV^2 decided something,
for better or worse, and that is where credit belongs.

An estimate's square is too large by its variance, so dV^2 is (estimated dV)^2 less both estimates' p(1 - p)/(K - 1):
without bias, and negative now and then. V at the end is the verdict itself. V_t is a mean of V_{t+1} over the next
token, so a token of probability p is worth 1 - p at most: neighbours that differ by no more than --sure in all share
one estimate, and dV between them counts as 0. Equal beginnings of a group's responses share theirs as well. The
continuations come in two halves, so that what is chosen by the one can be measured by the other.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import set_seed
from transformers.hf_argparser import HfArg

import tasks
from grpo import check_logits
from lab import truth_tables
from node.output import minutes, read_lines, write_whole
from node.run import new_folder, refuse_other_args
from node.settings import TINY, check_length, fill_defaults, load_model, parse_args
from rollout import Rollout, pad_batch, start_actor

SURE = 1e-3
CALL = 2048  # continuations in a call, about
DEFAULTS = {  # of arguments that are not given: for the tiny model and what is trained from it; for any other model
    "task": ("countdown-tiny", "countdown-words"),
    "max_tokens": (128, 256),
    "kv_cache_gib": (0.5, 8.0),
}


@dataclass
class Args:
    """Measure what every token of sampled responses was worth, and how much of that WAAD, FAI and others find."""

    model: str = HfArg(default=TINY, help="Folder or hub name of a transformers checkpoint.")
    task: str | None = HfArg(default=None, help=f"One of: {', '.join(tasks.TASKS)} (default: by the model).")
    data: str | None = HfArg(default=None, help="Local JSON, JSONL or parquet file in place of the task's dataset.")
    split: Literal["train", "test"] = HfArg(default="train", help="Of the task's problems.")
    responses: int = HfArg(default=256, help="Responses whose tokens are valued, --group to a problem.")
    group: int = HfArg(default=8, help="G, responses to each problem.")
    continuations: int = HfArg(default=24, help="K, of each beginning of a response; even.")
    sure: float = HfArg(default=SURE, help="Neighbours that can differ by no more than this share one estimate of V.")
    max_tokens: int | None = HfArg(default=None, help="Longest response (default: 128 for the tiny model, 256).")
    engine: Literal["vllm", "torch"] = HfArg(default="vllm", help="The sampler; torch where vLLM is not installed.")
    kv_cache_gib: float | None = HfArg(default=None, help="vLLM's cache (default: 0.5 for the tiny model, 8).")
    seed: int = HfArg(default=0, help="Seed of problems and sampling.")
    out: str | None = HfArg(default=None, help="Folder to write; it must be new (default: a new one under runs/).")
    resume: str | None = HfArg(default=None, help="Folder that a stopped measurement goes on in; given alone.")


def stands_for(logprobs: list[float], sure: float = SURE) -> list[int]:
    """For the beginnings of 0 to T tokens of a response, the longest beginning that has the same value, up to `sure`.

    >>> stands_for([-2.0, -1e-5, -0.1, -1e-5])
    [0, 2, 2, 4, 4]
    """
    place, doubt = len(logprobs), 0.0
    places = [place]
    for t in range(len(logprobs) - 1, -1, -1):
        doubt -= math.expm1(logprobs[t])
        if doubt > sure:
            place, doubt = t, 0.0
        places.append(place)
    return places[::-1]


def plan(rollouts: list[Rollout], sure: float = SURE) -> dict[int, dict[tuple[int, ...], list[int]]]:
    """What is to be continued: by number of tokens t, each beginning (with its prompt) and the responses it is of."""
    found: dict[int, dict[tuple[int, ...], list[int]]] = {}
    for b, r in enumerate(rollouts):
        for t in {*stands_for(r.logprobs, sure)} - {len(r.ids)}:
            found.setdefault(t, {}).setdefault((*r.prompt_ids, *r.ids[:t]), []).append(b)
    return {t: found[t] for t in sorted(found)}


def continue_all(
    actor, reward: Callable[[int, list[int]], float], rollouts: list[Rollout], continuations: int, max_tokens: int,
    file: Path, sure: float = SURE,
) -> None:  # fmt: skip
    """Continue every beginning `continuations` times, in large calls; append what came out to the file, call by call.

    reward(b, ids) judges response ids to response b's problem. A line is a length t: {"t": t, "right": {b: [right ones
    in the first half, in the second]}}. Lengths that the file has are not done again. A call takes neighbouring lengths
    together; it may go on for as long as the shortest allows, and what is too long is cut, as the policy would have.
    """
    done = {line["t"] for line in read_lines(file)}
    todo = [
        (t, ids, owners) for t, found in plan(rollouts, sure).items() if t not in done for ids, owners in found.items()
    ]
    calls: list[list] = []
    for _, same in groupby(todo, key=lambda x: x[0]):
        if not calls or len(calls[-1]) * continuations >= CALL:
            calls.append([])
        calls[-1] += same
    with file.open("a") as out:
        for call in tqdm(calls, desc="calls to the sampler"):
            groups = actor.generate([[*ids] for _, ids, _ in call], continuations, max_tokens - call[0][0])
            right: dict[int, dict] = {}
            for (t, ids, owners), group in zip(call, groups):
                verdicts = [int(reward(owners[0], [*ids[len(ids) - t :], *r.ids][:max_tokens])) for r in group]
                halves = sum(verdicts[: continuations // 2]), sum(verdicts[continuations // 2 :])
                right.setdefault(t, {}).update({b: halves for b in owners})
            out.write("".join(json.dumps({"t": t, "right": found}) + "\n" for t, found in right.items()))
            out.flush()


class Values(NamedTuple):
    """What tokens were worth. [3,B,N] each: by all continuations, by the first half of them, by the second."""

    before: Tensor  # V_t, at the token's place
    delta: Tensor  # dV_t, estimated
    square: Tensor  # dV_t^2, without bias


def token_values(
    rollouts: list[Rollout], rewards: Tensor, lines: list[dict], continuations: int, shape, sure: float = SURE
) -> Values:
    """Values of each response token, 0 elsewhere; lines as continue_all writes them, rewards [B], shape (B, N)."""
    right = {(line["t"], int(b)): halves for line in lines for b, halves in line["right"].items()}
    out = torch.zeros(3, 3, *shape)
    size = torch.tensor([continuations, continuations // 2, continuations // 2])[:, None].float()  # [3,1]
    for b, r in enumerate(rollouts):
        places = stands_for(r.logprobs, sure)
        halves = [right[t, b] if t < len(r.ids) else [rewards[b] * continuations / 2] * 2 for t in places]
        counts = torch.tensor([(x + y, x, y) for x, y in halves]).T  # [3,T+1]
        v = counts / size
        variance = v * (1 - v) / (size - 1)
        differ = torch.tensor(places[1:]) != torch.tensor(places[:-1])
        delta = v.diff(dim=1)
        start = len(r.prompt_ids)
        out[:, :, b, start : start + len(r.ids)] = torch.stack(
            [v[:, :-1], delta, differ * (delta**2 - variance[:, 1:] - variance[:, :-1])]
        )
    return Values(*out)


class Measured(NamedTuple):
    """A measurement as its folder holds it."""

    args: Args
    problems: list[tasks.Problem]  # of each response
    rollouts: list[Rollout]
    rewards: Tensor  # [B]
    values: Values | None  # None when it has not come to its end


def read_args(folder: str | Path, kind: type = Args):
    """The arguments of a measurement, from its folder; ValueError, in one line, if it is none."""
    try:
        return kind(**json.loads((Path(folder) / "args.json").read_text()))
    except (OSError, TypeError, json.JSONDecodeError) as e:
        raise ValueError(f"{folder}: has no args.json that this can read ({type(e).__name__}: {e})") from e


def write_rollouts(folder: Path, rollouts: list[Rollout], rewards: list[float]) -> None:
    """responses.jsonl, which is whole or not there: a response and its verdict a line."""
    lines = []
    for r, reward in zip(rollouts, rewards, strict=True):
        rounded = [float(f"{x:.4g}") for x in r.logprobs]
        lines.append(r._replace(logprobs=rounded)._asdict() | {"reward": reward})
    write_whole(folder / "responses.jsonl", "".join(json.dumps(x) + "\n" for x in lines))


def read_rollouts(folder: Path) -> tuple[list[Rollout], list[float]]:
    """What write_rollouts wrote, or nothing."""
    lines = read_lines(folder / "responses.jsonl")
    return [Rollout(**{k: x[k] for k in Rollout._fields}) for x in lines], [x["reward"] for x in lines]


def read(folder: str | Path) -> Measured:
    """A folder of this command that has its responses. ValueError, in one line, if it is none."""
    args, folder = read_args(folder), Path(folder)
    rollouts, rewards = read_rollouts(folder)
    if not rollouts:
        raise ValueError(f"{folder}: has no responses yet: python -m lab.truth --resume {folder}")
    problems = tasks.load(args.task, args.split, args.responses // args.group, args.seed, args.data)
    problems = [p for p in problems for _ in range(args.group)]
    rewards = torch.tensor(rewards)
    lines, values = read_lines(folder / "values.jsonl"), None
    if not plan(rollouts, args.sure).keys() - {line["t"] for line in lines}:
        shape = pad_batch(rollouts)[1].shape
        values = token_values(rollouts, rewards, lines, args.continuations, shape, args.sure)
    return Measured(args, problems, rollouts, rewards, values)


def outcome_variance(found: Measured) -> tuple[float, float, float]:
    """Three estimates of the mean variance of a response's outcome, which agree where the token values are right.

    The sum of dV^2 over a response (V is a martingale); V (1 - V) before its first token, without bias; and the
    variance of the verdicts of a group's responses.
    """
    mask = pad_batch(found.rollouts)[1]
    first = mask.int().argmax(1, keepdim=True)
    v, k = found.values.before[0].gather(1, first), found.args.continuations
    groups = found.rewards.view(-1, found.args.group)
    total = found.values.square[0].sum() / len(mask)
    return total.item(), (v * (1 - v) * k / (k - 1)).mean().item(), groups.var(1).mean().item()


def checked(args: Args) -> Args:
    """The arguments, what was left open filled in; ValueError for what cannot be."""
    args, note = fill_defaults(args, DEFAULTS, args.model)
    print(note)
    if args.continuations < 4 or args.continuations % 2:
        raise ValueError(f"--continuations {args.continuations}: an even number, 4 or more")
    if not 0 <= args.sure < 1:
        raise ValueError(f"--sure {args.sure}: 0 or more, less than 1")
    if args.group < 1 or args.responses < 2 * args.group or args.responses % args.group:
        raise ValueError(f"--responses {args.responses}: a multiple of --group {args.group}, two groups or more")
    return args


def main(args: Args) -> None:
    started = time.perf_counter()
    try:
        folder = Path(args.resume) if args.resume else None
        if folder:
            refuse_other_args(args)
        args = read_args(folder) if folder else checked(args)
        problems = tasks.load(args.task, args.split, args.responses // args.group, args.seed, args.data)
        model, tokenizer = load_model(args.model)
        check_logits(model)
        longest = max(len(ids) for ids in tokenizer([p.prompt for p in problems]).input_ids) + 2 * args.max_tokens
        check_length(args.model, model.config, longest, f"--max_tokens {args.max_tokens}")
        if folder is None:
            folder = new_folder(args.out, f"truth-{args.task}")
            write_whole(folder / "args.json", json.dumps(asdict(args), indent=1))
        sampled = (folder / "responses.jsonl").exists()
        if not sampled or read(folder).values is None:
            print(f"{folder}: starting {args.engine}", flush=True)
            set_seed(args.seed)  # torch's sampler draws from the global generator; vLLM sets its own
            actor = start_actor(args.engine, args.model, longest, args.seed, args.kv_cache_gib, model, tokenizer)
            judge = tasks.get(args.task).reward
            if not sampled:
                groups = actor.generate([p.prompt for p in problems], args.group, args.max_tokens, progress=True)
                rewards = [judge(problem, r.text) for problem, group in zip(problems, groups) for r in group]
                write_rollouts(folder, [r for group in groups for r in group], rewards)
            problem_of, rollouts = read(folder)[1:3]

            def reward(b: int, ids: list[int]) -> float:
                return judge(problem_of[b], tokenizer.decode(ids, skip_special_tokens=True))

            values = folder / "values.jsonl"
            continue_all(actor, reward, rollouts, args.continuations, args.max_tokens, values, args.sure)
            actor.close()
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    print(truth_tables.report(read(folder), model, folder))
    print(f"{minutes(time.perf_counter() - started)}: {folder}/tables.md")


if __name__ == "__main__":
    main(parse_args(Args))
