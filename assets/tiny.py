"""The tiny model: a character-level Qwen3 of 1.4 million weights that plays Countdown with three small numbers.

    python -m assets.tiny         makes assets/tiny again from nothing

RL needs a model that succeeds sometimes. This one is warm-started on made-up traces of an honest but careless searcher,
who tries a combination, writes its results, judges it y or n, and after an n tries another or gives up and answers.

    3 7 5>38
    <think>7-3=4,5*4=20n
    7*5=35,35+3=38y</think><answer>(7*5)+3</answer>

Which combination to try next and whether to go on are real choices, which the traces make badly (mostly at random) and
RL can make well; arithmetic, judgement and answering are skills, which the traces always show done right.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.hf_argparser import HfArg

import tasks
from node import precision
from node.settings import TINY, parse_args
from rollout import TorchActor
from tasks.countdown import random_expression, split_of

CHARACTERS = "0123456789+-*/()=,>yn \n"
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
MAX_TRIES = 7
PASS = 2048  # tokens of traces in one pass
SAVE_EVERY = 64  # steps between states of a warm start that can be stopped; whole blocks of 16


@dataclass
class Args:
    """Warm-start the tiny model from nothing."""

    out: str = HfArg(default=TINY, help="Folder to write the checkpoint to.")
    steps: int = HfArg(default=1800, help="Optimizer steps.")
    batch: int = HfArg(default=64, help="Traces in a step.")
    lr: float = HfArg(default=3e-3, help="Peak learning rate.")
    guided: float = HfArg(default=0.25, help="Share of tries that are the known solution.")
    give_up: float = HfArg(default=0.2, help="Chance to give up after a failed try.")
    seed: int = HfArg(default=0, help="Seed of the weights and the traces.")


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, one per tag, and distinct <eos>, <pad> and <unk>.

    >>> t = tokenizer()
    >>> t.decode(t("3 7 5>38\\n<think>7*5").input_ids), len(t("<think>7*5</think>").input_ids)
    ('3 7 5>38\\n<think>7*5', 5)
    """
    specials = ["<pad>", "<eos>", "<unk>"]
    t = Tokenizer(models.WordLevel({c: i for i, c in enumerate([*specials, *TAGS, *CHARACTERS])}, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    t.decoder = decoders.Fuse()
    # The tags are not "special": decoding must keep them, for the verifier reads them.
    t.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=t, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", clean_up_tokenization_spaces=False
    )


def config() -> Qwen3Config:
    """12 layers, so that five distinct ones lie in the middle third; grouped-query heads; tied embeddings."""
    return Qwen3Config(
        vocab_size=len(tokenizer()),
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},  # for sequences of 150, not of 40,000
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )


def search(rng: random.Random, task: str, guided: float, give_up: float, longest: int) -> tuple:
    """A training problem of a Countdown task and one search for its solution: (numbers, target, tries).

    A try is (steps, value, expression), as random_expression makes them. Tries end with the solution, by giving up, or
    after the longest search allowed.
    """
    spec = tasks.TASKS[task]
    while True:
        numbers = tuple(rng.randint(1, spec.largest) for _ in range(rng.choice(spec.sizes)))
        solution = random_expression(numbers, rng)
        target = solution[1]
        if 10 <= target <= 99 and split_of(numbers, target) == "train":
            break
    tries = []
    for _ in range(longest):
        one = solution if rng.random() < guided else random_expression(numbers, rng)
        if one in tries:
            continue
        tries.append(one)
        if one[1] == target or rng.random() < give_up:
            break
    return numbers, target, tries


def trace(rng: random.Random, guided: float = Args.guided, give_up: float = Args.give_up) -> tuple[str, str]:
    """A training problem's prompt and one search for its solution."""
    numbers, target, tries = search(rng, "countdown-tiny", guided, give_up, MAX_TRIES)
    think = "\n".join(f"{steps}{'y' if value == target else 'n'}" for steps, value, _ in tries)
    prompt = tasks.TASKS["countdown-tiny"].prompt.format(numbers=" ".join(map(str, numbers)), target=target)
    return prompt, f"{think}</think><answer>{tries[-1][2]}</answer>"


def skills(actor, problems: list[tasks.Problem], max_tokens: int = 128, yes: str = "y") -> dict[str, float]:
    """Shares of sampled answers that are right, of results in them that are, and of judgements that are.

    A judgement is what stands on a line after its last result; it holds `yes` where the target is said to be met.
    """
    groups = actor.generate([p.prompt for p in problems], n=2, max_tokens=max_tokens, progress=True)
    pairs = [(p, r.text) for p, group in zip(problems, groups) for r in group]
    worth = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": lambda a, b: a / b if b else None}
    results, judged = [], []
    for problem, text in pairs:
        think, closed, _ = text.partition("</think>")
        for line in think.splitlines()[: None if closed else -1]:  # not one that was cut short
            found = [*re.finditer(r"(\d+) ?([-+*/]) ?(\d+) ?= ?(\d+)", line)]
            results += [worth[m[2]](int(m[1]), int(m[3])) == int(m[4]) for m in found]
            if found and (said := line[found[-1].end() :]):
                judged.append((problem.answer[1] == int(found[-1][4])) == (yes in said))
    return {
        "success": sum(tasks.get("countdown").reward(p, text) for p, text in pairs) / len(pairs),
        "arithmetic": sum(results) / max(len(results), 1),
        "judgement": sum(judged) / max(len(judged), 1),
    }


def stated(found: dict[str, float]) -> str:
    """Skills as a line shows them."""
    return "held-out " + ", ".join(f"{k} {100 * v:.1f} %" for k, v in found.items())


def learn(
    model, tok, trace: Callable, rng: random.Random, optimizers: list, schedules: list, steps: int, batch: int,
    tokens: int, dtype: str = "float32", saved: Path | None = None,
) -> None:  # fmt: skip
    """Learn to continue prompts as traces do: steps of `batch` traces, trace() -> (prompt, response), drawn from rng.

    The prompt is noise, so only the response is learned. The loss is a sum over tokens divided by what `batch`
    responses of `tokens` tokens have: with the batch's own number short traces, the lucky ones, would count double.
    Where a file is given, the state is saved there now and then, and gone on from if it is there.
    """
    parts, first = [model, *optimizers, *schedules], 0
    if saved and saved.exists():
        first, numbers, states = torch.load(saved)
        rng.setstate(numbers)
        for part, state in zip(parts, states):
            part.load_state_dict(state)
        del states
    bar = tqdm(range(first, steps), desc="warm start", initial=first, total=steps)
    for step in bar:
        if saved and step % SAVE_EVERY == 0 and step > first:
            torch.save((step, rng.getstate(), [part.state_dict() for part in parts]), f"{saved}.new")
            Path(f"{saved}.new").replace(saved)
        if step % 16 == 0:  # sixteen batches at a time, sorted by length: little padding
            pool = [[tok(s).input_ids for s in trace()] for _ in range(16 * batch)]
            pool.sort(key=lambda pair: sum(map(len, pair)))
            batches = [pool[i : i + batch] for i in range(0, len(pool), batch)]
            rng.shuffle(batches)
        rows = [(p + r + [tok.eos_token_id], len(p)) for p, r in batches[step % 16]]
        width, loss = max(len(ids) for ids, _ in rows), 0.0
        size = max(1, PASS // width)
        model.zero_grad()
        for part in (rows[i : i + size] for i in range(0, len(rows), size)):
            ids = torch.tensor([ids + [tok.pad_token_id] * (width - len(ids)) for ids, _ in part], device=model.device)
            prompt, end = torch.tensor([[n, len(ids)] for ids, n in part], device=model.device).split(1, 1)
            t = torch.arange(width, device=model.device)
            learned = (t >= prompt) & (t < end)
            with precision.autocast(dtype, model.device):
                states = model.get_decoder()(ids).last_hidden_state[:, :-1][learned[:, 1:]]
                missed = F.cross_entropy(model.get_output_embeddings()(states).float(), ids[learned], reduction="sum")
                missed = missed / (tokens * batch)
                missed.backward()
            loss += missed.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for both in (*optimizers, *schedules):
            both.step()
        bar.set_postfix(loss=f"{loss:.3f}")


def main(args: Args) -> None:
    torch.manual_seed(args.seed)
    rng, tok, model = random.Random(args.seed), tokenizer(), Qwen3ForCausalLM(config())
    for layer in model.model.layers:  # with Qwen3's unit norms no score exceeds 5.7: heads would stay blurred
        torch.nn.init.constant_(layer.self_attn.q_norm.weight, 2.0)
        torch.nn.init.constant_(layer.self_attn.k_norm.weight, 2.0)
    # Muon for the matrices: the same loss in less than half of AdamW's steps here. AdamW for embedding and norms.
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, args.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, args.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(o, args.lr, args.steps, pct_start=0.1, cycle_momentum=False)
        for o in optimizers
    ]
    one = partial(trace, rng, args.guided, args.give_up)
    learn(model, tok, one, rng, optimizers, schedules, args.steps, args.batch, tokens=70)
    model.save_pretrained(args.out)
    tok.save_pretrained(args.out)
    size = sum(f.stat().st_size for f in Path(args.out).iterdir()) / 1e6
    found = skills(TorchActor(model, tok), tasks.load("countdown-tiny"))
    print(f"{model.num_parameters():,} weights, {size:.1f} MB, {stated(found)}: {args.out}")


if __name__ == "__main__":
    main(parse_args(Args))
