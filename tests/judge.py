"""Our judge of maths answers, next to math-verify used directly and to TRL's accuracy reward, on cases with verdicts.

python -m tests.judge                  the project's own cases; writes lab/results/judge.md
python -m tests.judge --cases MY.jsonl  others, printed only: an object a line with gold, response and right

math-verify directly: both texts are parsed with its default settings, and compared. TRL: trl.rewards.accuracy_reward.
Both get the gold in a box, which both read best. A false refusal is a right answer without a reward, a false acceptance
a wrong answer with one.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import math_verify
from trl.rewards import accuracy_reward

from tasks import verify

CASES = Path("tests/data/answers.jsonl")
RESULTS = Path("lab/results/judge.md")


def ours(golds: list[str], responses: list[str]) -> list[bool]:
    return [bool(verdict) for verdict in verify.verdicts(list(zip(golds, responses)))]


def math_verify_directly(golds: list[str], responses: list[str]) -> list[bool]:
    return [
        math_verify.verify(math_verify.parse(rf"\boxed{{{gold}}}"), math_verify.parse(response))
        for gold, response in zip(golds, responses)
    ]


def trl_accuracy_reward(golds: list[str], responses: list[str]) -> list[bool]:
    completions = [[{"role": "assistant", "content": response}] for response in responses]
    rewards = accuracy_reward(completions, [rf"\boxed{{{gold}}}" for gold in golds])
    return [bool(reward) for reward in rewards]


JUDGES: dict[str, Callable[[list[str], list[str]], list[bool]]] = {
    "this project": ours,
    "math-verify, directly": math_verify_directly,
    "TRL's accuracy_reward": trl_accuracy_reward,
}


def compare(cases: list[dict]) -> str:
    """A Markdown table: each judge's false refusals, false acceptances and their sum."""
    golds, responses = [case["gold"] for case in cases], [case["response"] for case in cases]
    right = sum(case["right"] for case in cases)
    lines = [
        f"| judge | false refusals, of {right} | false acceptances, of {len(cases) - right} | wrong, of {len(cases)} |",
        "|---|---|---|---|",
    ]
    for name, judge in JUDGES.items():
        verdicts = judge(golds, responses)
        refused = sum(case["right"] and not verdict for case, verdict in zip(cases, verdicts))
        accepted = sum(verdict and not case["right"] for case, verdict in zip(cases, verdicts))
        lines.append(f"| {name} | {refused} | {accepted} | {refused + accepted} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", help=f"file of cases to judge (default: {CASES})")
    args = parser.parse_args()
    path = Path(args.cases or CASES)
    table = compare([json.loads(line) for line in path.read_text().splitlines()])
    print(table)
    if not args.cases:
        RESULTS.write_text(
            "# The judge of maths answers, compared\n\n"
            "Made by `python -m tests.judge` on the cases in `tests/data/answers.jsonl`, which we wrote for the\n"
            "rules of `tasks/answers.py`. A test requires that this project is right on all of them. So the\n"
            "table says what the rules add to math-verify, not how often a model needs them.\n\n"
            f"{table}\n"
        )


if __name__ == "__main__":
    main()
