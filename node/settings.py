"""Models by name: loading them; default arguments that depend on the model; the command line."""

import argparse
import os
import sys
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, HfArgumentParser

from node.output import print_in_any_locale

# The tiny model, which comes with the code: found from any folder.
TINY = "assets/tiny" if os.path.isdir("assets/tiny") else str(Path(__file__).parents[1] / "assets" / "tiny")
TINY_SHAPE = {"vocab_size": 30, "hidden_size": 96, "num_hidden_layers": 12}


def load_config(name: str):
    """The transformers config of a folder or hub name. ValueError, in one line, when it holds no model."""
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as e:
        where = "" if os.path.isdir(name) else " (no such folder here, so it was looked up on the hub)"
        raise ValueError(f"cannot load a model from {name!r}{where}: {str(e).splitlines()[0]}") from e


def load_model(name: str, device: str | None = None):
    """The transformers model (float32; default: on the GPU if there is one) and tokenizer of a folder or hub name."""
    load_config(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    keep_soft_caps(model)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device), AutoTokenizer.from_pretrained(name)


def keep_soft_caps(model) -> None:
    """Let a model that caps its attention scores (Gemma 2) do so. transformers' default, sdpa, leaves the caps out."""
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")


def check_length(name: str, config, tokens: int, argument: str) -> None:
    """ValueError, which names the argument, if `tokens` exceeds the model's maximum length."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", tokens)
    if tokens > longest:
        raise ValueError(f"{argument}: that takes {tokens} tokens, and {name} reads {longest} tokens at most")


def load_tokenizer(name: str, max_model_len: int):
    """The tokenizer of a folder or hub name. ValueError, in one line, if it does not fit the model, or the model reads
    too little."""
    config = load_config(name)
    check_length(name, config, max_model_len, f"--max_model_len {max_model_len}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as e:  # transformers' own, and those of the libraries below it
        raise ValueError(f"cannot load a tokenizer from {name!r}: {(str(e).strip() or repr(e)).splitlines()[0]}") from e
    vocabulary = config.get_text_config().vocab_size
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError(f"there is no tokenizer in {name!r}: copy its files (tokenizer.json, ...) into the folder")
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"the tokenizer of {name!r} has {len(tokenizer)} tokens and the model's embedding {vocabulary}: they do "
            "not belong together"
        )
    if not end_tokens(name, config, tokenizer):
        raise ValueError(
            f"{name!r} has no end-of-text token, neither in its tokenizer nor in generation_config.json, so no "
            "response would end: set eos_token_id there"
        )
    return tokenizer


def end_tokens(name: str, config, tokenizer) -> set[int]:
    """The tokens that end a text, as the tokenizer, the model's configuration and its generation configuration say."""
    ends = [tokenizer.eos_token_id, config.get_text_config().eos_token_id]
    try:
        ends.append(GenerationConfig.from_pretrained(name).eos_token_id)
    except OSError:  # a model need not have one
        pass
    return {end for each in ends for end in (each if isinstance(each, list) else [each]) if end is not None}


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
