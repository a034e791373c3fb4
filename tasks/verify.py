r"""Is the answer in the last \boxed{...} of a response right? Never raises, never hangs, whatever the response says.

Most answers are settled here, by comparing normalised text and whole numbers. The rest go to math-verify, which knows
that 0.5 is \frac{1}{2}. But math-verify uses sympy, which starts to compute 10^{10^{10}} if it is asked to. Its own
timeouts are alarms: only a main thread can set them, and an operation on big numbers does not react to them. So
math-verify runs in a process of its own, a worker, with limited memory and computing time. The kernel ends the worker
if an answer takes too long, and then it is started again.

This file is client (when imported) and server (when run as a script). The worker imports nothing of the caller's,
neither its __main__ nor torch.
"""

import atexit
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import threading
from functools import lru_cache

LONGEST = 1_000  # characters of an answer; a longer one is wrong
DEADLINE = 5.0  # seconds of computing that math-verify may spend on one answer; a longer one is wrong
START = 60.0  # seconds by the clock that the worker may take to start
PATIENCE = 60.0  # and that it may take to answer, on a machine too busy to give it DEADLINE seconds of computing
MEMORY = 1 << 30  # bytes that the worker may map
READY = b"r"  # what the worker says first; verdicts are 1 and 0


def maths(target: str, text: str) -> float:
    r"""1.0 when the last \boxed{...} of text equals target as mathematics, else 0.0.

    >>> maths("0.5", r"so \boxed{\frac12}"), maths("0.5", r"\boxed{0.5}, or rather \boxed{2}"), maths("0.5", "0.5")
    (1.0, 0.0, 0.0)
    """
    answer = last_boxed(text)
    try:
        return float(answer is not None and _same(target, answer))
    except NoVerdict:
        return 0.0


class NoVerdict(Exception):
    """The judge failed, not the answer: its process did not start or was killed. Such a 0 is not remembered."""


def choice(target: str, text: str) -> float:
    r"""1.0 when the last \boxed{...} of text holds the letter target and nothing else, else 0.0.

    >>> choice("B", r"\boxed{\text{(b)}}"), choice("B", r"\boxed{B or C}")
    (1.0, 0.0)
    """
    answer = re.sub(r"\\(?:text|textbf|mathrm|mathbf)(?![a-z])", "", last_boxed(text) or "")
    return float(answer.strip(" \t\n(){}$*.:").upper() == target)


def last_boxed(text: str) -> str | None:
    r"""What the last \boxed{...} of text holds; None when there is none, or it is unclosed or longer than LONGEST.

    >>> last_boxed(r"\boxed{1}, no: \boxed{\frac{1}{2}}!"), last_boxed(r"\boxed{1} or \boxed{2")
    ('\\frac{1}{2}', None)
    """
    rest = text.rpartition(r"\boxed")[2][: LONGEST + 10].lstrip() if r"\boxed" in text else ""
    depth = 0
    for token in re.finditer(r"\\.|[{}]", rest, re.DOTALL) if rest.startswith("{") else ():
        depth += {"{": 1, "}": -1}.get(token[0], 0)  # an escaped \{ is no brace
        if depth == 0:
            return rest[1 : token.start()] if token.start() <= LONGEST else None
    return None


@lru_cache(10_000)  # the responses of a group repeat each other's answers
def _same(target: str, answer: str) -> bool:
    target, answer = _tidy(target), _tidy(answer)
    if not (target and answer):
        return False
    plain = _plain(target), _plain(answer)
    if plain[0] == plain[1]:
        return True
    if all(re.fullmatch("-?[0-9]{1,1000}", x) for x in (target, answer)):
        return int(target) == int(answer)
    return _ask(target, answer)


def _tidy(answer: str) -> str:
    """answer without dollar signs and a final stop; 4.5e33, which math-verify reads as 4.5·e·33, as a power of ten."""
    answer = re.sub(r"\\?\$", "", answer.replace("−", "-")).strip().removesuffix(".")
    return re.sub(r"(?<=[0-9])[eE]\+?(-?[0-9]{1,3})$", r" \\times 10^{\1}", answer)


def _plain(answer: str) -> str:
    r"""answer without what cannot change its value: spaces, \left, \right, commas in 1,000, zeros in 27.0."""
    answer = re.sub(r"\\[!,]|\\(?:left|right)(?![a-zA-Z])", "", answer.replace("{,}", ","))
    answer = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", answer)
    answer = re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", answer)  # "1 2" is not 12
    if re.fullmatch(r"-?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?", answer):
        answer = answer.replace(",", "")
    return re.sub(r"^(-?[0-9]+)\.0+$", r"\1", answer)


_lock = threading.Lock()
_worker: subprocess.Popen | None = None


def check() -> None:
    """Start math-verify's process; ValueError, in one line, when it does not answer (say, is not installed)."""
    try:
        works = _ask("0.5", r"\frac{1}{2}")
    except NoVerdict:
        works = False
    if not works:
        raise ValueError("math-verify, which judges maths answers, does not run: pip install -r requirements.txt")


def _ask(target: str, answer: str) -> bool:
    """math-verify's verdict; False when its process dies of this answer. NoVerdict when it fails for other reasons."""
    with _lock:
        reply, exit_code = b"", None
        try:
            if _worker is None or _worker.poll() is not None:
                _start()
            _worker.stdin.write(json.dumps([target, answer, DEADLINE]).encode() + b"\n")
            reply = _read(PATIENCE)
        except OSError:  # it died before it could read
            pass
        finally:
            if reply not in (
                b"1",
                b"0",
            ):  # dead, too late or interrupted: a late reply must not answer the next question
                exit_code = _stop()
    if exit_code == -signal.SIGKILL:  # by us, out of patience, or by the system
        raise NoVerdict
    return reply == b"1"


def _start() -> None:
    """A new worker, once it has said that it is ready. NoVerdict when it does not."""
    global _worker
    _stop()
    _worker = subprocess.Popen(
        [sys.executable, "-P", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        start_new_session=True,  # Ctrl-C is the caller's to handle: here it would spoil a verdict
    )
    if _read(START) != READY:
        raise NoVerdict


def _read(seconds: float) -> bytes:
    """The worker's next byte; none when it is dead, or silent for so long."""
    waiting = select.poll()  # select.select takes no descriptor above 1023, and the caller may have many
    waiting.register(_worker.stdout, select.POLLIN)
    return _worker.stdout.read(1) if waiting.poll(1000 * seconds) else b""


@atexit.register
def _stop() -> int | None:
    """End the worker, if there is one. Returns its exit code: that of its own end if it was dead already."""
    global _worker
    if _worker is None:
        return None
    _worker.kill()
    _worker.stdin.close()
    _worker.stdout.close()
    worker, _worker = _worker, None
    return worker.wait()


def _forget() -> None:
    """In a forked child: the worker, and perhaps the lock, are the parent's."""
    global _lock, _worker
    _lock, _worker = threading.Lock(), None


os.register_at_fork(after_in_child=_forget)


def _serve() -> None:
    """The worker: READY, then for each line of JSON, [target, answer, seconds], one byte, 1 or 0."""
    import logging

    from math_verify import parse
    from math_verify import verify as equal

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable()  # it would warn that its timeouts are off
    os.write(1, READY)
    for line in sys.stdin:
        target, answer, seconds = json.loads(line)
        # Nothing handles this signal, so the kernel ends the process, whatever it is in the middle of.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        expressions = (parse(rf"\boxed{{{x}}}", parsing_timeout=None) for x in (target, answer))
        verdict = equal(*expressions, timeout_seconds=None)
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.write(1, b"1" if verdict else b"0")


if __name__ == "__main__":
    _serve()
