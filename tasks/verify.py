r"""Is the answer in the last \boxed{...} of a response right? Never raises, never hangs, whatever the response says.

boxes.py finds the answer, and the rules of answers.py settle most. The rest go to math-verify, which knows that
(x+1)^2 is x^2+2x+1. But math-verify uses sympy, which starts to compute 10^{10^{10}} if it is asked to. Its own
timeouts are alarms: only a main thread can set them, and an operation on big numbers does not react to them. So
math-verify runs in processes of its own (worker.py), with limited memory and computing time. The kernel ends a worker
if an answer takes too long, and then another is started.

The judge is six files, which import nothing else of ours: boxes.py, spelling.py, lists.py, answers.py, this one and
worker.py.

A verdict is True, False, or None: the judge failed, not the answer. None counts as 0, and tasks.judge counts it.
"""

import atexit
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

from tasks.answers import expressions, is_right
from tasks.boxes import find

DEADLINE = 5.0  # seconds of computing that math-verify may spend on one answer
START = 60.0  # seconds by the clock that a worker may take to start
PATIENCE = 60.0  # and that it may take for one reply, on a machine too busy to give it DEADLINE seconds of computing
ATTEMPTS = 2  # an answer over which a worker was killed, by the system say, is asked once more


def maths(target: str, text: str) -> float:
    r"""1.0 when the last \boxed{...} of text equals target as mathematics, else 0.0.

    >>> maths("0.5", r"so \boxed{\frac12}"), maths("0.5", r"\boxed{0.5}, or rather \boxed{2}"), maths("0.5", "0.5")
    (1.0, 0.0, 0.0)
    """
    return float(verdict(target, text) or 0)


def verdict(target: str, text: str) -> bool | None:
    """As maths, but None where the judge failed: out of time, killed, or not started."""
    answer = find(text, target)
    return False if answer is None else _judge(target, answer)


def verdicts(pairs: list[tuple[str, str]]) -> list[bool | None]:
    """The verdict of each (target, text), by several workers at once. Each different answer is judged once."""
    found = [(target, find(text, target)) for target, text in pairs]
    distinct = [pair for pair in dict.fromkeys(found) if pair[1] is not None]
    with ThreadPoolExecutor(WORKERS) as threads:
        judged = dict(zip(distinct, threads.map(lambda pair: _judge(*pair), distinct)))
    return [judged.get(pair, False) for pair in found]


def unreadable(golds: list[str]) -> list[str]:
    """Those of these answers (read_gold's) that math-verify cannot read, or would read without some letter."""
    with ThreadPoolExecutor(WORKERS) as threads:
        return [gold for gold, can_read in zip(golds, threads.map(_is_readable, golds)) if not can_read]


def _is_readable(gold: str) -> bool:
    try:
        with _slots, _Judge() as judge:
            return all(judge.ask(expression, None) for expression in expressions(gold))
    except (NoVerdict, TooLong, RecursionError):
        return False


ANOTHER = re.compile(r"(?:[,;\n]|\band\b)\s*[(\[]?[A-Z][.:)\]]|(?:[/&]|\bor\b)\s*[(\[]?[A-Z](?:[.:)\]]|$)")


def choice(target: str, text: str) -> float:
    r"""1.0 when the last \boxed{...} of text names the option target, by its letter, else 0.0. Text may follow it.

    >>> [choice("B", rf"\boxed{{{answer}}}") for answer in (r"\text{(b)}", r"\text{B: Paris}", "[B]", "Option B")]
    [1.0, 1.0, 1.0, 1.0]
    >>> [choice("B", rf"\boxed{{{answer}}}") for answer in ("B or C", "AB", "B. one, C. two", "B. one or C", "Bob")]
    [0.0, 0.0, 0.0, 0.0, 0.0]
    """
    answer = re.sub(r"\\(?:text|math)[a-z]*(?![a-z])|\\[()\[\]]|[{}$*\"'`]", "", find(text) or "").strip()
    answer = re.sub(r"^(?:the\s+)?(?:correct\s+)?(?:option|answer|choice)\b\s*(?:is|:)?\s*", "", answer, flags=re.I)
    letter = re.fullmatch(r"[(\[]?([A-Za-z])(?:[)\].:]+(?:\s.*)?|\s+-\s.*)?", answer, re.DOTALL)
    return float(bool(letter) and letter[1].upper() == target and not ANOTHER.search(answer))


class NoVerdict(Exception):
    """The judge failed, not the answer: a worker did not start, was killed, or had no time to answer."""


class TooLong(Exception):
    """The answer needs more computing than DEADLINE; it always will."""


@lru_cache(10_000)  # the responses of a group repeat each other's answers
def _remember(target: str, answer: str) -> bool | None:
    with _slots, _Judge() as judge:
        try:
            return is_right(target, answer, judge.ask)
        except TooLong:
            return None
        except RecursionError:  # brackets in brackets in brackets
            return False


def _judge(target: str, answer: str) -> bool | None:
    for _ in range(ATTEMPTS):
        try:
            return _remember(target, answer)
        except Killed:
            continue
        except NoVerdict:
            break
    return None


def number_of_workers() -> int:
    """One for each core, which the ranks of torchrun on this machine share."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


class Killed(NoVerdict):
    """The worker died of something else than time."""


class Worker:
    """A process that runs math-verify. NoVerdict when it does not start."""

    def __init__(self):
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).with_name("worker.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                start_new_session=True,  # Ctrl-C is the caller's to handle: here it would spoil a verdict
            )
        except OSError as e:  # no more processes, or no more files, may be opened
            raise NoVerdict from e
        _alive.add(self)
        if self.read(START) != b"r":
            self.stop()
            raise NoVerdict

    def read(self, seconds: float) -> bytes:
        """Its next byte; none when it is dead, or silent for so long."""
        waiting = select.poll()  # select.select takes no descriptor above 1023, and the caller may have many
        waiting.register(self.process.stdout, select.POLLIN)
        return self.process.stdout.read(1) if waiting.poll(1000 * seconds) else b""

    def stop(self) -> int:
        """End it. Returns its exit code: that of its own end if it was dead already."""
        _alive.discard(self)
        self.process.kill()
        self.process.stdin.close()
        self.process.stdout.close()
        return self.process.wait()


class _Judge:
    """The worker of one answer, taken from the idle ones when it is first asked, and given back at the end."""

    def __init__(self):
        self.worker = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.worker:
            _idle.append(self.worker)

    def ask(self, gold: str, answer: str | None, within: Fraction = Fraction(0)) -> bool:
        """math-verify's verdict. TooLong, Killed or NoVerdict when there is none."""
        is_first = self.worker is None
        worker, self.worker = self.worker or _take(), None  # ours again when it has answered
        late = False
        try:
            question = [gold, answer, str(within), DEADLINE if is_first else None]
            worker.process.stdin.write(json.dumps(question).encode() + b"\n")
            reply = worker.read(PATIENCE)
            late = not reply and worker.process.poll() is None
        except OSError:  # it died before it could read
            reply = b""
        except BaseException:  # an interrupt: a late reply must not answer the next question
            worker.stop()
            raise
        if reply in (b"1", b"0"):
            self.worker = worker
            return reply == b"1"
        exit_code = worker.stop()
        if exit_code == -signal.SIGPROF:
            raise TooLong
        raise NoVerdict if late else Killed


def _take() -> Worker:
    """An idle worker that is alive, or a new one."""
    while _idle:
        worker = _idle.pop()
        if worker.process.poll() is None:
            return worker
        worker.stop()
    return Worker()


WORKERS = number_of_workers()


def _forget() -> None:
    """At the start, and in a forked child: the workers, and perhaps the slots, are the parent's."""
    global _idle, _alive, _slots
    _idle, _alive, _slots = [], set(), threading.BoundedSemaphore(WORKERS)


_forget()
os.register_at_fork(after_in_child=_forget)


@atexit.register
def stop() -> None:
    """End all workers."""
    for worker in list(_alive):
        worker.stop()
    _idle.clear()


def check() -> None:
    """Start math-verify's process; ValueError, in one line, when it does not answer (say, is not installed)."""
    try:
        with _Judge() as judge:
            works = judge.ask("(x+1)^2", "x^2+2x+1")
    except (NoVerdict, TooLong):
        works = False
    if not works:
        raise ValueError("math-verify, which judges maths answers, does not run: pip install -r requirements.txt")
