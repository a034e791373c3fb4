"""A task of this repository for verl: its problems as parquet files, and its reward.

    python -m examples.verl_task countdown4 data     writes data/train.parquet and data/test.parquet

verl calls compute_score: reward.custom_reward_function.path=examples/verl_task.py
"""

import json
import sys
from pathlib import Path

import tasks


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info=None, **_) -> float:
    """The reward of a response; data_source is the task's name."""
    return tasks.get(data_source).reward(tasks.Problem("", json.loads(ground_truth)), solution_str)


def write(name: str, folder: str, **sizes: int) -> None:
    """The problems of both splits, a row each. sizes: how many, train=...; default: all, or the task's own number."""
    from datasets import Dataset

    for split in ("train", "test"):
        rows = [
            {
                "data_source": name,
                "prompt": [{"role": "user", "content": problem.prompt}],
                "reward_model": {"style": "rule", "ground_truth": json.dumps(problem.answer)},
                "extra_info": {"index": i},
            }
            for i, problem in enumerate(tasks.load(name, split, sizes.get(split)))
        ]
        Dataset.from_list(rows).to_parquet(Path(folder, f"{split}.parquet"))


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in tasks.TASKS:
        sys.exit(f"usage: python -m examples.verl_task TASK FOLDER, where TASK is one of {', '.join(tasks.TASKS)}")
    write(*sys.argv[1:])
