r"""Where the answer stands in a response, how it is written, and what math-verify is asked about it.

    response --find--> answer --tidy--> rules that settle it here, or make simpler questions of it --> math-verify

`is_right` is the judge. It gets `ask(gold, answer)`, math-verify's verdict on two single expressions (verify.py), and
asks it only what it knows better than these rules: is one expression equal to another? All here is text, and fast.

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
from typing import NamedTuple

LONGEST = 1_000  # characters of an answer; a longer one is wrong
LONGEST_LIST = 20  # elements; a longer list must be written exactly as the gold
# ask(gold, answer): are two texts equal? ask(gold, answer, within=difference): are two numbers nearly equal?
Ask = Callable[..., bool]


# 1. Where the answer stands.

BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
GROUP = r"\{(?:[^{}]|\{[^{}]*\})*\}"  # braces around text that may have braces once more
BRACELESS = re.compile(
    rf"\\(?:boxed|fbox)(?![a-zA-Z]) *([-+]?(?:[0-9][0-9.,/]*|\\[dt]?frac *(?:[0-9] *|{GROUP}){{2}}|\\[a-zA-Z]+{GROUP}))"
)
MOST_BOXES = 50  # that are looked at, the last ones
NEXT_QUESTION = "\n\nQuestion:"  # where a base model goes on with a question of its own; the prompts begin so


def find(text: str, gold: str = "") -> str | None:
    r"""What the last box of a response holds, \boxed{...} or \fbox{...}; None if there is none.

    Boxes that only a comma, "and" or "or" separates are one list. If the gold is a list, all boxes together are.
    A last box that is not closed, or longer than LONGEST, is an answer that cannot be read, so None.

    >>> find(r"\boxed{1}, no: \boxed{\frac{1}{2}}!"), find(r"\boxed{1} or \boxed{2"), find(r"so \boxed 7.")
    ('\\frac{1}{2}', None, '7')
    >>> find(r"$x=\boxed{3}$ and $y=\boxed{4}$"), find(r"\boxed{7}. I put it into \boxed as told, not \boxed{}.")
    ('3, 4', '7')
    >>> find(r"First \boxed{3}. Then \boxed{4}.", "4"), find(r"First \boxed{3}. Then \boxed{4}.", "5, 6")
    ('4', '3, 4')
    >>> find("\\boxed{7}\n\nQuestion: 2+2?\n\nAnswer: \\boxed{4}")
    '7'
    """
    if first := re.search(BOX.pattern + r"\s*[^}\s]", text):
        text = text[: end if (end := text.find(NEXT_QUESTION, first.end())) >= 0 else None]
    boxes = _last_boxes(text)
    if not boxes:
        braceless = BRACELESS.findall(text[-10 * LONGEST :])
        return braceless[-1].rstrip(".,") if braceless else None
    if boxes[-1].content is None:
        return None
    # From the back: the boxes that are one list with the last one.
    first = len(boxes) - 1
    while first and _joins(text[boxes[first - 1].end : boxes[first].start]):
        first -= 1
    if first == len(boxes) - 1 and len(elements(gold)) > 1 and len(elements(boxes[-1].content)) == 1:
        first = 0
    return ", ".join(dict.fromkeys(box.content for box in boxes[first:] if box.content))


def boxed_in_thinking_only(text: str) -> bool:
    r"""Is there a box inside <think>...</think>, or in one that is open, and none after it? It counts all the same.

    >>> boxed_in_thinking_only(r"<think>\boxed{7}</think> So 7."), boxed_in_thinking_only(r"<think></think>\boxed{7}")
    (True, False)
    """
    after = text.rpartition("</think>")[2] if "</think>" in text else text.partition("<think>")[0]
    return after != text and find(text) is not None and find(after) is None


class Box(NamedTuple):
    content: str | None  # None: not closed, or longer than LONGEST
    start: int
    end: int


def _last_boxes(text: str) -> list[Box]:
    """The last boxes of a text, in its order, but for empty ones and those around another box."""
    boxes, start = [], len(text)
    for _ in range(MOST_BOXES):
        start = max(text.rfind(r"\boxed", 0, start), text.rfind(r"\fbox", 0, start))
        if start < 0:
            break
        if opening := BOX.match(text, start):
            box = _read_box(text, start, opening.end())
            holds_another = boxes and boxes[0].start < box.end
            if not holds_another and (box.content is None or box.content.strip()):
                boxes.insert(0, box)
    return boxes


def _read_box(text: str, start: int, inside: int) -> Box:
    depth = 1
    for token in re.finditer(r"\\.|[{}]", text[inside : inside + LONGEST + 1], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(token[0], 0)  # an escaped \{ is no brace
        if depth == 0:
            return Box(text[inside : inside + token.start()], start, inside + token.end())
    return Box(None, start, inside)


def _joins(between: str) -> bool:
    r"""Is this text between two boxes nothing but a comma, "and" or "or", and perhaps the next one's name, as in y =?

    >>> _joins("$ and $"), _joins("$, $y = "), _joins(" wait, "), _joins(" ")
    (True, True, False, False)
    """
    bare = re.sub(r"[$\s]|\\[()\[\],;! ]|\\q?quad", "", between)
    return bool(re.fullmatch(r"(?:,|;|,?and|,?or|,?\\text\{(?:and|or)\})(?:[^=,.]{1,20}=)?", bare))


# 2. How it is written: one spelling for what is the same.


def tidy(text: str) -> str:
    r"""A gold or an answer in plain LaTeX: without fonts, colours, dollar signs and other clothes.

    >>> tidy(r"$\textbf{27.0}$."), tidy(r"\textcolor{red}{\displaystyle 7}\\"), tidy("2√3")
    ('27', '7', '2\\sqrt{3}')
    """
    for rule in (characters, undress, programming, numbers):
        text = rule(text)
    return text


SIGNS = {
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∪": r"\cup ", "∈": r"\in ", "±": r"\pm ",
    "°": r"^\circ ",
    "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ", "ω": r"\omega ", "∅": r"\emptyset ",
    "²": "^{2}", "³": "^{3}", "½": r"\frac{1}{2}", "\u00a0": " ", "’": "'", "′": "'",
}  # fmt: skip


def characters(text: str) -> str:
    r"""Characters that have a name in LaTeX.

    >>> characters("3π"), characters("√(x+1)"), characters("–7"), characters("90°")
    ('3\\pi ', '\\sqrt{x+1}', '-7', '90^\\circ ')
    """
    text = re.sub(r"√\s*(?:\{([^{}]*)\}|\(([^()]*)\)|([0-9]+|\w))", lambda m: rf"\sqrt{{{m[1] or m[2] or m[3]}}}", text)
    text = re.sub(
        r"\^(?:\{\s*\\(?:degrees?|circ)\s*\}|\\(?:degrees?|circ))|\\(?:degrees?|textdegree)(?![a-zA-Z])",
        r"^\\circ",
        text,
    )
    return "".join(SIGNS.get(c, c) for c in text)


CLOTHES = [
    (r"\\(?:left|right)\s*\.|\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])|&(?==)", ""),
    (r"\\!|(?<=[0-9])\\,(?=[0-9])", ""),
    (r"\{,\}", ","),
    (r"\\[$]|\\text\{\\?\$\}|\\pounds(?![a-zA-Z])|[£€¥]", ""),  # money
    (r"\$\s*,\s*\$", ", "),  # of two formulas: a list, not thousands
    (r"(?<!\\)\\[\[\]()]|[$`\"]|\*\*", ""),
    (r"(?<!\\)\\[,;: ]|\\q?quad(?![a-zA-Z])|~", " "),
    (r"\\(?:displaystyle|textstyle|large|Large|huge|bf|it|rm|checkmark|boldsymbol|bm)(?![a-zA-Z])", ""),
    (r"\\(?:textcolor|color)\{[^{}]*\}", ""),
    (r"\\begin\{(aligned|align\*?|gathered|array)\}(?:\{[clr|]*\})?(.*?)\\end\{\1\}", r"\2"),
    (r"\\(?:mathrm|text|rm)\s*\{\s*([ie])\s*\}", r"\1"),  # the imaginary unit, Euler's number
    (r"\\(?:text(?:bf|it|rm|normal|sf)|mathrm|mathbf|mathit|mathsf|mbox|operatorname\*?)(?![a-zA-Z])", r"\\text"),
    (r"\\(?:bold|underline|emph)(?![a-zA-Z])\s*", ""),
    (r"\\text\s+\{", r"\\text{"),
    (r"\\text\{([^{}a-zA-Z]*|\s*[0-9.,]+\s*)\}", r"\1"),  # text without letters
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\\geq(?:slant)?(?![a-zA-Z])", r"\\ge "),
    (r"\\leq(?:slant)?(?![a-zA-Z])", r"\\le "),
    (r"\\neq(?![a-zA-Z])", r"\\ne "),
    (r"\+\s*\\infty", r"\\infty"),
    (r":=", "="),
    (r"(?<![0-9.])([0-9]+\.[0-9]*?)([0-9]+?)\2+(?:\\l?dots|\.\.\.)$", r"\1\\overline{\2}"),
]
ENDS = re.compile(r"(?:[\s.,;:]|\\\\|\\\.|\\$)+$")  # a final stop, \\ or comma
_SAYS = r"(?:(?:so|thus|hence|therefore),?\s+)?(?:the\s+)?(?:final\s+)?answer\s*(?:is|:|=)\s*:?\s*"
BEFORE = re.compile(
    rf"^(?:\\text\{{\s*{_SAYS}\}}|{_SAYS}|\\approx(?![a-zA-Z])|=|(?:\\text\{{\s*\([A-E]\)\s*\}}|\([A-E]\))(?=\s*\S))\s*",
    re.I,
)  # "The answer is", and (B) before 27


def undress(text: str) -> str:
    r"""Without what changes no value: fonts, colours, spaces, environments, currency, a final stop, "Answer:", "(B)".

    >>> undress(r"\text{ (B) } 27"), undress(r"\begin{array}{c}7\end{array}"), undress(r"9\."), undress(r"\pounds 18")
    ('27', '7', '9', '18')
    """
    for pattern, replacement in CLOTHES:
        text = re.sub(pattern, replacement, text)
    before = None
    while text != before:
        before = text
        text = BEFORE.sub("", ENDS.sub("", text.strip()))
        in_braces = re.fullmatch(r"(\\text)?\{(.*)\}", text, re.DOTALL)
        if in_braces and _is_balanced(in_braces[2]):  # they are around all of it
            is_word = in_braces[1] and re.fullmatch(r"\s*[a-zA-Z][a-zA-Z' -]+", in_braces[2])
            text = text if is_word else in_braces[2]
    return re.sub(r"^[a-z]\s*(?=\([^()\[\]]*\]$|\[[^()\[\]]*\)$)", "", text)  # t(0,4], an interval of t


def _is_balanced(text: str) -> bool:
    depth = 0
    for token in re.findall(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(token, 0)
        if depth < 0:
            return False
    return depth == 0


def programming(text: str) -> str:
    r"""What Python and calculators write, as some golds do.

    >>> programming("np.arcsin(10/13)"), programming("-2 + exp(9)"), programming("2*pi"), programming("4.5E-7")
    ('\\arcsin(10/13)', '-2 + e^{9}', '2 \\cdot \\pi', '4.5 \\times 10^{-7}')
    >>> programming("-1./3"), programming(r"6\sqrt(2)"), programming(r"2.5 \text{E}-3")
    ('-1/3', '6\\sqrt{2}', '2.5 \\times 10^{-3}')
    """
    text = re.sub(r"(?:np|math|numpy)\.", "", text)
    text = re.sub(r"(?<=[0-9])\s*(?:[eE]|\\text\{E\})\+?(-?[0-9]{1,3})(?![0-9.])", r" \\times 10^{\1}", text)
    text = re.sub(r"(?<![a-zA-Z\\])(arc(?:sin|cos|tan)|sin|cos|tan|ln|log)(?=\s*\()", r"\\\1", text)
    text = re.sub(r"\\?(?<![a-zA-Z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\?(?<![a-zA-Z])exp\s*(?:\(([^()]*)\)|\{([^{}]*)\})", lambda m: f"e^{{{m[1] or m[2]}}}", text)
    text = re.sub(r"(?<![a-zA-Z\\])(pi|infinity)(?![a-zA-Z])", lambda m: {"p": r"\pi", "i": r"\infty"}[m[1][0]], text)
    text = re.sub(r"\s*(?<!\*)\*(?!\*)\s*", r" \\cdot ", text)
    return re.sub(r"(?<=[0-9])\.(?![0-9.]|\\overline)", "", text)


def numbers(text: str) -> str:
    r"""Whole numbers and decimals in one spelling: thousands, zeros, names of powers of ten, repeating decimals.

    >>> numbers("27.0"), numbers("x = 2,125"), numbers("70 000"), numbers("(1,234)"), numbers(".50"), numbers("044")
    ('27', 'x = 2125', '70000', '(1,234)', '0.50', '44')
    >>> numbers(r"7 \text{ million}"), numbers(r"0.\overline{6}"), numbers("0,3")
    ('7 \\times 10^{6}', '\\frac{6}{9}', '0,3')
    """
    if not re.search(r"[(\[{]\s*-?[0-9]{1,3}(?:,[0-9]{3})+\s*[)\]}\\]", text):  # (1,234) is a pair
        text = re.sub(
            r"(?<![\d,.])([1-9]\d{0,2}(?:,\d{3})+|[1-9]\d{0,2}(?: \d{3})+)(?![\d,])",
            lambda m: re.sub("[, ]", "", m[1]), text,
        )  # fmt: skip
    text = re.sub(r"(?<![\d.])0+(?=\d)(?!\d*,)|(?<![\d.])(?=\.\d)", lambda m: "" if m[0] else "0", text)
    text = re.sub(r"(?<![\d.])(\d+)\.0+(?![\d.])", r"\1", text)
    text = re.sub(r"(?<![\d.])(\d+)\.(\d*)\\overline\{(\d{1,20})\}", _repeating, text)
    powers = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
    return re.sub(
        r"(?<=[0-9])\s*(?:\\text\{\s*)?(thousand|million|billion|trillion)(?![a-z])\s*([a-zA-Z ]*)\}?",
        lambda m: rf" \times 10^{{{powers[m[1]]}}}" + (rf" \text{{ {m[2]}}}" if m[2] else ""), text,
    )  # fmt: skip


def _repeating(match: re.Match) -> str:
    whole, fixed, repeated = match.groups()
    nines = 10 ** len(fixed) * (10 ** len(repeated) - 1)
    return rf"\frac{{{int(whole + fixed + repeated) - int(whole + fixed)}}}{{{nines}}}"


def read_gold(text: str, unit: str | None = None, tolerance: str | float | None = None) -> str:
    r"""A dataset's answer as the judge wants it: tidy, with the unit and the tolerance that its columns give.

    >>> read_gold("27.0"), read_gold("$1,000$"), read_gold("np.arcsin(10/13)"), read_gold("t(0,4]")
    ('27', '1000', '\\arcsin(10/13)', '(0,4]')
    >>> read_gold("5", r"$\mathrm{~cm}$", "1e-1")
    '5 \\text{ cm} within 0.1'
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


# 3. The judge: rules that settle an answer, or make simpler questions of it.


def is_right(gold: str, answer: str, ask: Ask) -> bool:
    r"""Is the answer, as `find` found it, equal to the gold? ask: math-verify's verdict on two expressions.

    A gold that ends in " within 0.1" is a number that may be missed by so much.

    >>> is_right("1,000", r"\$1000.00", None), is_right("3.1 within 0.1", "3", None), is_right("7", "7 or 8", None)
    (True, True, False)
    """
    number, within = WITHIN.fullmatch(gold).groups()
    return len(answer) <= LONGEST and equal(tidy(number), tidy(answer), ask, Fraction(within or 0))


WITHIN = re.compile(r"(.*?)(?: within ([0-9.]+(?:e-?[0-9]{1,2})?))?", re.DOTALL)


def equal(gold: str, answer: str, ask: Ask, within: Fraction = Fraction(0)) -> bool:
    """Are two tidy texts the same answer, or numbers that differ by no more than within?

    The rules come in this order. The first that has a verdict (not None) has the last word.
    """
    gold, unit = split_unit(gold)
    answer, _ = split_unit(answer, unit)
    if not gold or not answer:
        return False
    if squeeze(gold) == squeeze(answer):
        return True
    if (verdict := values(gold, answer, within)) is not None:
        return verdict
    again = partial(equal, ask=ask, within=within)
    for rule in (words, bases, ranges, lists, tuples, equations, approximations, no_values):
        if (verdict := rule(gold, answer, again)) is not None:
            return verdict
    return ask(*symbols(gold, answer), within)


def squeeze(text: str) -> str:
    """Without spaces, but for those between digits: 1 2 is not 12."""
    return re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", text)


TEXT = r"(?<![_^])\\text\{\s*[a-zA-Z](?:[a-zA-Z .'/-]|\^\{?-?[0-9]\}?)*\}"
BARE = (
    r"(?<![a-zA-Z\\])(?:[cmk]?m|k?g|m?l|s|h)(?=\^|²|/)|(?<![a-zA-Z\\{_^])"
    r"(?:[cmk]m|[mk]g|m[lL]|in(?:ch(?:es)?)?|ft|feet|foot|yards?|miles?|met(?:er|re)s?|lit(?:er|re)s?|grams?|degrees?|"
    r"radians?|sec(?:ond)?s?|min(?:ute)?s?|h(?:ou)?rs?|days?|weeks?|months?|years?|cents?|dollars?|USD|EUR|GBP|euros?|"
    r"pounds?|mph|km/h|m/s|units?|square|cubic)"
)
UNIT = re.compile(rf"(?:{TEXT}|\\frac\{{{TEXT}\}}\{{{TEXT}\}}|{BARE}|\^\{{?\\text\{{(?:th|st|nd|rd)\}}\}}?|\^\\circ)"
                  r"(?:\s*\^\{?-?\d\}?)?\s*$")  # fmt: skip
NO_UNIT = re.compile(
    r"\b(?:or|and|not|no|is|are|if|when|than|then|more|less|fewer|least|most|greater|about|mod|dozens?|hundreds?|score|"
    r"times|half|halves|thirds?|quarters?|wrong|right|incorrect|correct|base)\b"
)


HAS_VALUE = re.compile(r"[\w)}\]|!%](?:\s|\\cdot|\\times|/)*$")


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


def value(text: str) -> Fraction | None:
    r"""The number that a text is: whole, decimal, a fraction, or with a power of ten; None for anything else.

    >>> value("-3.50"), value(r"2.88 \times 10^{-19}") == Fraction("2.88e-19"), value(r"-\frac{6}{8}"), value("6/0")
    (Fraction(-7, 2), True, Fraction(-3, 4), None)
    """
    text = squeeze(text)
    if found := re.fullmatch(r"([-+]?[0-9]+(?:\.[0-9]+)?)(?:\\(?:times|cdot)10\^\{?([-+]?[0-9]{1,3})\}?)?", text):
        return Fraction(found[1]) * Fraction(10) ** int(found[2] or 0)
    if found := re.fullmatch(r"([-+]?)10\^\{?([-+]?[0-9]{1,3})\}?", text):
        return Fraction(found[1] + "1") * Fraction(10) ** int(found[2])
    frac = r"\\frac(?:\{([-+]?[0-9]+)\}|([0-9]))(?:\{([-+]?[0-9]+)\}|([0-9]))"
    if found := re.fullmatch(rf"([-+]?)(?:{frac}|([0-9]+)/([0-9]+))", text):
        sign, *parts = found.groups()
        top, bottom = (int(part) for part in parts if part)
        return Fraction(top, bottom) * int(sign + "1") if bottom else None
    return None


def values(gold: str, answer: str, within: Fraction) -> bool | None:
    r"""Numbers are exact. A percentage p is p or p/100, as the gold is.

    >>> [values(*pair, 0) for pair in (("2.88e-19", "x"), ("1/3", "0.333"), ("0.5", r"50\%"), ("50", r"50\%"))]
    [None, False, True, True]
    """
    in_percent = gold.endswith("%"), answer.endswith("%")
    theirs, ours = (value(re.sub(r"\\?%$", "", text)) for text in (gold, answer))
    if theirs is None or ours is None:
        return None
    scales = [1] if in_percent[0] == in_percent[1] else [1, 100] if in_percent[0] else [1, Fraction(1, 100)]
    return any(abs(theirs - ours * scale) <= within for scale in scales)


NO_SOLUTIONS = ("no solutions", "no real solution", "no real solutions")
NOTHING = (r"\emptyset", r"\varnothing", r"\{\}", "empty set", "none", *NO_SOLUTIONS)
SYNONYMS = dict.fromkeys(NOTHING, "no solution") | {"dne": "does not exist", "doesn't exist": "does not exist"}


def words(gold: str, answer: str, again: Ask) -> bool | None:
    r"""Words are compared as words, without case: they are no products of their letters.

    >>> words(r"\text{east}", "East", None), words("east", "seat", None), words("xy", "yx", None)
    (True, False, None)
    >>> words(r"\text{DNE}", r"\text{does not exist}", None), words(r"\text{no solution}", r"\emptyset", None)
    (True, True)
    """
    bare = [re.sub(r"\\text\{([^{}]*)\}", r"\1", text).strip(" ().").lower() for text in (gold, answer)]
    bare = [SYNONYMS.get(text, text) for text in bare]
    if not re.fullmatch(r"[a-z][a-z' -]+", bare[0]):
        return None
    if bare[0] == bare[1]:
        return True
    is_text = "\\text" in gold or "\\text" in answer or min(map(len, bare)) >= 4
    return False if is_text and re.fullmatch(r"[a-z][a-z' -]+", bare[1]) else None


BASE_NAMES = dict(two=2, three=3, four=4, five=5, six=6, seven=7, eight=8, nine=9, ten=10, twelve=12, sixteen=16)


def bases(gold: str, answer: str, again: Ask) -> bool | None:
    r"""Numerals in a base are compared as they stand. The base may be missing, but may not be another.

    >>> [bases("52_8", answer, None) for answer in ("52_{8}", r"(52)_{\text{eight}}", "52", "52_9", "42")]
    [True, True, True, False, False]
    >>> bases("7", "7_8", None), bases("7", "7_{10}", None), bases("x_1", "x_2", None)
    (False, True, None)
    """
    numeral = r"\(?([0-9A-F]+)\)?(?:_\{?(?:\\text\{)?\s*(?:base\s*)?([0-9]+|[a-z]+)\s*\}*)?"
    found = [re.fullmatch(numeral, squeeze(text)) for text in (gold, answer)]
    if not any(f and f[2] for f in found):
        return None
    if not all(found):
        return False
    (theirs, base), (ours, our_base) = (f.groups() for f in found)
    base, our_base = (str(BASE_NAMES.get(b, b)) if b else None for b in (base, our_base))
    return theirs == ours and our_base in (base or "10", None)


SIGN = re.compile(r"(\\le(?![a-z])|\\ge(?![a-z])|\\lt(?![a-z])|\\gt(?![a-z])|<=|>=|<|>)")
VARIABLE = r"(?:[a-zA-Z]|\\[a-z]+)(?:_(?:\w|\{[^{}]*\}))?"


def ranges(gold: str, answer: str, again: Ask) -> bool | None:
    r"""An inequality is an interval, where the other one is. A membership is its set.

    >>> def text(gold, answer): return squeeze(gold) == squeeze(answer)
    >>> ranges(r"(-\infty,2)\cup(3,4]", r"x<2 \text{ or } 3 < x \le 4", text)
    True
    >>> ranges(r"x \in [2,5)", r"2 \le x < 5", text), ranges(r"k \ge 2", r"[2, \infty)", text)
    (True, True)
    >>> ranges("[2,5)", "[2,5)", text), ranges("x > 7", "7", text)
    (None, None)
    """
    texts = [re.sub(rf"^{VARIABLE}\s*\\in(?![a-z])\s*", "", text) for text in (gold, answer)]
    are_inequalities = [bool(SIGN.search(text)) for text in texts]
    if any(are_inequalities) and not all(are_inequalities):
        other = texts[0] if are_inequalities[1] else texts[1]
        if not re.search(r"^[(\[].*,.*[)\]]$", other):
            return None
        texts = [interval(text) if is_one else text for text, is_one in zip(texts, are_inequalities)]
    elif all(are_inequalities):  # of the same variable and numbers
        letters = [set(re.sub(rf"{OR}|\\[a-zA-Z]+|[^a-zA-Z]", "", text)) for text in texts]
        if letters[0] == letters[1] and len(letters[0]) == 1:
            texts = [interval(text) for text in texts]
    if None in texts or texts == [gold, answer]:
        return None
    return again(*texts)


def interval(text: str) -> str | None:
    r"""An inequality as an interval, several joined by "or" as their union; None for anything else.

    >>> interval(r"-2 < x \le 7"), interval("3 > k"), interval(r"x < y < z = 4"), interval("x < 1 or x > 2")
    ('(-2,7]', '(-\\infty,3)', None, '(-\\infty,1)\\cup (2,\\infty)')
    """
    found = []
    for part in re.split(OR, text):
        ends = [end.strip() for end in SIGN.split(part)]  # value, sign, value, ...
        ends[1::2] = [{r"\lt": "<", r"\gt": ">", "<=": r"\le", ">=": r"\ge"}.get(sign, sign) for sign in ends[1::2]]
        if len(ends) == 5 and ends[1] in (">", r"\ge"):  # the smaller end first
            ends = ends[::-1]
            ends[1::2] = [{">": "<", r"\ge": r"\le"}.get(sign, sign) for sign in ends[1::2]]
        if len(ends) == 3 and not re.fullmatch(VARIABLE, ends[0]):
            ends = [ends[2], {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}[ends[1]], ends[0]]
        if len(ends) == 3 and re.fullmatch(VARIABLE, ends[0]):
            name, sign, end = ends
            below = sign in ("<", r"\le")
            above = [end, "<" if sign == ">" else r"\le", name, "<", r"\infty"]
            ends = [r"-\infty", "<", name, sign, end] if below else above
        if "=" in text or len(ends) != 5 or not re.fullmatch(VARIABLE, ends[2]) or {ends[1], ends[3]} - {"<", r"\le"}:
            return None
        found.append(f"{'(' if ends[1] == '<' else '['}{ends[0]},{ends[4]}{')' if ends[3] == '<' else ']'}")
    return r"\cup ".join(found)


OR = r"\s*,?\s*(?:\\text\{\s*,?\s*or\s*\}|(?<![a-zA-Z\\])or(?![a-zA-Z])|\\lor(?![a-z])|\\vee(?![a-z]))\s*"
AND = OR.replace("or", "and").replace("vee", "wedge")


def lists(gold: str, answer: str, again: Ask) -> bool | None:
    r"""A list, or set, is right in any order, each element as often as the gold has it. A set is no tuple.

    >>> def text(gold, answer): return squeeze(gold) == squeeze(answer)
    >>> [lists("3, 5", answer, text) for answer in ("5,3", r"\{3, 5\}", "(3, 5)", "3 or 5", "3", "3, 5, 5")]
    [True, True, True, True, False, False]
    >>> [lists("(3, 5)", answer, text) for answer in (r"\{3, 5\}", "3, 5", "5, 3")], lists("7", "7, 7", text)
    ([False, True, False], False)
    >>> lists(r"1 \pm x", r"1-x \text{ and } 1+x", text), lists("7", "8", text)
    (True, None)
    """
    theirs, ours = elements(gold), elements(answer)
    if len(theirs) == len(ours) == 1:
        return None
    their_tuple, our_tuple = bracketed(gold), bracketed(answer)
    if len(theirs) == 1 and their_tuple and not answer.endswith("\\}"):  # a tuple, and we forgot its parentheses
        return their_tuple[0] == "(" and len(ours) == len(their_tuple[1]) and all(map(again, their_tuple[1], ours))
    if len(ours) == 1 and our_tuple and not bracketed(theirs[0]):  # a list in parentheses
        ours = our_tuple[1]
    return len(theirs) == len(ours) <= LONGEST_LIST and _match(theirs, ours, again)


def _match(theirs: list[str], ours: list[str], again: Ask) -> bool:
    """Can the elements of two lists, equally long, be paired?

    With a tolerance, or per cent, the first partner may be the wrong one. So a partner may be given up for another
    (augmenting paths).

    >>> def near(gold, answer): return abs(float(gold) - float(answer)) <= 0.1
    >>> _match(["1", "1.15"], ["1.08", "0.95"], near), _match(["1", "1.15"], ["1.08", "1.2"], near)
    (True, True)
    >>> _match(["1", "1.15"], ["1.2", "1.2"], near)
    False
    """
    gold_of = {}  # number of an answer -> number of the gold that it is paired with

    def find_partner(gold: int, tried: set[int]) -> bool:
        for i, answer in enumerate(ours):
            if i not in tried and again(theirs[gold], answer):
                tried.add(i)
                if i not in gold_of or find_partner(gold_of[i], tried):
                    gold_of[i] = gold
                    return True
        return False

    return all(find_partner(gold, set()) for gold in range(len(theirs)))


def elements(text: str) -> list[str]:
    r"""The elements of a list or set, or the text alone. A plus-minus makes two.

    >>> elements(r"3, 5, \text{ and } 7"), elements("(1,2), (3,4]"), elements(r"x \in \{1; 2\}"), elements("f(x, y)")
    (['3', '5', '7'], ['(1,2)', '(3,4]'], ['1', '2'], ['f(x, y)'])
    >>> elements(r"x = 1 \pm \sqrt{5}"), elements("3 or 5")
    (['x = 1 + \\sqrt{5}', 'x = 1 - \\sqrt{5}'], ['3', '5'])
    """
    if inside := re.fullmatch(
        rf"(?:{VARIABLE}\s*(?:=|\\in(?![a-z]))\s*)?\\\{{((?:[^{{}}\\]|\\(?![{{}}])|{GROUP})*)\\\}}", text.strip()
    ):
        text = inside[1]
    found = []
    for part in split(re.sub(f"{OR}|{AND}", ",", text), r"[,;]"):
        if r"\pm" in part:
            found += [part.replace(r"\pm", "+").replace(r"\mp", "-"), part.replace(r"\pm", "-").replace(r"\mp", "+")]
        elif part:
            found.append(part)
    return found or [text]


def split(text: str, separator: str) -> list[str]:
    r"""Split where no bracket is open.

    >>> split(r"f(x,y),\{1,2\},3", ",")
    ['f(x,y)', '\\{1,2\\}', '3']
    """
    depth, parts = 0, [""]
    for token in re.findall(r"\\[a-zA-Z]+|\\.|!=|.", text, re.DOTALL):
        depth += 1 if token in ("(", "[", "{", r"\{") else -1 if token in (")", "]", "}", r"\}") else 0
        if depth <= 0 and re.fullmatch(separator, token):
            parts.append("")
        else:
            parts[-1] += token
    return [part.strip() for part in parts]


def bracketed(text: str) -> tuple[str, list[str], str] | None:
    """(bracket, elements, bracket) of a tuple or an interval; None for anything else.

    >>> bracketed("(1, 2]"), bracketed("(a+b)(c+d)"), bracketed("(7)")
    (('(', ['1', '2'], ']'), None, None)
    """
    if not re.fullmatch(r"[(\[].*[)\]]", text, re.DOTALL):
        return None
    depth = 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if depth == 0 and i < len(text) - 1:
            return None
    inside = split(text[1:-1], "[,;]")
    return (text[0], inside, text[-1]) if len(inside) > 1 else None


def tuples(gold: str, answer: str, again: Ask) -> bool | None:
    r"""Tuples and intervals are compared element by element, and so are their brackets. A column vector is a tuple.

    >>> def text(gold, answer): return gold == answer
    >>> [tuples("(3, 5)", answer, text) for answer in ("(3,5)", "(5,3)", "[3,5)", "3")]
    [True, False, False, None]
    >>> tuples(r"\begin{pmatrix} 3 \\ 5 \end{pmatrix}", "(3, 5)", text)
    True
    """
    are_matrices = ["matrix" in text for text in (gold, answer)]
    if any(are_matrices) and not all(are_matrices):
        gold, answer = (
            re.sub(
                r"^\\begin\{[pbv]?matrix\}([^&]*)\\end\{[pbv]?matrix\}$",
                lambda m: f"({m[1].replace(2 * chr(92), ',')})",
                t,
            )
            for t in (gold, answer)
        )
    theirs, ours = bracketed(gold), bracketed(answer)
    if not theirs or not ours:
        return None
    if len(theirs[1]) != len(ours[1]) or (len(ours[1]) == 2 and (theirs[0], theirs[2]) != (ours[0], ours[2])):
        return False
    return all(map(again, theirs[1], ours[1]))


NAME = rf"{VARIABLE}(?:'+)?(?:\([a-zA-Z]\))?|\([a-zA-Z](?:,\s*[a-zA-Z])*\)"


def equations(gold: str, answer: str, again: Ask) -> bool | None:
    r"""The value of an equation is its last side that is no name. Sides that are numbers must be equal to it.

    >>> def text(gold, answer): return gold == answer
    >>> [equations("7", answer, text) for answer in ("x = 7", "7 = x", "AB = 7", "8 = 7", "x = 6 = 7", "8")]
    [True, True, True, False, False, None]
    >>> equations("x = 7", "7", text), equations("x = 7", "y = 7", text), equations("N = n", "N = n+1", text)
    (True, False, False)
    >>> equations("f(x) = 2x", "f(t) = 2t", text), equations("MR = SRMC", "SRMC = MR", text)
    (True, True)
    """
    theirs, ours = split(gold, "="), split(answer, "=")
    if len(theirs) == len(ours) == 1 or not all(theirs + ours):
        return None
    # Two words that are equal are no definition of the first.
    if len(theirs) == 2 and all(re.fullmatch(r"(?:\\text\{)?[A-Z]{2,}\}?", side) for side in theirs):
        bare = [sorted(re.sub(r"\\text|[{}]", "", side) for side in sides) for sides in (theirs, ours)]
        return bare[0] == bare[1]
    is_definition = len(theirs) > 1 and re.fullmatch(NAME, theirs[0])
    if len(theirs) > 1 and not is_definition:
        return None  # an equation, as of a plane: math-verify's
    if len(theirs) > 1 and len(ours) > 1:
        if not re.fullmatch(NAME, ours[0]):
            return None
        if (renamed := _same_name(theirs[0], ours[0])) is None:
            return False
        if renamed:
            ours = [re.sub(rf"(?<![a-zA-Z\\]){renamed[0]}(?![a-zA-Z])", renamed[1], side) for side in ours]
    # The values, and among them the numbers, of both.
    ours = [side for side in ours if not re.fullmatch(NAME, side)] or ours[-1:]
    numbers = [side for side in ours[:-1] if not re.search(r"[a-zA-Z]", re.sub(CONSTANTS, "", side))]
    return all(again(side, ours[-1]) for side in numbers) and again(theirs[-1], ours[-1])


CONSTANTS = r"\\(?:frac|sqrt|cdot|times|pi|[lr]floor|[lr]ceil|binom|ln|log|sin|cos|tan|pm)(?![a-zA-Z])"


def _same_name(theirs: str, ours: str) -> tuple[str, str] | tuple | None:
    """None: two names. Otherwise what is to be renamed, () for nothing. The same: f(x) and f(t), m and m with an index.

    >>> _same_name("f(x)", "f(t)"), _same_name("m_{max}", "m"), _same_name("x", "y")
    (('t', 'x'), (), None)
    """
    theirs, ours = squeeze(theirs), squeeze(ours)
    argument = [re.fullmatch(r"(\w+)\((\w)\)", name) for name in (theirs, ours)]
    if all(argument) and argument[0][1] == argument[1][1] and argument[0][2] != argument[1][2]:
        return argument[1][2], argument[0][2]
    index = re.sub(r"_.*", "", theirs), re.sub(r"_.*", "", ours)
    return () if theirs == ours or (index[0] == index[1] and index != (theirs, ours)) else None


def approximations(gold: str, answer: str, again: Ask) -> bool | None:
    r"""An exact value may be followed by a decimal that is near it. Either is the answer; but 7 is not near 8.

    >>> def near(gold, answer, within=0): return abs(float(gold) - float(answer)) <= within
    >>> [approximations(gold, r"0.125 \approx 0.13", near) for gold in ("0.13", "0.125", "0.12")]
    [True, True, False]
    >>> approximations("7", r"7 \approx 8", near), approximations("7", "8", near)
    (False, None)
    """
    sides = split(answer, r"\\approx|\\simeq|\\doteq")
    if len(sides) == 1 or not all(sides):
        return None
    decimal = re.match(r"-?[0-9]*\.([0-9]+)", sides[-1])
    if len(sides) > 2 or not decimal or not again(*sides, within=Fraction(6, 10 ** (len(decimal[1]) + 1))):
        return False
    return again(gold, sides[0]) or again(gold, sides[1])


RELATION = re.compile(
    r"[<>?]|\\(?:le|ge|ne|lt|gt|neg|lnot|not|in|notin|to|rightarrow|implies|Rightarrow|iff|mid|nmid|sim|equiv|cup|cap|"
    r"vee|wedge|lor|land|ldots|dots|cdots|pm|mp|approx|bmod|pmod)(?![a-zA-Z])"
)


def expressions(gold: str) -> list[str]:
    r"""What math-verify would have to read of a tidy gold: nothing of numbers and words, single expressions of lists.

    >>> expressions("7"), expressions(r"\text{east}"), expressions(r"(2, \sqrt{3}), (y+1, 5]"), expressions("f(x) = 2x")
    ([], [], ['\\sqrt{3}', 'y+1'], ['2x'])
    """
    gold, _ = split_unit(WITHIN.fullmatch(gold)[1])
    parts = elements(gold)
    if len(parts) == 1 and (brackets := bracketed(parts[0])):
        parts = brackets[1]
    if len(parts) > 1:
        return [expression for part in parts for expression in expressions(part)]
    if interval(gold):
        return expressions(interval(gold))
    sides = split(gold, "=")
    if len(sides) == 2 and (re.fullmatch(NAME, sides[0]) or all(re.fullmatch("[A-Z]{2,}", side) for side in sides)):
        return expressions(sides[1])
    is_settled = value(re.sub(r"\\?%$", "", gold)) is not None or words(gold, gold, None) or bases(gold, gold, None)
    return [] if is_settled or gold in (r"\infty", r"-\infty", *NOTHING) else [_symbols(gold)]


def no_values(gold: str, answer: str, again: Ask) -> bool | None:
    r"""A relation is no value, if the gold has none. Two numbers side by side are none, nor is text beside a number.

    >>> [no_values("7", answer, None) for answer in (r"\ne 7", "> 7", r"8 \implies 7", "7 8", r"\text{not } 7", "x")]
    [False, False, False, False, False, None]
    """
    if RELATION.search(re.sub(GROUP, "", answer)) and not RELATION.search(re.sub(GROUP, "", gold)):
        return False
    if re.fullmatch(r"[-+]?[0-9.,]+(?:\s+[0-9.,]+)+", answer):
        return False
    return False if re.search(r"\\text\{[^{}]*\s[^{}]*\}", answer) and "\\text" not in gold else None


def symbols(gold: str, answer: str) -> tuple[str, str]:
    r"""Two expressions in symbols that math-verify's parser reads as they are meant.

    It takes E for Euler's number, i for any letter, drops the prime of y', and computes dy/dx as 0.

    >>> symbols(r"E_{1}+m \frac{d v}{d t}", r"y'+\dot\omega")
    ('\\text{E1}+m \\text{vprime}', '\\text{yprime}+\\text{omegaprime}')
    >>> symbols(r"\lambda_{\text{red}}/2", r"\lambda_{red}/2"), symbols(r"\log 2", r"\ln 2")
    (('\\text{lambdared}/2', '\\text{lambdared}/2'), ('\\ln 2', '\\ln 2'))
    """
    if r"\ln" in gold + answer:
        gold, answer = (re.sub(r"\\log(?![a-zA-Z_]|\s*_)", r"\\ln", text) for text in (gold, answer))
    return _symbols(gold), _symbols(answer)


def _symbols(text: str) -> str:
    greek = (
        r"\\(?:alpha|beta|gamma|delta|epsilon|theta|lambda|mu|nu|rho|sigma|tau|phi|psi|omega|Delta|Omega)(?![a-zA-Z])"
    )
    name = rf"({greek}|[a-zA-Z])"
    text = re.sub(rf"\\frac\{{d\s*{name}\s*\}}\{{d\s*[a-zA-Z]\s*\}}", r"{\1}'", text)
    text = re.sub(rf"\\dot\s*(?:\{{\s*{name}\s*\}}|{name})", lambda m: f"{{{m[1] or m[2]}}}'", text)
    text = re.sub(r"\^\{?((?:\\prime\s*)+)\}?", lambda m: "'" * m[1].count("prime"), text)

    def symbol(match: re.Match) -> str:
        letter, index, primes = match[1] or match[2], match[3], match[4]
        if letter is None or not (index or primes or letter in ("E", r"\gamma")):
            return match[0]
        index = re.sub(r"\\text|[^a-zA-Z0-9]", "", index or "")
        return (
            rf"\text{{{letter.strip(chr(92))}{index}{'letter' if not index + primes else ''}{'prime' * len(primes)}}}"
        )

    # A letter, in braces or not, its index and its primes; any other command is left as it is.
    index = r"(?:_(\w|\{(?:[^{}]|\{[^{}]*\})*\}|\\text\{[^{}]*\}))?"
    return re.sub(rf"(?:\{{{name}\}}(?=')|{name}|\\[a-zA-Z]+(?:\{{[a-z]*matrix\}})?){index}('*)", symbol, text)
