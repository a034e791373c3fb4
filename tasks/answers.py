r"""Is an answer equal to the gold, the right answer of a dataset? Both are texts, in LaTeX or nearly so.

    response --boxes.find--> answer --spelling.tidy--> rules --> math-verify

Most answers are settled by rules, here. Each rule gets the gold and the answer and returns True (right), False (wrong)
or None (not mine). Some rules take lists, intervals or equations apart and compare the pieces. What remains are
single expressions. math-verify says whether two of them are equal, by the function `ask` (verify.py).

Conventions, where people would differ:

- Numbers and decimals are exact: 0.333 is not 1/3, and 1.414 is not the square root of 2.
- 7 % is 7 or 0.07, whichever the gold is. Units are not compared, a unit may be missing.
- A list is right in any order, with the right number of elements. A tuple is right in its own order.
- Upper and lower case are one letter, unless the gold or the answer has both.
- A box counts wherever it stands, also inside <think>. For a list all boxes count, so a first try spoils it.

Known limits: the judge may be wrong about these.

| gold | answer | should be | is | why |
|---|---|---|---|---|
| `3R^2` | `3r^2` | wrong | right | letters without case: P and p are one price more often than two |
| `\text{even}` | `\text{even function}` | right | wrong | words are compared as they stand |
| `-\tau \ln \Delta` | `\tau \ln\frac{1}{\Delta}` | right | wrong | nobody tells sympy that Delta is positive |
| `I(0) e^{-t}` | `I_0 e^{-t}` | right | wrong | two names of one number |
| `\angle A=90, \angle B=90` | `90^\circ` | right | wrong | a list of two is not one value |
| `5 \text{ cm}` | `5 \text{ m}` | wrong | right | units are not compared |
| `18` | `\text{eighteen}` | right | wrong | numbers in words |
| `x` | `\frac{x^2}{x}` | right | wrong | math-verify compares a lone letter as it stands |
| `0` | `0x` | wrong | right | sympy computes it |
"""

import re
from collections.abc import Callable
from fractions import Fraction
from functools import partial

from tasks.boxes import LONGEST
from tasks.lists import IN, NAME, OR, SIGN, bracketed, elements, interval, split
from tasks.spelling import GROUP, squeeze, symbols, tidy

LONGEST_LIST = 20  # elements; a longer list must be written exactly as the gold
# ask(gold, answer): are two texts equal? ask(gold, answer, within=difference): are two numbers nearly equal?
Ask = Callable[..., bool]


# 1. The judge.


def is_right(gold: str, answer: str, ask: Ask) -> bool:
    r"""Is the answer equal to the gold? ask: math-verify's verdict on two expressions.

    A gold that ends in " within 0.1" is a number that may be missed by so much.

    >>> is_right("1,000", r"\$1000.00", None), is_right("3.1 within 0.1", "3", None), is_right("7", "7 or 8", None)
    (True, True, False)
    """
    number, within = WITHIN.fullmatch(gold).groups()
    return len(answer) <= LONGEST and is_equal(tidy(number), tidy(answer), ask, Fraction(within or 0))


WITHIN = re.compile(r"(.*?)(?: within ([0-9.]+(?:e-?[0-9]{1,2})?))?", re.DOTALL)


def is_equal(gold: str, answer: str, ask: Ask, within: Fraction = Fraction(0), skip_text: bool = False) -> bool:
    """Are two tidy texts the same answer, or numbers that differ by no more than within?

    skip_text: do not accept a text only because it is the gold's.
    """
    # 1. The same text, without units and spaces.
    gold, unit = split_unit(gold)
    answer, _ = split_unit(answer, unit)
    if not gold or not answer:
        return False
    if not skip_text and squeeze(gold) == squeeze(answer):
        return True
    # 2. Two numbers, or whatever a rule is for. Rules compare pieces with this function, again.
    if (verdict := compare_numbers(gold, answer, within)) is not None:
        return verdict
    again = partial(is_equal, ask=ask, within=within, skip_text=skip_text)
    for rule in RULES:
        if (verdict := rule(gold, answer, again)) is not None:
            return verdict
    # 3. Two expressions. If one has \ln, then \log is \ln, too.
    if r"\ln" in gold + answer:
        gold, answer = (re.sub(r"\\log(?![a-zA-Z_]|\s*_)", r"\\ln", text) for text in (gold, answer))
    return ask(symbols(gold), symbols(answer), within)


def read_gold(text: str, unit: str | None = None, tolerance: str | float | None = None) -> str:
    r"""A dataset's answer as the judge wants it: tidy, with the unit and the tolerance that its columns give.

    >>> read_gold("$1,000$"), read_gold("5", r"$\mathrm{~cm}$", "1e-1")
    ('1000', '5 \\text{ cm} within 0.1')
    """
    gold = tidy(text)
    unit = re.sub(r"\\[a-zA-Z]+|[${}~\s]", "", str(unit or ""))
    if re.fullmatch(r"[a-zA-Z][a-zA-Z/]*(?:\^[0-9])?", unit) and split_unit(gold) == (gold, ""):
        gold += rf" \text{{ {unit}}}"
    try:
        within = Fraction(str(tolerance))
    except (ValueError, ZeroDivisionError):  # no tolerance, or none that is a number
        return gold
    return f"{gold} within {float(within)!r}" if within > 0 else gold


def expressions(gold: str) -> list[str]:
    r"""What math-verify is asked about a tidy gold: nothing of numbers and words, the elements of lists.

    To find out, the gold is compared with itself. If the rules refuse even that, it is one expression as it stands.

    >>> expressions("7"), expressions(r"\text{east}"), expressions(r"(2, \sqrt{3}), (y+1, 5]"), expressions("f(x) = 2x")
    ([], [], ['\\sqrt{3}', 'y+1'], ['2x'])
    """
    asked = []

    def note(expression: str, _: str, within: Fraction) -> bool:  # in the place of math-verify
        asked.append(expression)
        return True

    gold = WITHIN.fullmatch(gold)[1]
    return list(dict.fromkeys(asked)) if is_equal(gold, gold, note, skip_text=True) else [gold]


# 2. Numbers and units.

TEXT = r"(?<![_^])\\text\{\s*[a-zA-Z](?:[a-zA-Z .'/-]|\^\{?-?[0-9]\}?)*\}"
WORDS = (
    r"[cmk]m|[mk]g|m[lL]|in(?:ch(?:es)?)?|ft|feet|foot|yards?|miles?|met(?:er|re)s?|lit(?:er|re)s?|grams?|degrees?|"
    r"radians?|sec(?:ond)?s?|min(?:ute)?s?|h(?:ou)?rs?|days?|weeks?|months?|years?|cents?|dollars?|USD|EUR|GBP|euros?|"
    r"pounds?|mph|km/h|m/s|units?|square|cubic"
)
UNITS = [
    TEXT,  # 5 \text{ apples}
    rf"\\frac\{{{TEXT}\}}\{{{TEXT}\}}",  # 5 \frac{\text{m}}{\text{s}}
    rf"(?<![a-zA-Z\\{{_^])(?:{WORDS})",  # 5 cm
    r"(?<![a-zA-Z\\])(?:[cmk]?m|k?g|m?l|s|h)(?=\^|/)",  # 5 m^2, but 5m is five times m
    r"\^\{?\\text\{(?:th|st|nd|rd)\}\}?",  # 8^{\text{th}}
    r"\^\\circ",
]
UNIT = re.compile(rf"(?:{'|'.join(UNITS)})(?:\s*\^\{{?-?\d\}}?)?\s*$")
HAS_VALUE = re.compile(r"[\w)}\]|!%](?:\s|\\cdot|\\times|/)*$")  # before the unit
# Words that change what the number before them says.
NO_UNIT = re.compile(
    r"\b(?:or|and|not|no|is|are|if|when|than|then|more|less|fewer|least|most|greater|about|mod|dozens?|hundreds?|score|"
    r"times|half|halves|thirds?|quarters?|wrong|right|incorrect|correct|base)\b"
)


def split_unit(text: str, bare: str = "") -> tuple[str, str]:
    r"""(value, unit). Text after a value is a unit, unless it says more. bare: a unit that may stand without \text.

    Letters are variables: 6m is six times m, unless the gold's unit is m.

    >>> split_unit(r"864 \text{ inches}^2"), split_unit("12 cm"), split_unit("6m"), split_unit("6m", "m")
    (('864', 'inches'), ('12', 'cm'), ('6m', ''), ('6', 'm'))
    >>> split_unit(r"8 \text{ or less}"), split_unit(r"3 \text{ kg} \cdot \text{m}/\text{s}^2"), split_unit(r"90^\circ")
    (('8 \\text{ or less}', ''), ('3', 'kg'), ('90', ''))
    """
    unit = ""
    while (found := UNIT.search(text)) and HAS_VALUE.search(text[: found.start()]) and not NO_UNIT.search(found[0]):
        words = re.findall(r"[a-zA-Z]+", re.sub(r"\\[a-z]+", "", found[0]))
        unit = words[0] if words else unit
        text = re.sub(r"(?:\s|\\cdot|\\times|/)+$", "", text[: found.start()])
    if bare and (value := re.sub(rf"\s*(?<![a-zA-Z]){re.escape(bare)}$", "", text)):
        return value, bare
    return text, unit


def read_number(text: str) -> Fraction | None:
    r"""A whole number, a decimal, a fraction, or a number with a power of ten; None for anything else.

    >>> read_number("-3.50"), read_number(r"2 \times 10^{-3}"), read_number(r"-\frac{6}{8}"), read_number("6/0")
    (Fraction(-7, 2), Fraction(1, 500), Fraction(-3, 4), None)
    """
    text = re.sub(r"^([-+]?)(?=10\^)", r"\g<1>1\\times", squeeze(text))  # 10^3 is 1 \times 10^3
    frac = r"^([-+]?)\\frac(?:\{([-+]?[0-9]+)\}|([0-9]))(?:\{([0-9]+)\}|([0-9]))$"
    text = re.sub(frac, r"\1\2\3/\4\5", text)
    number = r"([-+]?[0-9]+(?:/[0-9]+|\.[0-9]+)?)(?:\\(?:times|cdot)10\^\{?([-+]?[0-9]{1,3})\}?)?"
    if not (found := re.fullmatch(number, text)):
        return None
    try:
        return Fraction(found[1]) * Fraction(10) ** int(found[2] or 0)
    except ZeroDivisionError:
        return None


def compare_numbers(gold: str, answer: str, within: Fraction) -> bool | None:
    r"""Numbers are exact. A percentage p is p or p/100, as the gold is.

    >>> [compare_numbers(*pair, 0) for pair in (("2", "x"), ("1/3", "0.333"), ("0.5", r"50\%"), ("50", r"50\%"))]
    [None, False, True, True]
    """
    gold_number, answer_number = (read_number(re.sub(r"\\?%$", "", text)) for text in (gold, answer))
    if gold_number is None or answer_number is None:
        return None
    scales = [Fraction(1)]
    if gold.endswith("%") != answer.endswith("%"):
        scales.append(Fraction(100) if gold.endswith("%") else Fraction(1, 100))
    return any(abs(gold_number - answer_number * scale) <= within for scale in scales)


# 3. The other rules.

SYNONYMS = {
    **dict.fromkeys([r"\emptyset", r"\varnothing", r"\{\}", "empty set", "none"], "no solution"),
    **dict.fromkeys(["no solutions", "no real solution", "no real solutions"], "no solution"),
    **dict.fromkeys(["dne", "doesn't exist"], "does not exist"),
}


def compare_words(gold: str, answer: str, again: Ask) -> bool | None:
    r"""Words are compared as words, without case: they are no products of their letters.

    >>> pairs = (r"\text{east}", "East"), ("no solution", r"\emptyset"), ("east", "seat"), ("xy", "yx")
    >>> [compare_words(*pair, None) for pair in pairs]
    [True, True, False, None]
    """
    words = [re.sub(r"\\text\{([^{}]*)\}", r"\1", text).strip(" ().").lower() for text in (gold, answer)]
    words = [SYNONYMS.get(word, word) for word in words]
    is_word = [re.fullmatch(r"[a-z][a-z' -]+", word) for word in words]
    if is_word[0] and words[0] == words[1]:
        return True
    is_text = "\\text" in gold + answer or min(map(len, words)) >= 4  # xy and yx are products
    return False if all(is_word) and is_text else None


BASES = dict(two=2, three=3, four=4, five=5, six=6, seven=7, eight=8, nine=9, ten=10, twelve=12, sixteen=16)
NUMERAL = re.compile(r"\(?([0-9A-F]+)\)?(?:_\{?(?:\\text\{)?\s*(?:base\s*)?([0-9]+|[a-z]+)\s*\}*)?")


def compare_numerals(gold: str, answer: str, again: Ask) -> bool | None:
    r"""Numerals in a base are compared as they stand. The base may be missing, but may not be another.

    >>> [compare_numerals("52_8", answer, None) for answer in ("52_{8}", r"(52)_{\text{eight}}", "52", "52_9", "42")]
    [True, True, True, False, False]
    >>> compare_numerals("7", "7_8", None), compare_numerals("7", "7_{10}", None)
    (False, True)
    """
    numerals = [NUMERAL.fullmatch(squeeze(text)) for text in (gold, answer)]
    if not any(numeral and numeral[2] for numeral in numerals):
        return None
    if not all(numerals):
        return False
    gold_base, answer_base = (str(BASES.get(numeral[2], numeral[2] or "")) for numeral in numerals)
    return numerals[0][1] == numerals[1][1] and answer_base in (gold_base or "10", "")


def compare_inequalities(gold: str, answer: str, again: Ask) -> bool | None:
    r"""An inequality is an interval, if the other one is. x in a set is that set.

    >>> def text(gold, answer): return squeeze(gold) == squeeze(answer)
    >>> compare_inequalities(r"x \in [2,5)", r"2 \le x < 5", text), compare_inequalities("x > 7", "7", text)
    (True, None)
    """
    texts = [re.sub(rf"^{NAME}\s*{IN}\s*", "", text) for text in (gold, answer)]
    are_inequalities = [bool(SIGN.search(text)) for text in texts]
    if all(are_inequalities):
        letters = [set(re.sub(rf"{OR}|\\[a-zA-Z]+|[^a-zA-Z]", "", text)) for text in texts]
        if letters[0] != letters[1] or len(letters[0]) != 1:  # not of the same variable and numbers
            return None
    elif any(are_inequalities):
        other = texts[are_inequalities.index(False)]
        if not re.fullmatch(r"[(\[].*,.*[)\]]", other):
            return None
    texts = [interval(text) if SIGN.search(text) else text for text in texts]
    return None if None in texts or texts == [gold, answer] else again(*texts)


def compare_lists(gold: str, answer: str, again: Ask) -> bool | None:
    r"""A list, or set, is right in any order, each element as often as the gold has it. A set is no tuple.

    >>> def text(gold, answer): return gold == answer
    >>> [compare_lists("3, 5", answer, text) for answer in ("5,3", r"\{3, 5\}", "(3, 5)", "3 or 5", "3", "3, 5, 5")]
    [True, True, True, True, False, False]
    >>> [compare_lists("(3, 5)", answer, text) for answer in (r"\{3, 5\}", "3, 5", "5, 3")]
    [False, True, False]
    """
    golds, answers = elements(gold), elements(answer)
    if len(golds) == len(answers) == 1:
        return None
    gold_tuple, answer_tuple = bracketed(gold), bracketed(answer)
    if len(golds) == 1 and gold_tuple and not answer.endswith("\\}"):  # a tuple, and the answer has no parentheses
        return gold_tuple[0] == "(" and len(answers) == len(gold_tuple[1]) and all(map(again, gold_tuple[1], answers))
    if len(answers) == 1 and answer_tuple and not bracketed(golds[0]):  # a list in parentheses
        answers = answer_tuple[1]
    return len(golds) == len(answers) <= LONGEST_LIST and can_pair(golds, answers, again)


def can_pair(golds: list[str], answers: list[str], again: Ask) -> bool:
    """Can the elements of two lists, equally long, be paired?

    With a tolerance, or per cent, the first partner may be the wrong one. So a partner may be given up for another
    (augmenting paths).

    >>> def near(gold, answer): return abs(float(gold) - float(answer)) <= 0.1
    >>> can_pair(["1", "1.15"], ["1.08", "0.95"], near), can_pair(["1", "1.15"], ["1.2", "1.2"], near)
    (True, False)
    """
    gold_of = {}  # number of an answer -> number of the gold that it is paired with

    def find_partner(gold: int, tried: set[int]) -> bool:
        for i, answer in enumerate(answers):
            if i not in tried and again(golds[gold], answer):
                tried.add(i)
                if i not in gold_of or find_partner(gold_of[i], tried):
                    gold_of[i] = gold
                    return True
        return False

    return all(find_partner(gold, set()) for gold in range(len(golds)))


COLUMN = re.compile(r"^\\begin\{[pbv]?matrix\}([^&]*)\\end\{[pbv]?matrix\}$")
NEW_ROW = r"\\"


def compare_tuples(gold: str, answer: str, again: Ask) -> bool | None:
    r"""Tuples and intervals are compared element by element, and so are their brackets. A column vector is a tuple.

    >>> def text(gold, answer): return gold == answer
    >>> answers = "(3,5)", r"\begin{pmatrix} 3 \\ 5 \end{pmatrix}", "(5,3)", "[3,5)", "3"
    >>> [compare_tuples("(3, 5)", answer, text) for answer in answers]
    [True, True, False, False, None]
    """
    gold, answer = (COLUMN.sub(lambda column: f"({column[1].replace(NEW_ROW, ',')})", text) for text in (gold, answer))
    gold_tuple, answer_tuple = bracketed(gold), bracketed(answer)
    if not gold_tuple or not answer_tuple:
        return None
    (left, golds, right), (answer_left, answers, answer_right) = gold_tuple, answer_tuple
    if len(golds) == 2 and (left, right) != (answer_left, answer_right):  # (1, 2] is not (1, 2)
        return False
    return len(golds) == len(answers) and all(map(again, golds, answers))


DEFINED = rf"{NAME}(?:'+)?(?:\([a-zA-Z]\))?|\([a-zA-Z](?:,\s*[a-zA-Z])*\)"  # left of =: x, f'(x), (x, y)
CONSTANTS = r"\\(?:frac|sqrt|cdot|times|pi|[lr]floor|[lr]ceil|binom|ln|log|sin|cos|tan|pm)(?![a-zA-Z])"


def compare_equations(gold: str, answer: str, again: Ask) -> bool | None:
    r"""The value of an equation is its last side that is no name. Sides that are numbers must be equal to it.

    >>> def text(gold, answer): return gold == answer
    >>> [compare_equations("7", answer, text) for answer in ("x = 7", "7 = x", "AB = 7", "8 = 7", "x = 6 = 7", "8")]
    [True, True, True, False, False, None]
    >>> [compare_equations("x = 7", answer, text) for answer in ("7", "y = 7", "x + y = 7")]
    [True, False, None]
    >>> compare_equations("MR = SRMC", "SRMC = MR", text)
    True
    """
    gold_sides, answer_sides = split(gold, "="), split(answer, "=")
    if len(gold_sides) == len(answer_sides) == 1 or not all(gold_sides + answer_sides):
        return None
    # Two words, as in MR = MC: the same in either order.
    if len(gold_sides) == 2 and all(re.fullmatch(r"(?:\\text\{)?[A-Z]{2,}\}?", side) for side in gold_sides):
        gold_words, answer_words = (
            sorted(re.sub(r"\\text|[{}]", "", side) for side in sides) for sides in (gold_sides, answer_sides)
        )
        return gold_words == answer_words
    # Any other equation is a definition, or math-verify's, as that of a plane.
    if len(gold_sides) > 1 and not re.fullmatch(DEFINED, gold_sides[0]):
        return None
    if len(gold_sides) > 1 and len(answer_sides) > 1:
        if not re.fullmatch(DEFINED, answer_sides[0]):
            return None
        answer_sides = _rename(gold_sides[0], answer_sides)
        if not answer_sides:
            return False
    # The answer's last side that is no name is its value.
    values = [side for side in answer_sides if not re.fullmatch(DEFINED, side)] or answer_sides[-1:]
    numbers = [side for side in values[:-1] if not re.search("[a-zA-Z]", re.sub(CONSTANTS, "", side))]
    return all(again(number, values[-1]) for number in numbers) and again(gold_sides[-1], values[-1])


def _rename(gold_name: str, sides: list[str]) -> list[str] | None:
    """The sides of an equation that defines what the gold does, with the gold's argument. None if it defines another.

    An index is no other name.

    >>> _rename("f(x)", ["f(t)", "2t"]), _rename("m_{max}", ["m", "7"]), _rename("x", ["y", "7"])
    (['f(x)', '2x'], ['m', '7'], None)
    """
    gold_name, name = squeeze(gold_name), squeeze(sides[0])
    if gold_name.partition("_")[0] == name.partition("_")[0]:
        return sides
    calls = [re.fullmatch(r"(\w+)\((\w)\)", text) for text in (gold_name, name)]
    if not all(calls) or calls[0][1] != calls[1][1]:
        return None
    return [re.sub(rf"(?<![a-zA-Z\\]){calls[1][2]}(?![a-zA-Z])", calls[0][2], side) for side in sides]


def compare_approximations(gold: str, answer: str, again: Ask) -> bool | None:
    r"""An exact value may be followed by a decimal that is near it. Either is the answer; but 7 is not near 8.

    >>> def near(gold, answer, within=0): return abs(float(gold) - float(answer)) <= within
    >>> [compare_approximations(gold, r"0.125 \approx 0.13", near) for gold in ("0.13", "0.125", "0.12")]
    [True, True, False]
    >>> compare_approximations("7", r"7 \approx 8", near)
    False
    """
    sides = split(answer, r"\\approx|\\simeq|\\doteq")
    if len(sides) == 1 or not all(sides):
        return None
    decimal = re.match(r"-?[0-9]*\.([0-9]+)", sides[-1])
    if len(sides) > 2 or not decimal or not again(*sides, within=Fraction(6, 10 ** (len(decimal[1]) + 1))):
        return False
    return again(gold, sides[0]) or again(gold, sides[1])


RELATION = re.compile(
    r"[<>?]|\\(?:le|ge|ne|neg|lnot|not|in|notin|to|rightarrow|implies|Rightarrow|iff|mid|nmid|sim|equiv|cup|cap|"
    r"vee|wedge|lor|land|ldots|dots|cdots|pm|mp|approx|bmod|pmod)(?![a-zA-Z])"
)


def refuse_no_value(gold: str, answer: str, again: Ask) -> bool | None:
    r"""A relation is no value, if the gold has none. Two numbers side by side are none, nor is text beside a number.

    >>> [refuse_no_value("7", answer, None) for answer in (r"\ne 7", r"8 \implies 7", "7 8", r"\text{not } 7", "x")]
    [False, False, False, False, None]
    """
    if RELATION.search(re.sub(GROUP, "", answer)) and not RELATION.search(re.sub(GROUP, "", gold)):
        return False
    if re.fullmatch(r"[-+]?[0-9.,]+(?:\s+[0-9.,]+)+", answer):
        return False
    return False if re.search(r"\\text\{[^{}]*\s[^{}]*\}", answer) and "\\text" not in gold else None


RULES = (  # in this order; the first that has a verdict has the last word
    compare_words,
    compare_numerals,
    compare_inequalities,
    compare_lists,
    compare_tuples,
    compare_equations,
    compare_approximations,
    refuse_no_value,
)
