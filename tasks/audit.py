"""Which answers of a dataset the judge cannot read, or would refuse as its own: all of them, a line each.

python -m tasks.audit minerva
python -m tasks.audit gsm8k --data mine.jsonl
"""

import argparse
import sys

import tasks
from tasks import verify
from tasks.answers import expressions


def audit(name: str, data: str | None = None, split: str | None = None) -> list[str]:
    """A line for each answer of a maths dataset that only the same text matches, or that not even that matches.

    split: the dataset's first one if None. Raises ValueError, in one line, for what cannot be loaded or judged so.
    """
    task = tasks.get(name)
    if getattr(task, "verifier", None) != "maths":
        raise ValueError(f"{name}: only datasets of mathematics have answers to audit")
    problems = tasks.load(name, split or next(iter(task.splits)), data=data)
    golds = list(dict.fromkeys(problem.answer for problem in problems))
    lines = []
    for gold in verify.unreadable(golds):
        lines.append(f"cannot be read: {gold}" + f"  (asked about: {'; '.join(expressions(gold))})")
    own = verify.verdicts([(gold, rf"\boxed{{{gold.partition(' within ')[0]}}}") for gold in golds])
    lines += [f"refuses its own text: {gold}" for gold, is_right in zip(golds, own) if not is_right]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="a dataset of mathematics")
    parser.add_argument("--data", help="local file to read in place of the dataset")
    parser.add_argument("--split", choices=("train", "test"), help="default: the dataset's first one")
    args = parser.parse_args()
    try:
        lines = audit(args.name, args.data, args.split)
    except ValueError as e:
        sys.exit(f"error: {e}")
    print("\n".join([*lines, f"{args.name}: {len(lines)} answers that the judge cannot read or refuses"]))


if __name__ == "__main__":
    main()
