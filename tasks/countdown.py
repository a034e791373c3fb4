"""Countdown (Pan et al. 2025, "TinyZero"): combine the numbers with + - * /, each exactly once, to reach the target.

Problems are made, not fetched: the same name, split, n and seed give the same list on every machine. Each is solvable,
because its target is the value of a random expression over its numbers, and a problem's split is a hash of the problem
itself, so no training problem, of whatever seed, is ever a test problem.
"""

import ast
import operator
import random
import re
import zlib
from dataclasses import dataclass
from fractions import Fraction

from tasks.problem import Problem

LANGUAGE_PROMPT = (
    "Use the numbers {numbers} and the operations + - * / to make {target}. Use every number exactly once; "
    "parentheses are allowed. Work it out inside <think> </think>, then give only the final expression inside "
    "<answer> </answer>, for example <answer>(1 + 2) / 3</answer>.\n<think>"
)
TINY_PROMPT = "{numbers}>{target}\n<think>"
WORDS_PROMPT = "Use the numbers {numbers} and + - * / to make {target}.\n<think>"
LONGEST = 200  # characters of an answer; a longer one is wrong


@dataclass(frozen=True)
class Countdown:
    """A task. What a variant draws from: how many numbers, the largest of them, the prompt, the sizes of its splits."""

    name: str
    sizes: tuple[int, ...]
    largest: int
    prompt: str
    train: int = 20_000
    test: int = 512
    samples: int = 4  # that its evaluation takes of each problem

    def load(
        self, split: str, data: str | None = None, n: int | None = None, rng: random.Random | None = None
    ) -> list[Problem]:
        """n problems of a split, made with rng (default: the task's own number, seed 0). answer: (numbers, target)."""
        if data is not None:
            raise ValueError(f"{data}: task {self.name!r} makes its problems and reads no file. {FILES}")
        rng = rng or random.Random(f"{self.name}/{split}/0")
        made = make(self.name, self, split, getattr(self, split) if n is None else n, rng)
        return [Problem(prompt, (numbers, target)) for prompt, numbers, target in made]

    def reward(self, problem: Problem, text: str) -> float:
        """1.0 if the response's answer is right, else 0.0."""
        return judge(*problem.answer, text)


# The tasks that read files, for the message.
FILES = "Tasks that do: gsm8k, math and other datasets (README: Your own problems), or a Python file of yours"

VARIANTS = {
    task.name: task
    for task in (
        Countdown("countdown", (3, 4), 99, LANGUAGE_PROMPT),  # Pan et al.'s 3-to-4
        Countdown("countdown4", (4,), 99, LANGUAGE_PROMPT),  # arXiv 2510.13554's
        Countdown("countdown-tiny", (3,), 15, TINY_PROMPT, train=4_000),  # the tiny model's; 5,154 exist
        Countdown("countdown-words", (3,), 12, WORDS_PROMPT, train=2_400, test=384),  # assets/smollm.py's; 3,269 exist
        Countdown("countdown-tiny18", (3,), 18, TINY_PROMPT, train=4_000),  # harder; of 2 or 4 numbers it solves none
    )
}


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


def make(name: str, variant: Countdown, split: str, n: int, rng: random.Random) -> list[tuple]:
    """(prompt, numbers, target) of n distinct problems of a split; ValueError when there are not so many.

    Those that many expressions reach, the easy ones, turn up first. So the task's own number is made whatever n is, and
    shuffled: fewer problems are as hard as all.
    """
    found, idle = {}, 0
    while len(found) < max(n, getattr(variant, split)):
        numbers = tuple(rng.randint(1, variant.largest) for _ in range(rng.choice(variant.sizes)))
        target = random_expression(numbers, rng)[1]
        key = (*sorted(numbers), target)
        if 10 <= target <= 99 and split_of(numbers, target) == split and key not in found:
            prompt = variant.prompt.format(numbers=" ".join(map(str, numbers)), target=target)
            found[key], idle = (prompt, numbers, target), 0
        elif (idle := idle + 1) > 20_000:
            raise ValueError(f"task {name!r} has no {n} distinct {split} problems, only about {len(found)}")
    return rng.sample(list(found.values()), n)


def judge(numbers: tuple[int, ...], target: int, text: str) -> float:
    """1.0 when the last <answer>…</answer> of text is an expression over the numbers that equals the target, else 0.0.

    >>> judge((3, 7, 5), 38, "35+3=38</think><answer>5 * 7 + 3</answer>"), judge((3, 7, 5), 38, "<answer>38</answer>")
    (1.0, 0.0)
    """
    before, closed, _ = text.rpartition("</answer>")
    _, opened, answer = before.rpartition("<answer>")
    if not (opened and closed) or len(answer) > LONGEST:
        return 0.0
    return float(evaluate(answer, numbers) == target)


OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def evaluate(expression: str, numbers: tuple[int, ...]) -> Fraction | None:
    """The exact value of an expression that uses each of the numbers exactly once; None for anything else.

    Python's parser reads it, nothing is run. Of its tree only whole numbers and + - * / are allowed, so there is no
    sign, no power and no call. Numbers are compared as text before anything is parsed. × ÷ − count as * / -.

    >>> evaluate("(1 + 2) / 4", (1, 2, 4)), evaluate("2**9", (2, 9)), evaluate("1/(2-2)", (1, 2, 2))
    (Fraction(3, 4), None, None)
    """
    expression = expression.translate(str.maketrans("×÷−", "*/-"))
    if len(expression) > LONGEST or not re.fullmatch(r"[0-9+*/()\s-]*", expression, re.ASCII):
        return None
    if sorted(re.findall("[0-9]+", expression)) != sorted(map(str, numbers)):
        return None

    def value(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
            return OPERATIONS[type(node.op)](value(node.left), value(node.right))
        raise SyntaxError(f"{type(node).__name__} is not allowed")

    try:
        return value(ast.parse(" ".join(expression.split()), mode="eval").body)
    except (SyntaxError, ZeroDivisionError):
        return None
