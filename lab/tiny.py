"""The embedded default: a character-level Qwen3 of 1.4 million weights that plays Countdown with three small numbers.

    python -m lab.tiny            makes assets/tiny again from nothing

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
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import HfArgumentParser, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.hf_argparser import HfArg

import tasks
from rollout import EMBEDDED, TorchActor
from tasks.countdown import random_expression, split_of

CHARACTERS = "0123456789+-*/()=,>yn \n"
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
MAX_TRIES = 7


@dataclass
class Args:
    """Warm-start the embedded model from nothing."""

    out: str = HfArg(default=EMBEDDED, help="Folder to write the checkpoint to.")
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


def trace(rng: random.Random, guided: float = Args.guided, give_up: float = Args.give_up) -> tuple[str, str]:
    """A training problem's prompt and one search for its solution."""
    spec = tasks.TASKS["countdown-tiny"]
    while True:
        numbers = tuple(rng.randint(1, spec.largest) for _ in range(rng.choice(spec.sizes)))
        solution = random_expression(numbers, rng)
        target = solution[1]
        if 10 <= target <= 99 and split_of(numbers, target) == "train":
            break
    tries = []
    for _ in range(MAX_TRIES):
        one = solution if rng.random() < guided else random_expression(numbers, rng)
        if one in tries:
            continue
        tries.append(one)
        if one[1] == target or rng.random() < give_up:
            break
    think = "\n".join(f"{steps}{'y' if value == target else 'n'}" for steps, value, _ in tries)
    prompt = spec.prompt.format(numbers=" ".join(map(str, numbers)), target=target)
    return prompt, f"{think}</think><answer>{tries[-1][2]}</answer>"


def skills(model, problems: list[tasks.Problem]) -> dict[str, float]:
    """Shares of sampled answers that are right, of results in them that are, and of judgements (y or n) that are."""
    groups = TorchActor(model, tokenizer()).generate([p.prompt for p in problems], n=2, max_tokens=128, progress=True)
    pairs = [(p, r.text) for p, group in zip(problems, groups) for r in group]
    results = [x for _, text in pairs for x in re.findall(r"(\d+)([-+*/])(\d+)=(\d+)", text)]
    judged = [(p.target == int(value), y == "y") for p, text in pairs for value, y in re.findall(r"=(\d+)([ny])", text)]
    worth = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": lambda a, b: a / b if b else None}
    return {
        "success": sum(tasks.reward(p, text) for p, text in pairs) / len(pairs),
        "arithmetic": sum(worth[op](int(a), int(b)) == int(c) for a, op, b, c in results) / max(len(results), 1),
        "judgement": sum(true == said for true, said in judged) / max(len(judged), 1),
    }


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
    bar = tqdm(range(args.steps), desc="warm start")
    for step in bar:
        if step % 16 == 0:  # sixteen batches at a time, sorted by length: little padding
            pool = [
                [tok(s).input_ids for s in trace(rng, guided=args.guided, give_up=args.give_up)]
                for _ in range(16 * args.batch)
            ]
            pool.sort(key=lambda pair: sum(map(len, pair)))
            batches = [pool[i : i + args.batch] for i in range(0, len(pool), args.batch)]
            rng.shuffle(batches)
        rows = [(p + r + [tok.eos_token_id], len(p)) for p, r in batches[step % 16]]
        width = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([ids + [tok.pad_token_id] * (width - len(ids)) for ids, _ in rows])
        t = torch.arange(width)
        labels = ids.masked_fill(
            (t < torch.tensor([[n] for _, n in rows])) | (t >= torch.tensor([[len(ids)] for ids, _ in rows])), -100
        )  # the prompt is noise: only the response is learned
        loss = F.cross_entropy(
            model(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )
        loss = loss / (70 * args.batch)  # not the batch's own tokens: short traces, the lucky ones, would count double
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for both in (*optimizers, *schedules):
            both.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    model.save_pretrained(args.out)
    tok.save_pretrained(args.out)
    size = sum(f.stat().st_size for f in Path(args.out).iterdir()) / 1e6
    shares = ", ".join(f"{k} {100 * v:.1f} %" for k, v in skills(model, tasks.load("countdown-tiny")).items())
    print(f"{model.num_parameters():,} weights, {size:.1f} MB, held-out {shares}: {args.out}")


if __name__ == "__main__":
    main(*HfArgumentParser(Args).parse_args_into_dataclasses())
