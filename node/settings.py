"""Models by name: loading them; default arguments that depend on the model; the command line."""

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    HfArgumentParser,
)
from transformers.utils import cached_file, find_adapter_config_file

from node import ranks
from node.output import in_one_line, print_in_any_locale

# The tiny model, which comes with the code: found from any folder.
TINY = "assets/tiny" if os.path.isdir("assets/tiny") else str(Path(__file__).parents[1] / "assets" / "tiny")
TINY_SHAPE = {"vocab_size": 30, "hidden_size": 96, "num_hidden_layers": 12}
# Files of a model that are looked at before it is loaded
JSON_FILES = ("generation_config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json")

# transformers prints a table of weights that are missing or left over. check_weights says it in one line.
logging.getLogger("transformers.modeling_utils").addFilter(lambda record: "LOAD REPORT" not in record.getMessage())


def load_config(name: str):
    """The transformers config of a folder or hub name, as the passes here need it. ValueError, in one line, if it holds
    no causal language model."""
    folder = Path(name)
    try:
        adapter = find_adapter_config_file(name)
        config = None if adapter else AutoConfig.from_pretrained(name)
    except Exception as e:  # transformers' own, and those of the libraries below it
        if not folder.exists() and folder.parent != Path(".") and folder.parent.is_dir():
            if near := get_close_matches(folder.name, os.listdir(folder.parent), 1, cutoff=0.8):
                raise ValueError(f"no such folder: {name!r}. Did you mean {folder.parent / near[0]}?") from e
        where = "" if os.path.isdir(name) else " (no such folder here, so it was looked up on the hub)"
        raise ValueError(f"cannot load a model from {name!r}{where}: {in_one_line(e)}") from e
    if adapter:
        raise ValueError(
            f"{name!r} holds an adapter (adapter_config.json), and only whole models are read: merge it into its model "
            "(peft's merge_and_unload), or remove its files"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{name!r}: transformers has no causal language model of the type {config.model_type!r}")
    for part in (config, config.get_text_config()):
        _reset_passes(part)
    return config


def _reset_passes(config) -> None:
    """Reset what a config says about passes, not about the model: dropout, kernels, outputs.

    Dropout is switched off by its rates: with --gradient_checkpointing the layers are in training mode.
    """
    for field, value in config.to_dict().items():
        if "drop" in field and isinstance(value, float):
            setattr(config, field, 0.0)
    config.return_dict, config.output_attentions, config.output_hidden_states = True, False, False
    config._attn_implementation = None  # transformers' choice, because another may not be installed
    rows = getattr(config, "vocab_size", None)
    if rows and config.pad_token_id is not None and not 0 <= config.pad_token_id < rows:
        config.pad_token_id = None  # nobody reads padding, so any token will do


def load_model(name: str, device: str | None = None):
    """The transformers model (float32; default: on the GPU if there is one) and tokenizer of a folder or hub name.

    ValueError, in one line, if its files are damaged, lack weights, or do not fit each other.
    """
    config, tokenizer = load_config(name), load_tokenizer(name)
    check_not_quantized(name, config)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as e:  # transformers' own, and those of the libraries below it
        raise ValueError(f"cannot load the weights of {name!r}: {in_one_line(e)}") from e
    check_shapes(name, {weight: shapes for weight, *shapes in found["mismatched_keys"]})
    check_weights(name, model, found["missing_keys"], found["unexpected_keys"])
    keep_soft_caps(model)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device), tokenizer


def keep_soft_caps(model) -> None:
    """Let a model that caps its attention scores (Gemma 2) do so. transformers' default, sdpa, leaves the caps out."""
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")


def check_not_quantized(name: str, config) -> None:
    """ValueError for quantized weights, because they cannot be trained."""
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"{name!r} is quantized (quantization_config in config.json), and such weights cannot be trained: give the "
            "model that it was made from"
        )


def check_shapes(name: str, shapes: dict[str, tuple[Sequence[int], Sequence[int]]]) -> None:
    """ValueError, which names it, for a weight whose shape in the files is not the model's: (stored, expected)."""
    for weight, (stored, expected) in shapes.items():
        if list(stored) != list(expected):
            raise ValueError(f"{name!r}: {weight} is {list(stored)} in the files, but {list(expected)} by config.json")


def check_weights(name: str, model, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """ValueError, which names one, if weights are missing in the files, or not finite. Others are only said.

    Of sharded weights, this rank's part is looked at.
    """
    missing, unexpected = sorted(missing), sorted(unexpected)
    if missing:
        hint = f" (and hold {unexpected[0]}, which is none of them)" if unexpected else ""
        raise ValueError(
            f"the files of {name!r} lack {len(missing)} of the model's weights, for example {missing[0]}{hint}"
        )
    for weight, p in model.named_parameters():
        part = p.to_local() if isinstance(p, DTensor) else p
        if not part.isfinite().all():
            raise ValueError(f"{name!r}: {weight} holds numbers that are not finite (NaN or infinity)")
    if unexpected:
        ranks.print_once(f"{name}: the files also hold {', '.join(unexpected[:3])}: not part of the model, left out")


def check_files(name: str) -> None:
    """ValueError, which names the file, if one of a model's files was not copied whole."""
    folder = Path(cached_file(name, "config.json")).parent  # of a hub name, what is in the cache
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".json", ".safetensors", ".bin", ".model") or not path.is_file():
            continue
        with path.open("rb") as file:
            if file.read(40).startswith(b"version https://git-lfs"):
                raise ValueError(f"{path} is a Git LFS pointer, not the file itself: run git lfs pull there")
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):  # reads the header, and compares the file's size with it
                    pass
            elif path.name in JSON_FILES:
                json.loads(path.read_bytes())
        except (SafetensorError, ValueError) as e:
            raise ValueError(f"{path} is damaged ({in_one_line(e)}): copy it again") from e


def check_length(name: str, config, tokens: int, argument: str) -> None:
    """ValueError, which names the argument, if `tokens` exceeds the model's maximum length."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", tokens)
    if tokens > longest:
        raise ValueError(f"{argument}: that takes {tokens} tokens, and {name} reads {longest} tokens at most")


def load_tokenizer(name: str, max_model_len: int | None = None):
    """The tokenizer of a folder or hub name. ValueError, in one line, if it does not fit the model, or the model reads
    less than max_model_len."""
    config = load_config(name)
    if max_model_len is not None:
        check_length(name, config, max_model_len, f"--max_model_len {max_model_len}")
    check_files(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as e:  # transformers' own, and those of the libraries below it
        raise ValueError(f"cannot load a tokenizer from {name!r}: {in_one_line(e)}") from e
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError(f"there is no tokenizer in {name!r}: copy its files (tokenizer.json, ...) into the folder")

    # Each token needs a row of the model's embedding. Padding needs none, because nobody reads it; and special tokens
    # may stand for images, which no text has (Gemma 3 of 1B): check_rows refuses a prompt that has one.
    rows = config.get_text_config().vocab_size
    marks = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token}
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} - marks
    needless = special | {tokenizer.pad_token}
    homeless = [token for token, i in tokenizer.get_vocab().items() if i >= rows and token not in needless]
    if homeless:
        raise ValueError(
            f"the tokenizer of {name!r} has {len(tokenizer)} tokens and the model's embedding {rows}: they do "
            f"not belong together ({min(homeless)!r} has no row)"
        )

    # What the tokenizer adds to a text: nothing at its end, because a response goes on there.
    text, with_marks = (tokenizer("1", add_special_tokens=add).input_ids for add in (False, True))
    before = with_marks[: len(with_marks) - len(text)]
    if before + text != with_marks:
        raise ValueError(
            f"the tokenizer of {name!r} appends {tokenizer.decode(with_marks[-1:])!r} to each text, but a response "
            "should go on from there: set add_eos_token to false in tokenizer_config.json, or take it out of "
            "post_processor in tokenizer.json"
        )
    check_one_start(tokenizer, [before])
    if not end_tokens(tokenizer, config, load_generation_config(name)):
        raise ValueError(
            f"{name!r} has no end-of-text token, neither in its tokenizer nor in generation_config.json, so no "
            "response would end: set eos_token_id there"
        )
    return tokenizer


def check_rows(tokenizer, prompts: list[list[int]]) -> None:
    """ValueError if a prompt, given as token numbers, has a token without a row of the model's embedding."""
    name = tokenizer.name_or_path
    rows = load_config(name).get_text_config().vocab_size
    for ids in prompts:
        if ids and max(ids) >= rows:
            raise ValueError(
                f"a prompt has the token {tokenizer.decode([max(ids)])!r}, for which {name} has no row in its "
                f"embedding: take it out of the text: {tokenizer.decode(ids)[:80]!r}"
            )


def check_one_start(tokenizer, prompts: list[list[int]]) -> None:
    """ValueError if a prompt, given as token numbers, has the start-of-text token twice."""
    start = tokenizer.bos_token_id
    for ids in prompts:
        if start is not None and ids[:2] == [start, start]:
            raise ValueError(
                f"a prompt starts with {tokenizer.bos_token} twice: take it out of the text, of the chat template, or "
                f"of post_processor in the tokenizer.json of {tokenizer.name_or_path}: {tokenizer.decode(ids)[:80]!r}"
            )


def load_generation_config(name: str) -> GenerationConfig | None:
    """What generation_config.json in a folder or hub name says. None if there is none, which is no error."""
    try:
        return GenerationConfig.from_pretrained(name)
    except OSError:
        return None
    except Exception as e:  # of any kind: for an unknown value, or for a list in place of an object
        raise ValueError(f"{name}, generation_config.json: {in_one_line(e)}") from e


def end_tokens(tokenizer, config, generation_config: GenerationConfig | None) -> list[int]:
    """The tokens that end a text by the tokenizer, the model's config or its generation config, sorted.

    Both samplers end a response with any of them. ValueError for one that is not a number.
    """
    config, ends = config.get_text_config(), set()
    for file, owner in (
        ("tokenizer_config.json", tokenizer), ("config.json", config), ("generation_config.json", generation_config)
    ):  # fmt: skip
        given = getattr(owner, "eos_token_id", None)
        if given is None:
            continue
        for end in given if isinstance(given, list) else [given]:
            if not isinstance(end, int):
                raise ValueError(
                    f"{tokenizer.name_or_path}, {file}: eos_token_id {given!r}: must be a number or a list of numbers"
                )
            ends.add(end)
    return sorted(end for end in ends if 0 <= end < config.vocab_size)  # no other number is ever sampled


def explain_start(e: Exception, name: str, max_model_len: int, kv_cache_gib: float) -> str:
    """Why vLLM does not start, in one line and in terms of our own arguments."""
    text = in_one_line(e)
    needed = re.search(r"\(([\d.]+) GiB KV cache is needed", text)
    if needed or "memory for the cache blocks" in text:
        advice = f": give {float(needed[1]) + 0.01:.2f} or more" if needed else ""  # vLLM has rounded it
        return f"--kv_cache_gib {kv_cache_gib:g} is too small for a sequence of --max_model_len {max_model_len}{advice}"
    if "--kv-cache-memory-bytes" in text or "VLLM_CPU_KVCACHE_SPACE" in text:
        return f"--kv_cache_gib {kv_cache_gib:g} is too large for this machine's memory: lower it (vLLM says: {text})"
    return f"vLLM does not start with {name!r}: {type(e).__name__}: {text}"


def is_tiny(name: str) -> bool:
    """Whether a checkpoint is the tiny model, or has its shape because it was trained from it."""
    config = load_config(name).get_text_config()
    return all(getattr(config, field, None) == size for field, size in TINY_SHAPE.items())


def fill_defaults(args, defaults: dict[str, tuple], *models: str):
    """A copy of args in which the fields that are None have their defaults, and a line that lists these defaults.

    defaults gives for a field the value for the tiny model, then the one for any other model.
    """
    tiny = all(is_tiny(name) for name in models)
    left_open = {name: pair for name, pair in defaults.items() if getattr(args, name) is None}
    filled = {name: pair[0] if tiny else pair[1] for name, pair in left_open.items()}
    kind = "the tiny model" if tiny else "a real model"
    listed = " ".join(f"--{name} {value}" for name, value in filled.items())
    return replace(args, **filled), f"defaults for {kind}: {listed or 'none was needed'}"


class HelpFormatter(argparse.HelpFormatter):
    """--help that shows each option once, and its default unless the option's own text names it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if default is None or default is False or default == argparse.SUPPRESS:
            return action.help
        if isinstance(default, list):
            default = " ".join(map(str, default))
        return f"{action.help.rstrip('.')} (default: {default})."

    def _format_action_invocation(self, action: argparse.Action) -> str:
        name = action.option_strings[-1] if action.dest == "help" else action.option_strings[0]  # no second spelling
        takes_no_value = action.nargs == 0 or isinstance(action.default, bool)
        return name if takes_no_value else f"{name} {self._format_args(action, action.dest.upper())}"


def parse_args(*arguments: type):
    """The command line as instances of these dataclasses: one instance for one class, else a tuple of them."""
    print_in_any_locale()
    parser = HfArgumentParser(
        arguments, description=arguments[0].__doc__, usage="%(prog)s [options]", formatter_class=HelpFormatter
    )
    *parsed, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings]
        near = get_close_matches(unknown[0], options, n=1)
        hint = f": did you mean {near[0]}?" if near else " (--help lists all options)"
        sys.exit(f"error: unknown argument {unknown[0]}{hint}")
    return parsed[0] if len(arguments) == 1 else tuple(parsed)
