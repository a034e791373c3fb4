"""The paper's settings: each line of paper.sh is a run that could start."""

import os
import re
import subprocess
from pathlib import Path

import pytest

import config

ROOT = Path(config.__file__).parent
NAMES = re.findall(r"^([a-z0-9-]+)\) node", (ROOT / "paper.sh").read_text(), re.MULTILINE)
DATA = {"crossthink": "crossthink-qa", "math": "math"}


def test_all_five_are_there():
    assert NAMES == ["countdown", "crossthink", "math-4b-1k", "math-8b-1k", "math-4b-8k"]


@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_of(name, tmp_path):
    """Its own flags, but for the model, which is on the hub, and what the small one and the small files allow."""
    torchrun = tmp_path / "torchrun"  # takes the command that torchrun would start eight times, and starts it once
    torchrun.write_text('#!/bin/sh\nshift 4; exec "$PYTHON" "$@"\n')
    torchrun.chmod(0o755)
    extra = ["--dry_run", "--model", "assets/tiny", "--context", "500", "--max_tokens", "16", "--prompts", "2"]
    data = DATA.get(name.split("-")[0])
    if data:
        extra += ["--data", f"tests/data/{data}.jsonl", "--eval_data", f"tests/data/{data}.jsonl"]
        extra += ["--eval_data", "tests/data/math500.jsonl"] if data == "math" else []
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": os.sys.executable}
    done = subprocess.run(["bash", "paper.sh", name, *extra], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps = "600" if "8b" in name else "500"
    assert f"{steps} steps of 2 problems x 8 responses" in done.stdout and "16 updates each" in done.stdout
    assert "learning rate 1e-06" in done.stdout and "nothing was started" in done.stdout


def test_an_unknown_name_lists_the_known():
    done = subprocess.run(["bash", "paper.sh", "sums"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and all(name in done.stderr for name in NAMES)
