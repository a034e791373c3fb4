"""Countdown's problems and its verifier, which must survive whatever a model writes."""

import itertools
import random
from fractions import Fraction

import pytest

import tasks
from tasks import Problem, countdown

COUNTDOWN = tasks.get("countdown")


def judge(answer, numbers=(3, 7, 5), target=38):
    return COUNTDOWN.reward(Problem("", (numbers, target)), f"work</think><answer>{answer}</answer>")


@pytest.mark.parametrize("answer", ["5*7+3", " ( 7 * 5 ) + 3 ", "3+(5*7)", "((3))+5*7", "3 + 5×7"])
def test_right_answers(answer):
    assert judge(answer) == 1.0


@pytest.mark.parametrize(
    "answer",
    ["", "38", "5*7+4", "5*7+3+0", "5*7", "5*7+3=38", "5*7+3+3", "5 7*+3", "5*(7+3", "5*7)+3(", "()5*7+3", "5*7+3()",
     "-3+5*7", "+3+5*7", "5*7--3", "57+3", "5**7+3", "5//7+3", "5*7+3.0", "5*7+٣", "5*7+3 or 3", "x", "5*7+3#",
     "0x5*7+3",
     "05*7+3", "5e0*7+3", "5*7+3\x00", "__import__('os')", "5(7)+3", "(5)(7)+3", "5*7+3;1", "³*5*7"],
)  # fmt: skip
def test_wrong_answers(answer):
    assert judge(answer) == 0.0


def test_arithmetic_is_exact():
    assert judge("8/(3-8/3)", (8, 3, 8, 3), 24) == 1.0
    assert judge("1/3*3", (1, 3, 3), 1) == 1.0
    assert judge("7/2", (7, 2), 3) == 0.0
    assert judge("1/(2-2)", (1, 2, 2), 0) == 0.0
    assert judge("9-5-3", (9, 5, 3), 1) == 1.0 and judge("24/4/2", (24, 4, 2), 3) == 1.0, "left to right"
    assert judge("1+2*3", (1, 2, 3), 7) == 1.0


def test_value_equals_python_on_random_expressions():
    rng = random.Random(0)

    def grow(numbers):
        if len(numbers) == 1:
            return str(numbers[0])
        cut = rng.randint(1, len(numbers) - 1)
        inner = f"{grow(numbers[:cut])}{rng.choice('+-*/')}{grow(numbers[cut:])}"
        return f"({inner})" if rng.random() < 0.6 else inner

    compared = 0
    for _ in range(500):
        numbers = tuple(rng.randint(1, 9) for _ in range(rng.randint(1, 5)))
        text = grow(numbers)
        exact = "".join(f"Fraction({c})" if c.isdigit() else c for c in text)
        try:
            want = eval(exact, {"Fraction": Fraction})  # our own text, not a model's
        except ZeroDivisionError:
            want = None
        assert countdown.evaluate(text, numbers) == want, text
        compared += want is not None
    assert compared > 400


@pytest.mark.parametrize(
    "text, want",
    [
        ("", 0.0),
        ("<answer>5*7+3", 0.0),
        ("5*7+3</answer>", 0.0),
        ("</answer>5*7+3<answer>", 0.0),
        ("<answer>1</answer> no, <answer>5*7+3</answer>", 1.0),
        ("<answer>5*7+3</answer> no, <answer>1</answer>", 0.0),
        ("<answer><answer>5*7+3</answer>", 1.0),
        ("<answer>5*7+3</answer></answer>", 0.0),
        ("<answer>5*7+3</answer> and more", 1.0),
    ],
)
def test_which_answer_counts(text, want):
    assert COUNTDOWN.reward(Problem("", ((3, 7, 5), 38)), text) == want


HOSTILE = {
    "nesting": "(" * 10**6 + "5*7+3" + ")" * 10**6,
    "short nesting": "(" * 90 + "5*7+3" + ")" * 90 + "(",
    "ten megabytes": "5*7+3+" * 2 * 10**6,
    "huge number": "9" * 10**6,
    "huge powers": "9**9**9**9**9",
    "code": "[].__class__.__base__.__subclasses__()",
    "surrogates": "\ud800\udfff5*7+3",
    "many tags": "<answer>" * 10**6,
    "many answers": "</answer><answer>5*7+3" * 10**5,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_judged_quickly(name):
    text = HOSTILE[name]
    scores = [judge(text), COUNTDOWN.reward(Problem("", ((3, 7, 5), 38)), text)]
    assert scores == [1.0, 1.0] if name == "many answers" else scores == [0.0, 0.0]


def test_random_junk_never_raises():
    rng = random.Random(0)
    pieces = [*"0123456789+-*/() =×÷\n\t", "<answer>", "</answer>", "٣", "\u202e", "**", "//", "5*7+3"]
    for _ in range(20_000):
        assert judge("".join(rng.choices(pieces, k=rng.randint(0, 30)))) in (0.0, 1.0)


@pytest.mark.parametrize("name", [n for n in tasks.TASKS if n.startswith("countdown")])
def test_problems_are_solvable_disjoint_and_repeatable(name):
    n = 300
    test, train, other = tasks.load(name, "test", n), tasks.load(name, "train", n), tasks.load(name, "train", n, seed=1)
    assert test == tasks.load(name, "test", n) and train != other
    keys = [{(*sorted(p.answer[0]), p.answer[1]) for p in part} for part in (test, train + other)]
    assert len(keys[0]) == n and not keys[0] & keys[1]
    for p in test[:40]:
        numbers, target = p.answer
        assert len(numbers) in tasks.TASKS[name].sizes and 10 <= target <= 99
        assert str(target) in p.prompt and p.prompt.endswith("<think>") and solvable(p)


def solvable(problem):
    """Every way to combine the numbers, as fractions."""
    states = {tuple(sorted(map(Fraction, problem.answer[0])))}
    while any(len(s) > 1 for s in states):
        states = {
            tuple(sorted([*(x for i, x in enumerate(s) if i not in pair), value]))
            for s in states
            for pair in itertools.combinations(range(len(s)), 2)
            for a, b in [(s[pair[0]], s[pair[1]])]
            for value in [a + b, a - b, b - a, a * b, *([a / b] if b else []), *([b / a] if a else [])]
        }
    return (Fraction(problem.answer[1]),) in states


def test_defaults_and_errors():
    assert len(tasks.load("countdown")) == 512 and len(tasks.load("countdown4", "train")) == 20_000
    assert len(tasks.load("countdown-tiny", "train")) == 4_000
    with pytest.raises(ValueError, match=r"unknown task 'maths'.*countdown.*aime24"):
        tasks.load("maths")
    with pytest.raises(ValueError, match="unknown split"):
        tasks.load("countdown", "dev")
    with pytest.raises(ValueError, match="no 50000 distinct"):
        tasks.load("countdown-tiny", "train", 50_000)
    with pytest.raises(ValueError, match=r"some.json: task 'countdown' makes its problems.*gsm8k"):
        tasks.load("countdown", data="some.json")
