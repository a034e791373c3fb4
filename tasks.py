"""Problems, prompts and the one verifier that gives the reward in training and the score in evaluation.

Mathematics and question answering come from public datasets, which benchmarks.py fetches and verify.py judges.

Countdown (Pan et al. 2025, "TinyZero"): combine the given numbers with + - * /, each exactly once, to reach the target.
Problems are made, not fetched: the same name, split, n and seed give the same list on every machine. Each is solvable,
because its target is the value of a random expression over its numbers, and a problem's split is a hash of the problem
itself, so no training problem, of whatever seed, is ever a test problem.
"""

import random
import re
import zlib
from dataclasses import dataclass
from fractions import Fraction

import benchmarks
import verify
from benchmarks import BENCHMARKS, Benchmark

LANGUAGE_PROMPT = (
    "Use the numbers {numbers} and the operations + - * / to make {target}. Use every number exactly once; "
    "parentheses are allowed. Work it out inside <think> </think>, then give only the final expression inside "
    "<answer> </answer>, for example <answer>(1 + 2) / 3</answer>.\n<think>"
)
TINY_PROMPT = "{numbers}>{target}\n<think>"


@dataclass(frozen=True)
class Countdown:
    """What a variant draws from: how many numbers, the largest of them, the prompt, the sizes of its splits.

    k is the number of samples that its evaluation takes of each problem.
    """

    sizes: tuple[int, ...]
    largest: int
    prompt: str
    train: int = 20_000
    test: int = 512
    k: int = 4


TASKS: dict[str, Countdown | Benchmark] = {
    "countdown": Countdown((3, 4), 99, LANGUAGE_PROMPT),  # Pan et al.'s 3-to-4
    "countdown4": Countdown((4,), 99, LANGUAGE_PROMPT),  # arXiv 2510.13554's
    "countdown-tiny": Countdown((3,), 15, TINY_PROMPT, train=4_000),  # the embedded model's; 5,154 exist
    "countdown-tiny18": Countdown((3,), 18, TINY_PROMPT, train=4_000),  # harder; of 2 or 4 numbers it solves none
    **BENCHMARKS,
}


@dataclass(frozen=True)
class Problem:
    """A prompt to complete, the task whose verifier judges the completion, and what that verifier needs."""

    prompt: str
    task: str
    numbers: tuple[int, ...]  # Countdown's; the others have none
    target: int | str  # Countdown's number; the others' right answer, or its letter


def random_expression(numbers: tuple[int, ...], rng: random.Random) -> tuple[str, int, str]:
    """Combine numbers two by two, at random, until one is left; every value on the way is a whole number from 0 to 999.

    Returns (steps, value, expression): the combinations in the order made, the result, and the whole as one expression.

    >>> random_expression((3, 7, 5), random.Random(1))
    ('5-3=2,7-2=5', 5, '7-(5-3)')
    """
    terms, steps = [(n, str(n)) for n in numbers], []
    while len(terms) > 1:
        (a, x), (b, y) = sorted(rng.sample(terms, 2), reverse=True)  # larger first: differences are never negative
        op = rng.choice("+-*/" if b > 1 and a % b == 0 else "+-*")
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if op == "/" else 0}[op]
        if value > 999:
            continue
        terms.remove((a, x))
        terms.remove((b, y))
        x, y = (f"({t})" if not t.isdecimal() else t for t in (x, y))
        terms.append((value, f"{x}{op}{y}"))
        steps.append(f"{a}{op}{b}={value}")
    return ",".join(steps), *terms[0]


def split_of(numbers: tuple[int, ...], target: int) -> str:
    """'train' or 'test' (one in eight): a hash of the problem, whatever the order of its numbers."""
    return "train" if zlib.crc32(f"{sorted(numbers)}>{target}".encode()) % 8 else "test"


def load(name: str, split: str = "test", n: int | None = None, seed: int = 0, data: str | None = None) -> list[Problem]:
    """n distinct problems of a task, the same for the same arguments. data is a local file to read in place of the hub.

    A dataset's problems come in the file's order when n is None, all of them; otherwise seed draws n of them.
    Countdown's are made from seed; None stands for the task's own number.
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
        return make(name, task, split, getattr(task, split) if n is None else n, rng)
    if split not in task.splits:
        others = [t for t, s in TASKS.items() if isinstance(s, Countdown) or split in s.splits]
        raise ValueError(f"task {name!r} has no {split} split; these have one: {', '.join(others)}")
    if task.verifier == "maths":
        verify.check()
    found = [Problem(prompt, name, (), target) for prompt, target in benchmarks.problems(task, split, data)]
    if n is not None and n > len(found):
        raise ValueError(f"task {name!r} has no {n} distinct {split} problems, only {len(found)}")
    return found if n is None else rng.sample(found, n)


def make(name: str, task: Countdown, split: str, n: int, rng: random.Random) -> list[Problem]:
    """n distinct Countdown problems of a split; ValueError when there are not so many.

    Those that many expressions reach, the easy ones, turn up first. So the task's own number is made whatever n is, and
    shuffled: fewer problems are as hard as all.
    """
    found, idle = {}, 0
    while len(found) < max(n, getattr(task, split)):
        numbers = tuple(rng.randint(1, task.largest) for _ in range(rng.choice(task.sizes)))
        target = random_expression(numbers, rng)[1]
        key = (*sorted(numbers), target)
        if 10 <= target <= 99 and split_of(numbers, target) == split and key not in found:
            prompt = task.prompt.format(numbers=" ".join(map(str, numbers)), target=target)
            found[key], idle = Problem(prompt, name, numbers, target), 0
        elif (idle := idle + 1) > 20_000:
            raise ValueError(f"task {name!r} has no {n} distinct {split} problems, only about {len(found)}")
    return rng.sample(list(found.values()), n)


def samples(name: str) -> int:
    """How many samples of each problem the task's evaluation takes: 16 makes avg@16.

    >>> samples("aime24"), samples("math500"), samples("countdown")
    (16, 1, 4)
    """
    return TASKS[name].k


def reward(problem: Problem, text: str) -> float:
    r"""1.0 when the response text solves the problem, else 0.0. Never raises; the time is linear in len(text).

    Countdown's answer is the last <answer>…</answer>, the others' the last \boxed{…}.

    >>> p = Problem("", "countdown", (3, 7, 5), 38)
    >>> reward(p, "5*7=35 35+3=38</think><answer>5 * 7 + 3</answer>"), reward(p, "<answer>38</answer>")
    (1.0, 0.0)
    >>> reward(Problem("", "math500", (), r"\frac{1}{2}"), r"It is \boxed{0.5}.")
    1.0
    """
    task = TASKS[problem.task]
    if isinstance(task, Benchmark):
        return (verify.maths if task.verifier == "maths" else verify.choice)(problem.target, text)
    head, closed, _ = text.rpartition("</answer>")
    _, opened, answer = head.rpartition("<answer>")
    if not (opened and closed) or len(answer) > 200:
        return 0.0
    return float(evaluate(answer, problem.numbers) == problem.target)


PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}


def evaluate(expression: str, numbers: tuple[int, ...]) -> Fraction | None:
    """The exact value of an infix expression that uses each of the numbers exactly once; None for anything else.

    Two stacks (shunting-yard), so nesting costs no recursion; no eval; the numbers are compared as text before any is
    converted. There is no unary sign and no power. × ÷ − count as * / -.

    >>> evaluate("(1 + 2) / 4", (1, 2, 4)), evaluate("2**9", (2, 9)), evaluate("1/(2-2)", (1, 2, 2))
    (Fraction(3, 4), None, None)
    """
    expression = expression.translate(str.maketrans("×÷−", "*/-"))
    tokens = re.findall(r"[0-9]+|\S", expression, re.ASCII)
    if sorted(t for t in tokens if t[0] in "0123456789") != sorted(map(str, numbers)):
        return None
    values, pending, operand_next = [], [], True

    def apply() -> bool:
        op, b, a = pending.pop(), values.pop(), values.pop()
        if op == "/" and b == 0:
            return False
        values.append(a + b if op == "+" else a - b if op == "-" else a * b if op == "*" else a / b)
        return True

    for token in tokens:
        if operand_next != (token == "(" or token[0] in "0123456789"):
            return None
        if token == "(":
            pending.append(token)
        elif token == ")":
            while pending and pending[-1] != "(":
                if not apply():
                    return None
            if not pending:
                return None
            pending.pop()
        elif token in PRECEDENCE:
            while pending and PRECEDENCE.get(pending[-1], 0) >= PRECEDENCE[token]:
                if not apply():
                    return None
            pending.append(token)
            operand_next = True
        elif operand_next:
            values.append(Fraction(int(token)))
            operand_next = False
        else:
            return None
    while pending:
        if operand_next or pending[-1] == "(" or not apply():
            return None
    return None if operand_next else values[0]
