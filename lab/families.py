"""English that is not mathematics: who is what to whom in a family, made by reasoning-gym (its family_relationships).

    pip install reasoning-gym==0.1.25; python -m lab.families
    python -m lab.analyze --model runs/smollm --chat --task zebralogic --data runs/families.jsonl --problems 100 \
        --max_tokens 256 --positions 0

Writes the columns of task zebralogic: a story, a question, five relations to choose from, the right one.
"""

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from node.output import write_whole
from node.settings import parse_args

OPTIONS = 5


@dataclass
class Args:
    """Write family puzzles as a file for --data."""

    out: str = HfArg(default="runs/families.jsonl", help="File to write.")
    problems: int = HfArg(default=100, help="How many.")
    seed: int = HfArg(default=0, help="Seed of the puzzles.")


def puzzles(count: int, seed: int) -> list[dict]:
    """The rows. ValueError for none, and when reasoning-gym is not installed."""
    if count < 1:
        raise ValueError(f"--problems {count}: must be 1 or more")
    try:
        import reasoning_gym
    except ImportError as e:
        raise ValueError(f"{e}: pip install reasoning-gym==0.1.25") from e
    made = [*reasoning_gym.create_dataset("family_relationships", size=max(count, 100), seed=seed)]
    relations = sorted({x["answer"] for x in made})
    rows, rng = [], random.Random(seed)
    for x in made[:count]:
        story, _, question = x["question"].strip().partition("\n\n")
        others = rng.sample([r for r in relations if r != x["answer"]], OPTIONS - 1)
        choices = rng.sample([x["answer"], *others], OPTIONS)
        asked = question.strip().partition("?")[0] + "?"  # without how to write the answer, which the task says
        rows.append({"puzzle": story, "question": asked, "choices": choices, "answer": x["answer"]})
    return rows


def main(args: Args) -> None:
    try:
        rows = puzzles(args.problems, args.seed)
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        write_whole(Path(args.out), "".join(json.dumps(row) + "\n" for row in rows))
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    print(f"{len(rows)} puzzles: {args.out}")


if __name__ == "__main__":
    main(parse_args(Args))
