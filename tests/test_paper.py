"""The paper's settings: each line of paper.sh, as it stands, is a run that could start and says what the paper says."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from transformers import HfArgumentParser

import train
from node import memory, prepare

ROOT = Path(train.__file__).parent
NAMES = re.findall(r"^([a-z0-9-]+)\) run", (ROOT / "node/paper.sh").read_text(), re.MULTILINE)


def paper_sh(name, folder):
    """What paper.sh hands to torchrun, which here only repeats it."""
    (folder / "torchrun").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    (folder / "torchrun").chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "node/paper.sh"), name, "--seed", "7"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_all_five_are_there():
    assert NAMES == ["countdown", "crossthink", "math-4b-1k", "math-8b-1k", "math-4b-8k"]


@pytest.mark.parametrize("name", NAMES)
def test_the_line_of(name, tmp_path):
    launch, script, flags = paper_sh(name, tmp_path).stdout.partition("train.py\n")
    *options, folder = launch.split("\n")
    assert options == ["--nproc-per-node", "8", "--shutdown-timeout", "900"]
    assert script and Path(folder).resolve() == ROOT, "found from any folder"
    (args,) = HfArgumentParser(train.Args).parse_args_into_dataclasses(flags.splitlines())
    assert args.seed == 7 and not [field for field in train.DEFAULTS if getattr(args, field) is None]
    prepare.check_args(args)
    assert args.prompts * args.group == 512 and args.minibatches == 16 and args.lr == 1e-6
    assert (args.steps, args.max_tokens) == (600 if "8b" in name else 500, 8192 if "8k" in name else 1024)
    assert args.credit == "coupled" and (args.q, args.gamma_amp, args.sign) == (0.4, 1.5, "both")
    size = re.fullmatch(r"Qwen/Qwen3-(\dB)-Base", args.model)[1]
    assert size == ("8B" if "8b" in name else "4B") and args.max_tokens + 200 <= args.max_model_len <= 32_768
    gib = memory.estimate(
        memory.qwen3(size), 8, args.micro_tokens, args.kv_cache_gib, checkpointing=args.gradient_checkpointing
    )
    assert gib["peak, asleep"] < 72 and args.micro_tokens >= args.max_model_len, "it fits eight GPUs of 80 GiB"


def test_an_unknown_name_lists_the_known(tmp_path):
    done = paper_sh("sums", tmp_path)
    assert done.returncode == 2 and all(name in done.stderr for name in NAMES)
