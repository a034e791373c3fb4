r"""The process that math-verify runs in. verify.py starts it; it imports nothing of ours, neither torch.

It reads questions from standard input, a line of JSON each: [gold, answer, within, seconds]. It answers with one byte:
1 if the two expressions are equal, or differ by no more than within, else 0. If the answer is null, it says whether it
can read the gold. It has so many seconds of computing from now on; null means that what is left has to do.
"""

import json
import logging
import os
import re
import resource
import signal
import sys
from fractions import Fraction
from functools import lru_cache

from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify import verify
from sympy import Basic, Float, I, MatrixBase, Product, Rational, Sum, Symbol

MEMORY = 1 << 30  # bytes that it may map
READY = b"r"  # what it says first
# units=False: it would take letters after a number for a unit, 6m for 6.
NORMALIZATION = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none")
DIGITS = 50  # that numbers such as \sqrt{2} are compared in; differences below 10^-50 are 0


def has_both_cases(text: str) -> bool:
    r"""Is there a letter that is used small and capital, as in R - r?

    >>> has_both_cases("R - r"), has_both_cases(r"\Delta x"), has_both_cases("P")
    (True, False, False)
    """
    letters = set(re.sub(r"\\[a-zA-Z]+", "", text))
    return any(c.isupper() and c.lower() in letters for c in letters)


@lru_cache(1_000)  # the answers of a group have one gold
def read(text: str, lowercase: bool) -> Basic | MatrixBase | None:
    """A LaTeX text as a sympy expression, with exact decimals and the imaginary unit; None if it cannot be read."""
    try:
        found = latex2sympy(
            normalize_latex(text, NORMALIZATION),
            is_real=True,
            normalization_config=None,
            conversion_config=ConversionConfig(lowercase_symbols=lowercase),
        )
        exact = {number: Rational(str(number)) for number in found.atoms(Float)}
        if not found.has(Sum, Product):  # where i is an index
            exact[Symbol("i", real=True)] = I
        return found.xreplace(exact) if exact.keys() & found.atoms() else found
    except Exception:  # antlr's and sympy's are many
        return None


def same(gold: str, answer: str, within: float) -> bool:
    r"""math-verify's verdict on two expressions.

    >>> same("0.5", r"\frac{1}{2}", 0), same(r"\frac{1}{3}", "0.333333", 0), same("6m", "6", 0), same("R-r", "0", 0)
    (True, False, False, False)
    >>> same(r"\sqrt{2}", r"1.41", 0.01), same(r"2e^{i\pi/3}", r"1+\sqrt{3} i", 0)
    (True, True)
    """
    lowercase = not (has_both_cases(gold) or has_both_cases(answer))
    expressions = [read(text, lowercase) for text in (gold, answer)]
    if None in expressions:
        return False
    if within:
        try:
            return bool(abs((expressions[0] - expressions[1]).evalf()) <= within)
        except Exception:  # no numbers
            return False
    return verify(*expressions, numeric_precision=DIGITS, allow_set_relation_comp=True, timeout_seconds=None)


def is_readable(text: str) -> bool:
    r"""Can it be read, and no letter of it is lost?

    >>> is_readable(r"\frac{x}{2}"), is_readable(r"1, \ldots, m"), is_readable("y'"), is_readable(r"\frac{dy}{dx}")
    (True, False, True, True)
    """
    found = read(text, lowercase=not has_both_cases(text))
    letters = set(re.sub(r"\\[a-zA-Z]+(?:\{[a-zA-Z]+\})?", "", text).lower()) & set("abcdefghijklmnopqrstuvwxyz")
    return found is not None and letters <= set(str(found).lower()) | {"i"}  # it may print I, e as exp


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable()  # math-verify would warn that its timeouts are off
    os.write(1, READY)
    for line in sys.stdin:
        gold, answer, within, seconds = json.loads(line)
        if seconds is not None:
            # Nothing handles this signal, so the kernel ends the process, whatever it is in the middle of.
            signal.setitimer(signal.ITIMER_PROF, seconds)
        yes = is_readable(gold) if answer is None else same(gold, answer, float(Fraction(within)))
        os.write(1, b"1" if yes else b"0")


if __name__ == "__main__":
    main()
