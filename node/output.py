"""What every command writes: files that are whole or not there or grow by lines, Markdown tables, times to read."""

import json
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """The text under another name, then in place of what was there: whoever stops us, one of the two is whole."""
    unfinished = path.with_name(path.name + ".new")
    unfinished.write_text(text)
    unfinished.replace(path)


def read_lines(file: Path) -> list:
    """The whole lines of a JSONL file, none if it is not there; one that a kill cut short is taken away from it."""
    text = file.read_text() if file.exists() else ""
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
