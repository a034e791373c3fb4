"""Problems, prompts and the one verifier that gives the reward in training and the score in evaluation.

countdown.py makes its problems and judges them. benchmarks.py fetches public datasets of mathematics and question
answering, which verify.py judges. Imports nothing else of ours.
"""

import random
from dataclasses import dataclass

from tasks import benchmarks, countdown, verify
from tasks.benchmarks import BENCHMARKS, Benchmark
from tasks.countdown import Countdown

TASKS: dict[str, Countdown | Benchmark] = {**countdown.VARIANTS, **BENCHMARKS}


@dataclass(frozen=True)
class Problem:
    """A prompt to complete, the task whose verifier judges the completion, and what that verifier needs."""

    prompt: str
    task: str
    numbers: tuple[int, ...]  # Countdown's; the others have none
    target: int | str  # Countdown's number; the others' right answer, or its letter


def load(name: str, split: str = "test", n: int | None = None, seed: int = 0, data: str | None = None) -> list[Problem]:
    """n distinct problems of a task, the same for the same arguments. data is a local file to read in place of the hub.

    A dataset's problems come in the file's order when n is None, all of them; otherwise seed draws n of them.
    Countdown's are made from seed; None means the task's own number of them.
    Raises ValueError, in one line, for an unknown task or split, naming the choices; for fewer than n problems; and for
    a dataset or file that cannot be read.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: choose one of {', '.join(TASKS)}")
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}: choose train or test")
    if n is not None and n < 0:
        raise ValueError(f"{n} problems of task {name!r}: ask for none or more")
    task, rng = TASKS[name], random.Random(f"{name}/{split}/{seed}")
    if isinstance(task, Countdown):
        if data is not None:
            raise ValueError(f"--data {data}: task {name!r} makes its problems and reads no file")
        made = countdown.make(name, task, split, getattr(task, split) if n is None else n, rng)
        return [Problem(prompt, name, numbers, target) for prompt, numbers, target in made]
    if split not in task.splits:
        others = [t for t, s in TASKS.items() if isinstance(s, Countdown) or split in s.splits]
        raise ValueError(f"task {name!r} has no {split} split; these have one: {', '.join(others)}")
    if task.verifier == "maths":
        verify.check()
    found = [Problem(prompt, name, (), target) for prompt, target in benchmarks.problems(task, split, data)]
    if n is not None and n > len(found):
        raise ValueError(f"task {name!r} has no {n} distinct {split} problems, only {len(found)}")
    return found if n is None else rng.sample(found, n)


def samples(name: str) -> int:
    """How many samples of each problem the task's evaluation takes: 16 makes avg@16.

    >>> samples("aime24"), samples("math500"), samples("countdown")
    (16, 1, 4)
    """
    return TASKS[name].k


def reward(problem: Problem, text: str) -> float:
    r"""1.0 when the response text solves the problem, else 0.0. Never raises; the time is linear in len(text).

    Countdown's answer is the last <answer>…</answer>, the others' the last \boxed{…}.

    >>> reward(Problem("", "countdown", (3, 7, 5), 38), "5*7=35 35+3=38</think><answer>5 * 7 + 3</answer>")
    1.0
    >>> reward(Problem("", "math500", (), r"\frac{1}{2}"), r"It is \boxed{0.5}.")
    1.0
    """
    task = TASKS[problem.task]
    if isinstance(task, Countdown):
        return countdown.judge(problem.numbers, problem.target, text)
    return (verify.maths if task.verifier == "maths" else verify.choice)(problem.target, text)
