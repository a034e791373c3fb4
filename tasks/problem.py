"""What a task is: problems, and a function that judges a response. See examples/my_task.py for one of yours."""

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Problem:
    """A prompt to complete, and whatever its task's reward needs to judge the response."""

    prompt: str
    answer: Any = None


class Task(Protocol):
    """A Python file with these two functions is a task. The built-in tasks are objects with the same two.

    Optional attributes: samples, how many responses an evaluation takes of each problem (default: 1); and stop, texts
    that end a response where they begin (default: none).
    """

    def load(self, split: str, data: str | None = None) -> list[Problem]:
        """The problems of a split, "train" or "test". data: the file given by --data or --eval_data."""

    def reward(self, problem: Problem, text: str) -> float:
        """The reward of a response: 1 for right and 0 for wrong, or anything between."""
