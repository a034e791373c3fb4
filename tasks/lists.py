r"""How lists, tuples and intervals are written, and what their elements are."""

import re

NAME = r"(?:[a-zA-Z]|\\[a-z]+)(?:_(?:\w|\{[^{}]*\}))?"  # of a variable: x, \theta, x_1
IN = r"\\in(?![a-z])"
# *+ takes all blanks at once, and never tries fewer: else a thousand of them would take ten seconds.
OR = r"\s*+,?\s*+(?:\\text\{\s*+,?\s*+or\s*\}|(?<![a-zA-Z\\])or(?![a-zA-Z])|\\lor(?![a-z])|\\vee(?![a-z]))\s*"
AND = OR.replace("or", "and").replace("vee", "wedge")
SIGN = re.compile(r"(\\le(?![a-z])|\\ge(?![a-z])|<|>)")
TURNED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}


def split(text: str, separator: str) -> list[str]:
    r"""Split where no bracket is open.

    >>> split(r"f(x,y),\{1,2\},3", ",")
    ['f(x,y)', '\\{1,2\\}', '3']
    """
    parts = [""]
    for token, depth in _tokens(text):
        if depth <= 0 and re.fullmatch(separator, token):
            parts.append("")
        else:
            parts[-1] += token
    return [part.strip() for part in parts]


def _tokens(text: str) -> list[tuple[str, int]]:
    """The characters and commands of a text, each with the number of brackets that are open after it."""
    tokens, depth = [], 0
    for token in re.findall(r"\\[a-zA-Z]+|\\.|.", text, re.DOTALL):
        depth += (token in ("(", "[", "{", r"\{")) - (token in (")", "]", "}", r"\}"))
        tokens.append((token, depth))
    return tokens


def elements(text: str) -> list[str]:
    r"""The elements of a list or set, or the text alone. A plus-minus makes two.

    >>> elements(r"3, 5, \text{ and } 7"), elements("(1,2), (3,4]"), elements(r"x \in \{1; 2\}"), elements("f(x, y)")
    (['3', '5', '7'], ['(1,2)', '(3,4]'], ['1', '2'], ['f(x, y)'])
    >>> elements(r"x = 1 \pm \sqrt{5}"), elements("3 or 5")
    (['x = 1 + \\sqrt{5}', 'x = 1 - \\sqrt{5}'], ['3', '5'])
    """
    if a_set := re.fullmatch(rf"(?:{NAME}\s*(?:=|{IN})\s*)?\\\{{((?:(?!\\[{{}}]).)*)\\\}}", text.strip(), re.DOTALL):
        text = a_set[1]
    found = []
    for part in split(re.sub(f"{OR}|{AND}", ",", text), "[,;]"):
        if r"\pm" in part:
            found += [part.replace(r"\pm", "+").replace(r"\mp", "-"), part.replace(r"\pm", "-").replace(r"\mp", "+")]
        elif part:
            found.append(part)
    return found or [text]


def bracketed(text: str) -> tuple[str, list[str], str] | None:
    """(bracket, elements, bracket) of a tuple or an interval; None for anything else.

    >>> bracketed("(1, 2]"), bracketed("(a+b)(c+d)"), bracketed("(7)")
    (('(', ['1', '2'], ']'), None, None)
    """
    if not re.fullmatch(r"[(\[].*[)\]]", text, re.DOTALL) or any(depth == 0 for _, depth in _tokens(text)[:-1]):
        return None
    inside = split(text[1:-1], "[,;]")
    return (text[0], inside, text[-1]) if len(inside) > 1 else None


def interval(text: str) -> str | None:
    r"""An inequality as an interval, several joined by "or" as their union; None for anything else.

    >>> interval(r"-2 < x \le 7"), interval("3 > k"), interval(r"x < y < z = 4"), interval("x < 1 or x > 2")
    ('(-2,7]', '(-\\infty,3)', None, '(-\\infty,1)\\cup (2,\\infty)')
    """
    intervals = []
    for part in re.split(OR, text):
        pieces = [piece.strip() for piece in SIGN.split(part)]  # "3 > k": "3", ">", "k"
        starts_with_name = bool(re.fullmatch(NAME, pieces[0]))
        is_falling = all(sign in (">", r"\ge") for sign in pieces[1::2])
        if is_falling:  # turn it round: "k", "<", "3"
            pieces = [TURNED.get(piece, piece) for piece in reversed(pieces)]
        if len(pieces) == 3:  # add the other end
            has_upper_end = starts_with_name != is_falling
            pieces = [r"-\infty", "<", *pieces] if has_upper_end else [*pieces, "<", r"\infty"]
        if len(pieces) != 5 or not re.fullmatch(NAME, pieces[2]) or "=" in part:
            return None
        lower, lower_sign, _, upper_sign, upper = pieces
        if not {lower_sign, upper_sign} <= {"<", r"\le"}:
            return None
        intervals.append(f"{'(' if lower_sign == '<' else '['}{lower},{upper}{')' if upper_sign == '<' else ']'}")
    return r"\cup ".join(intervals)
