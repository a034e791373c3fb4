r"""Where the answer stands in a response: in the last \boxed{...}."""

import re
from typing import NamedTuple

from tasks.lists import elements
from tasks.spelling import GROUP, closing_brace

LONGEST = 1_000  # characters of an answer; a longer one is wrong
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
FILLED_BOX = re.compile(BOX.pattern + r"\s*[^}\s]")
# \boxed 7 and \boxed\frac12: TeX also takes a number or a command.
BRACELESS_BOX = re.compile(
    rf"\\(?:boxed|fbox)(?![a-zA-Z]) *([-+]?(?:[0-9][0-9.,/]*|\\[dt]?frac *(?:[0-9] *|{GROUP}){{2}}|\\[a-zA-Z]+{GROUP}))"
)
MOST_BOXES = 50  # that are looked at, the last ones
NEXT_QUESTION = "\n\nQuestion:"  # a base model goes on with a question of its own; the prompts begin like this


def find(text: str, gold: str = "") -> str | None:
    r"""What the last box of a response holds, \boxed{...} or \fbox{...}; None if there is none.

    Boxes with only a comma, "and" or "or" between them are one list. If the gold is a list and the last box holds one
    element, all boxes together are the list. If the last box is not closed, or longer than LONGEST, the result is None.

    >>> find(r"\boxed{1}, no: \boxed{\frac{1}{2}}!"), find(r"\boxed{1} or \boxed{2"), find(r"so \boxed 7.")
    ('\\frac{1}{2}', None, '7')
    >>> find(r"$x=\boxed{3}$ and $y=\boxed{4}$"), find(r"\boxed{7}. I put it into \boxed as told, not \boxed{}.")
    ('3, 4', '7')
    >>> find(r"First \boxed{3}. Then \boxed{4}.", "4"), find(r"First \boxed{3}. Then \boxed{4}.", "5, 6")
    ('4', '3, 4')
    >>> find("\\boxed{7}\n\nQuestion: 2+2?\n\nAnswer: \\boxed{4}")
    '7'
    """
    if first_box := FILLED_BOX.search(text):
        end = first_box.end()
        text = text[:end] + text[end:].partition(NEXT_QUESTION)[0]
    boxes = _last_boxes(text)
    if not boxes:
        braceless = BRACELESS_BOX.findall(text[-10 * LONGEST :])
        return braceless[-1].rstrip(".,") if braceless else None
    if boxes[-1].content is None:
        return None
    # Go back to the first of the boxes that are one list with the last one.
    first = len(boxes) - 1
    while first > 0 and _is_joint(text[boxes[first - 1].end : boxes[first].start]):
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
    """The last boxes of a text, in its order. Empty boxes, and boxes around another box, are left out."""
    boxes = []
    for opening in list(BOX.finditer(text))[-MOST_BOXES:]:
        start, inside = opening.span()
        length = closing_brace(text[inside : inside + LONGEST + 1])
        if length is None:
            box = Box(None, start, inside)
        else:
            box = Box(text[inside : inside + length], start, inside + length + 1)
        if box.content is None or box.content.strip():
            if boxes and boxes[-1].end > box.start:
                boxes.pop()
            boxes.append(box)
    return boxes


def _is_joint(between: str) -> bool:
    r"""Is the text between two boxes only a comma, "and" or "or", perhaps with the name of the next value, as in y =?

    >>> _is_joint("$ and $"), _is_joint("$, $y = "), _is_joint(" wait, "), _is_joint(" ")
    (True, True, False, False)
    """
    bare = re.sub(r"[$\s]|\\[()\[\],;! ]|\\q?quad", "", between)
    return bool(re.fullmatch(r"(?:[,;]|,?and|,?or|,?\\text\{(?:and|or)\})(?:[^=,.]{1,20}=)?", bare))
