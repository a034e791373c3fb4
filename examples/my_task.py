"""A task of your own: problems from a file, and two rewards. Copy this file, change it, and train:

    python train.py --model MODEL --task my_task.py --data my_problems.jsonl

Each line of my_problems.jsonl is one of these:

    {"question": "What is 6 * 7?", "answer": "42"}
    {"question": "Write a function f that squares its argument.", "tests": "assert f(3) == 9"}
"""

import json
import re
import subprocess
import sys
import tempfile
import uuid

from tasks import Problem

SECONDS = 10  # for the code and its tests
stop = ("\nQuestion:",)  # texts that end a response: a base model goes on with a question of its own


def load(split: str, data: str | None = None) -> list[Problem]:
    """The problems of a split, "train" or "test". train.py holds some of --data out, unless --eval_data is given."""
    if data is None:
        raise ValueError("give a file of problems: --data FILE")
    rows = [json.loads(line) for line in open(data, encoding="utf-8")]
    return [Problem(f"Question: {row['question']}\nAnswer:", row) for row in rows]


def reward(problem: Problem, text: str) -> float:
    """1.0 if the last number of the response is the answer, or if its code passes the tests; else 0.0."""
    if "tests" in problem.answer:
        return passes_tests(text, problem.answer["tests"])
    numbers = re.findall(r"-?\d+", text)
    return float(numbers[-1:] == [str(problem.answer["answer"])])


def passes_tests(code: str, tests: str) -> float:
    """1.0 if the code runs, then the tests, within SECONDS. It may do anything: use a container when it matters."""
    passed = uuid.uuid4().hex  # what is printed last, so that exit(0) in the code does not count
    program = f"{code}\n{tests}\nprint('{passed}')"
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", program], cwd=folder, timeout=SECONDS, capture_output=True, text=True,
                start_new_session=True,  # Ctrl-C is the run's to handle: here it would make right code fail
            )  # fmt: skip
        except (subprocess.TimeoutExpired, ValueError, OSError):  # too slow; or it holds a null byte, or is too long
            return 0.0
    return float(done.returncode == 0 and done.stdout.endswith(passed + "\n"))
