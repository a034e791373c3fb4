"""What every command writes: atomic files, JSON lines, Markdown tables, means with intervals, times to read.

Files are UTF-8 whatever the locale.
"""

import json
import math
import sys
from pathlib import Path

from torch import Tensor


def print_in_any_locale() -> None:
    """Let print() write "?" for what the terminal cannot show, where it would raise: "±" in an ASCII locale, say."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's stream has no such method
            stream.reconfigure(errors="replace")


def in_one_line(e: BaseException) -> str:
    """What an exception says, in one line that is not too long.

    >>> in_one_line(ValueError(" no such layer ")), in_one_line(KeyError("layer"))
    ('no such layer', "KeyError('layer')")
    """
    says_enough = str(e).strip() and not isinstance(e, LookupError)  # a KeyError's text is only the key
    return " ".join((str(e) if says_enough else repr(e)).split())[:250]


def write_whole(path: Path, text: str) -> None:
    """Write to a temporary file, then rename it, so that the file is never half-written."""
    unfinished = path.with_name(path.name + ".new")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def read_lines(file: Path) -> list:
    """The lines of a JSONL file, none if there is no file. A last line that a kill cut short is removed from it."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    if text and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        write_whole(file, text)
    return [json.loads(line) for line in text.splitlines()]


def markdown(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is the head.

    >>> print(markdown([["tokens", "seconds"], ["1,024", "0.5"]]))
    | tokens | seconds |
    |---|---|
    | 1,024 | 0.5 |
    """
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def minutes(seconds: float) -> str:
    """A time to read.

    >>> minutes(291.4)
    '4 min 51 s'
    """
    whole, rest = divmod(round(seconds), 60)
    return f"{whole} min {rest} s"


def mean_interval(per_problem: Tensor) -> tuple[float, float]:
    """Mean over problems and the half-width of its 95 % interval (normal; problems are the independent draws).

    per_problem [P]: each problem's mean reward, or a difference of two such means.

    >>> import torch
    >>> [round(x, 3) for x in mean_interval(torch.tensor([0.0, 1.0, 0.0, 1.0]))]
    [0.5, 0.566]
    """
    if len(per_problem) < 2:
        return per_problem.mean().item(), math.inf
    return per_problem.mean().item(), 1.96 * per_problem.std().item() / math.sqrt(len(per_problem))


def visible(token: str) -> str:
    """A token with its white space and control characters made visible.

    >>> visible(" so\\n"), visible("\\x00")
    ('␣so↵', '\\\\x00')
    """
    shown = token.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in shown)
