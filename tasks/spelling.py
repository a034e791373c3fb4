r"""How an answer is written: `tidy` gives one spelling to what means the same, `symbols` the one for math-verify."""

import re

GROUP = r"\{(?:[^{}]|\{[^{}]*\})*\}"  # braces around text that may have braces once more


def tidy(text: str) -> str:
    r"""A gold or an answer in plain LaTeX: without fonts, colours and dollar signs, each number in one form.

    >>> tidy(r"$\textbf{27.0}$."), tidy(r"\textcolor{red}{\displaystyle 7}\\"), tidy("2√3"), tidy(r"90\degree")
    ('27', '7', '2\\sqrt{3}', '90^\\circ')
    >>> tidy(r"\text{ (B) } 27"), tidy(r"\begin{array}{c}7\end{array}"), tidy(r"9\."), tidy(r"\pounds 18")
    ('27', '7', '9', '18')

    Some golds are written as in Python.

    >>> tidy("np.arcsin(10/13)"), tidy("-2 + exp(9)"), tidy("2*pi"), tidy("4.5E-7"), tidy("-1./3"), tidy("x**12")
    ('\\arcsin(10/13)', '-2 + e^{9}', '2 \\cdot \\pi', '4.5 \\times 10^{-7}', '-1/3', 'x^{12}')
    """
    text = re.sub(r"√\s*(?:\{([^{}]*)\}|\(([^()]*)\)|([0-9]+|\w))", r"\\sqrt{\1\2\3}", text)
    text = text.translate(CHARACTERS)
    text = re.sub(r"\\(?:left|right)\s*\.", "", text)
    text = re.sub(r"\\([a-zA-Z]+)", lambda command: COMMANDS.get(command[1], command[0]), text)
    for pattern, replacement in REWRITES:
        text = re.sub(pattern, replacement, text)
    return tidy_numbers(strip(text))


CHARACTERS = str.maketrans({
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "∪": r"\cup ", "∈": r"\in ", "±": r"\pm ",
    "°": r"^\circ ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ", "ω": r"\omega ",
    "∅": r"\emptyset ", "²": "^{2}", "³": "^{3}", "½": r"\frac{1}{2}", "\u00a0": " ", "’": "'", "′": "'",
    **dict.fromkeys("£€¥", ""),
})  # fmt: skip

# Commands without their backslash, and what stands for them.
COMMANDS = {
    **dict.fromkeys("left right big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr".split(), ""),
    **dict.fromkeys("displaystyle textstyle large Large huge bf it rm bold boldsymbol bm underline emph".split(), ""),
    **dict.fromkeys("pounds checkmark".split(), ""),
    **dict.fromkeys("quad qquad".split(), " "),
    **dict.fromkeys("textbf textit textrm textnormal textsf mbox operatorname".split(), r"\text"),
    **dict.fromkeys("mathrm mathbf mathit mathsf".split(), r"\text"),
    **dict.fromkeys("dfrac tfrac cfrac".split(), r"\frac"),
    **dict.fromkeys("degree degrees textdegree".split(), r"^\circ"),
    **dict.fromkeys("geq geqslant".split(), r"\ge "),
    **dict.fromkeys("leq leqslant".split(), r"\le "),
    "neq": r"\ne ",
    "lt": "<",
    "gt": ">",
}

# (pattern, replacement), in this order.
REWRITES = [
    # Spaces, dollar signs, environments
    (r"\\!|(?<=[0-9])\\,(?=[0-9])|&(?==)", ""),  # 12\,345
    (r"\{,\}", ","),  # 12{,}345
    (r"\\\$", ""),  # \$5 is money
    (r"\$\s*,\s*\$", ", "),  # $1$,$200$ is a list, not 1,200
    (r"(?<=[\w)])\*\*(-?\d+|\w\b|\([^()]*\))", r"^{\1}"),  # x**2; any other ** is bold text in Markdown
    (r"(?<!\\)\\[\[\]()]|[$`\"]|\*\*", ""),
    (r"(?<!\\)\\[,;: ]|~", " "),
    (r"\\(?:textcolor|color)\{[^{}]*\}", ""),
    (r"\\begin\{(aligned|align\*?|gathered|array)\}(?:\{[clr|]*\})?(.*?)\\end\{\1\}", r"\2"),
    # Text
    (r"\\text\s+\{", r"\\text{"),
    (r"\\text\{\s*([ie])\s*\}", r"\1"),  # the imaginary unit, Euler's number
    (r"\\text\{([^{}a-zA-Z]*)\}", r"\1"),  # text without letters
    *[  # 7 million; 7 \text{ million people}
        (rf"(?<=[0-9])\s*(?:\\text\{{\s*{name}\s*\}}|(\\text\{{)?\s*{name}(?![a-z]))", rf" \\times 10^{{{zeros}}}\1")
        for name, zeros in (("thousand", 3), ("million", 6), ("billion", 9), ("trillion", 12))
    ],
    # One form of several
    (r"\^(?:\{\s*\^?\\circ\s*\}|\^\\circ)", r"^\\circ"),  # ^{\circ}
    (r"\+\s*\\infty", r"\\infty"),
    (r"<=", r"\\le "),
    (r">=", r"\\ge "),
    (r"!=", r"\\ne "),
    # As in Python
    (r"(?:np|math|numpy)\.", ""),
    (r"(?<=[0-9])\s*(?:[eE]|\\text\{E\})\+?(-?[0-9]{1,3})(?!\.?[0-9])", r" \\times 10^{\1}"),
    (r"(?<![a-zA-Z\\])(arc(?:sin|cos|tan)|sin|cos|tan|ln|log)(?=\s*\()", r"\\\1"),
    (r"\\?(?<![a-zA-Z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"\\?(?<![a-zA-Z])exp\s*(?:\(([^()]*)\)|\{([^{}]*)\})", r"e^{\1\2}"),
    (r"(?<![a-zA-Z\\])pi(?![a-zA-Z])", r"\\pi"),
    (r"(?<![a-zA-Z\\])infinity(?![a-zA-Z])", r"\\infty"),
    (r"\s*\*\s*", r" \\cdot "),
    # Repeating decimals: 0.41666... is 0.41\overline{6}
    (r"(?<![0-9.])([0-9]+\.[0-9]*?)([0-9]+?)\2+(?:\\l?dots|\.\.\.)$", r"\1\\overline{\2}"),
    (r"(?<=[0-9])\.(?![0-9.]|\\overline)", ""),  # 7. is 7
]

TAIL = re.compile(r"(?:[\s.,;:]|\\\\|\\\.|\\$)+$")  # a final stop, \\ or comma
SAYS = r"(?:so\s+)?(?:the\s+)?(?:final\s+)?answer\s*(?:is|:|=)\s*:?\s*"
HEADS = [
    r"=",
    r"\\approx(?![a-zA-Z])",
    rf"{SAYS}|\\text\{{\s*{SAYS}\}}",  # The answer is 27
    r"(?:\([A-E]\)|\\text\{\s*\([A-E]\)\s*\})(?=\s*\S)",  # (B) 27
]
HEAD = re.compile(rf"^(?:{'|'.join(HEADS)})\s*", re.IGNORECASE)


def strip(text: str) -> str:
    r"""Without what stands before an answer or after it, and without braces around it.

    >>> strip("The answer is: {27}."), strip(r"(B) \text{27 }\\"), strip(r"\text{even}")
    ('27', '27', '\\text{even}')
    """
    before = None
    while text != before:
        before = text
        text = HEAD.sub("", TAIL.sub("", text.strip()))
        opening = re.match(r"(?:\\text)?\{", text)
        inside = text[opening.end() : -1] if opening else ""
        is_word = text.startswith("\\") and re.fullmatch(r"\s*[a-zA-Z][a-zA-Z' -]+", inside)
        if opening and not is_word and closing_brace(text[opening.end() :]) == len(inside):
            text = inside
    return re.sub(r"^[a-z]\s*(?=\([^()\[\]]*\]$|\[[^()\[\]]*\)$)", "", text)  # t(0,4] is an interval of t


def closing_brace(text: str) -> int | None:
    r"""Where in a text a brace closes that was opened before it. An escaped one, \}, does not.

    >>> closing_brace(r"\{1\}, \frac{1}{2}} and more}"), closing_brace("{1}")
    (18, None)
    """
    depth = 1
    for token in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            return token.start()
    return None


def tidy_numbers(text: str) -> str:
    r"""Whole numbers and decimals without commas for thousands and needless zeros. A repeating decimal is a fraction.

    >>> tidy_numbers("27.0"), tidy_numbers("x = 2,125"), tidy_numbers("70 000"), tidy_numbers("(1,234)")
    ('27', 'x = 2125', '70000', '(1,234)')
    >>> tidy_numbers(".50"), tidy_numbers("044"), tidy_numbers(r"0.\overline{6}"), tidy_numbers("0,3")
    ('0.50', '44', '\\frac{6}{9}', '0,3')
    """
    is_pair = re.search(r"[(\[{]\s*-?[0-9]{1,3}(?:,[0-9]{3})+\s*[)\]}\\]", text)  # (1,234)
    if not is_pair:
        thousands = r"(?<![\d,.])(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d{0,2}(?: \d{3})+)(?![\d,])"
        text = re.sub(thousands, lambda number: re.sub("[, ]", "", number[0]), text)
    text = re.sub(r"(?<![\d.:])0+(?=\d)", "", text)
    text = re.sub(r"(?<![\d.])(?=\.\d)", "0", text)
    text = re.sub(r"(?<![\d.])(\d+)\.0+(?![\d.])", r"\1", text)
    return re.sub(r"(?<![\d.])(\d+)\.(\d*)\\overline\{(\d{1,20})\}", _repeating_decimal, text)


def _repeating_decimal(match: re.Match) -> str:
    whole, fixed, repeated = match.groups()  # 0.41\overline{6}: "0", "41", "6", and (416 - 41) / 900
    top = int(whole + fixed + repeated) - int(whole + fixed)
    bottom = 10 ** len(fixed) * (10 ** len(repeated) - 1)
    return rf"\frac{{{top}}}{{{bottom}}}"


def squeeze(text: str) -> str:
    """Without spaces. Those between digits stay, because 1 2 is not 12."""
    return re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", text)


GREEK = r"\\(?:alpha|beta|gamma|delta|epsilon|theta|lambda|mu|nu|rho|sigma|tau|phi|psi|omega|Delta|Omega)(?![a-zA-Z])"
LETTER = rf"({GREEK}|[a-zA-Z])"
DERIVATIVE = rf"\\frac\{{d\s*{LETTER}\s*\}}\{{d\s*[a-zA-Z]\s*\}}|\\dot\s*(?:\{{\s*{LETTER}\s*\}}|{LETTER})"
# A letter, its index and its primes; or any other command, which is left as it is.
SYMBOL = re.compile(rf"(?:{LETTER}|\\[a-zA-Z]+)(?:_(\w|{GROUP}|\\text{GROUP}))?('*)")


def symbols(text: str) -> str:
    r"""An expression with names that math-verify's parser cannot misread.

    Without this it takes E and \gamma for Euler's numbers, drops the prime of y', and computes dy/dx as 0.

    >>> symbols(r"E_{1}+m \frac{d v}{d t}"), symbols(r"y'+\dot\omega"), symbols(r"\lambda_{\text{red}}/2")
    ('\\text{E1}+m  \\text{vprime}', '\\text{yprime}+ \\text{omegaprime}', '\\text{lambdared}/2')
    """
    text = re.sub(DERIVATIVE, r" \1\2\3'", text)
    text = re.sub(r"\^\{?((?:\\prime\s*)+)\}?", lambda primes: "'" * primes[1].count("prime"), text)
    return SYMBOL.sub(_name_symbol, text)


def _name_symbol(match: re.Match) -> str:
    letter, index, primes = match.groups()
    if not letter or not (index or primes or letter in ("E", r"\gamma")):
        return match[0]
    index = re.sub(r"\\text|[^a-zA-Z0-9]", "", index or "")
    ending = index + "prime" * len(primes) or "letter"
    return rf"\text{{{letter.lstrip(chr(92))}{ending}}}"
