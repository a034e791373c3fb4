"""The verifier of maths answers and letters: right as math-verify is, and out of reach of whatever a model writes."""

import os
import random
import signal
import threading

import math_verify
import pytest

from tasks import verify


@pytest.fixture(autouse=True)
def no_memory_of_earlier_tests():
    verify._same.cache_clear()


RIGHT = [
    ("7", "7"), ("7", " 7. "), ("044", "44"), ("-3", "−3"), ("27.0", "27"), ("27", "27.00"),
    ("1000", "1,000"), ("1,000", "1000"), ("12345", "12{,}345"), ("1234567", "1\\,234\\,567"), ("18", "\\$18"),
    ("1/2", "0.5"), ("0.5", "1/2"), ("0.5", "\\frac12"), ("\\frac{3}{4}", "\\dfrac34"), ("-\\frac12", "\\frac{-1}{2}"),
    ("2\\sqrt{3}", "\\sqrt{12}"), ("(x+1)^2", "x^2+2x+1"), ("p-q", "p - q"), ("3e^{t}", "3 e^t"),
    ("4e33", "4\\times10^{33}"), ("4.5e-7", "4.5 \\cdot 10^{-7}"), ("9", "3^2"),
    ("\\{1,2\\}", "\\{2,1\\}"), ("1,2", "2, 1"), ("(1,2)", "\\left(1, 2\\right)"), ("[0,1)", "[0, 1)"),
    ("(-\\infty,0)\\cup(1,2]", "(1,2]\\cup(-\\infty,0)"),
    ("0.5", "50\\%"), ("50\\%", "0.5"), ("50", "50\\%"), ("5", "5\\text{ cm}"), ("5\\text{ cm}", "5"),
    ("336", "336^\\circ"), ("336^\\circ", "336"),
    ("5", "x=5"), ("x=5", "5"), ("\\text{odd}", "odd"), ("odd", "\\text{odd}"), ("\\text{Monday}", "Monday"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
]  # fmt: skip

WRONG = [
    ("7", "8"), ("7", ""), ("", ""), ("7", "70"), ("12", "1 2"), ("7", "-7"), ("1000", "1,00"), ("1/3", "0.333"),
    ("0.5", "1/3"), ("2\\sqrt{3}", "\\sqrt{13}"), ("(1,2)", "(2,1)"), ("[0,1)", "[0,1]"), ("\\{1,2\\}", "\\{1,2,3\\}"),
    ("x=5", "y=5"), ("\\text{odd}", "even"), ("7", "seven"), ("(x+1)^2", "x^2+1"), ("4e33", "4\\times10^{32}"),
    ("100,200", "200,300"), ("7", "7 or 8"), ("7", "\\text{7 or 8}"),
]  # fmt: skip


@pytest.mark.parametrize("target, answer", RIGHT)
def test_right_answers(target, answer):
    assert verify.maths(target, f"so \\boxed{{{answer}}}") == 1.0


@pytest.mark.parametrize("target, answer", WRONG)
def test_wrong_answers(target, answer):
    assert verify.maths(target, f"so \\boxed{{{answer}}}") == 0.0


def test_agrees_with_math_verify():
    """On all of the above and a grid of numbers, but for three that it misses."""

    def theirs(target, answer):
        return math_verify.verify(*(math_verify.parse(f"\\boxed{{{x}}}") for x in (target, answer)))

    ours_alone = {("1234567", "1\\,234\\,567"), ("4e33", "4\\times10^{33}"), ("4.5e-7", "4.5 \\cdot 10^{-7}")}
    numbers = ["3", "-3", "3.0", "3.5", "7/2", "\\frac{7}{2}", "1,500", "1500", "0", "0.0", "2^3", "8", "\\sqrt{64}"]
    pairs = RIGHT + WRONG + [(a, b) for a in numbers for b in numbers]
    differ = {p for p in pairs if theirs(*p) != (verify.maths(p[0], f"\\boxed{{{p[1]}}}") == 1.0)}
    assert differ == ours_alone


@pytest.mark.parametrize(
    "text, want",
    [
        ("7", 0.0),
        ("", 0.0),
        ("\\boxed{6} no, \\boxed{7}", 1.0),
        ("\\boxed{7} no, \\boxed{6}", 0.0),
        ("\\boxed{7} and then \\boxed{", 0.0),
        ("\\boxed{7} and then \\boxed", 0.0),
        ("\\boxed 7", 0.0),
        ("\\boxed {7}", 1.0),
        ("\\boxed{7", 0.0),
        ("\\boxed{7}}", 1.0),
        ("\\boxed{\\boxed{7}}", 1.0),
        ("\\boxed{{7}}", 1.0),
        ("$$\\boxed{7}$$ is the answer, 8 is not.", 1.0),
        ("\\boxed{7" + " " * 10**6 + "}", 0.0),
    ],
)
def test_which_answer_counts(text, want):
    assert verify.maths("7", text) == want


def test_escaped_braces_are_no_braces():
    assert verify.last_boxed("\\boxed{\\left\\{1, 2\\right.} }") == "\\left\\{1, 2\\right."


@pytest.mark.parametrize("answer", ["B", "b", "(B)", "\\text{B}", "\\textbf{(B)}", "$B$", " B. ", "\\mathrm{B}"])
def test_right_letters(answer):
    assert verify.choice("B", f"\\boxed{{A}} \\boxed{{{answer}}}") == 1.0


@pytest.mark.parametrize("answer", ["", "A", "Bob", "A and B", "B, C", "\\text{", "BB", "\\textB C", "10^{10^{10}}"])
def test_wrong_letters(answer):
    assert verify.choice("B", f"B \\boxed{{{answer}}}") == 0.0


SLOW = ["10^{10^{10}}", "9^{9^{9^{9}}}", "99999999!", "\\binom{10^8}{5*10^7}", "\\sum_{k=1}^{10^9} \\frac{1}{k}"]

HOSTILE = [
    "", " ", "{", "}", "\\", "\\{", "{" * 300 + "5" + "}" * 300, "{" * 10**6, "}" * 10**6, "\\boxed{" * 10**5,
    "5" * 900, "5" * 10**7, "1e999999999", "1." + "0" * 900 + "1", "9**9**9**9", "(" * 300 + "5" + ")" * 300,
    "5\0", "\0" * 100, "\ud800\udfff5", "\udcff", "٣", "\u202e5", "５", "x=" * 300 + "5", "=" * 900, "-" * 900 + "5",
    "\\input{/etc/passwd}", "\\def\\x{\\x\\x}\\x", "\\frac{1}{0}", "0/0", "\\frac{1", "\\sqrt", "5!!!!!!!!!!", "?",
    "__import__('os').system('false')", "\\text{" * 100 + "a" + "}" * 100, "\\begin{pmatrix}1&2", "$" * 900, "%" * 900,
    "\\lim_{x\\to\\infty} x^{x^x}/x!", "\\mathbb{R}", "\\emptyset", "\n" * 900, "1" + " " * 900 + "2",
    ",".join("5" * 400),
]  # fmt: skip


def score_a_thousand():
    """Rewards of the above and of random LaTeX, 1,000 in all, boxed and not."""
    rng = random.Random(0)
    pieces = [
        *"0123456789+-*/^_=(){}[]|!,.$%& \n",
        "\\frac",
        "\\sqrt",
        "\\boxed{",
        "\\left",
        "\\pi",
        "\0",
        "\ud800",
        "é",
    ]
    texts = [f"{before}{h}{after}" for h in SLOW + HOSTILE for before, after in (("\\boxed{", "}"), ("\\boxed{", ""))]
    while len(texts) < 1_000:
        texts.append("\\boxed{" + "".join(rng.choices(pieces, k=rng.randint(0, 12))) + "}")
    return [verify.maths("17", text) for text in texts]


def worker_memory():
    """Pages of it that are in memory, in bytes."""
    with open(f"/proc/{verify._worker.pid}/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("where", ["main thread", "other thread"])
def test_a_thousand_hostile_answers(where, monkeypatch):
    monkeypatch.setattr(verify, "DEADLINE", 0.3)
    verify.check()
    results = []
    if where == "main thread":
        results = score_a_thousand()
    else:
        thread = threading.Thread(target=lambda: results.extend(score_a_thousand()))
        thread.start()
        thread.join()
    assert len(results) == 1_000 and set(results) == {0.0}
    verify.check()  # and the next answer is judged as if nothing had happened
    assert worker_memory() < 200e6


def test_an_answer_that_takes_too_much_computing_is_wrong_and_remembered(monkeypatch):
    monkeypatch.setattr(verify, "DEADLINE", 0.5)
    verify.check()
    before, asked = verify._worker.pid, []
    assert verify.maths("5", "\\boxed{10^{10^{10}}}") == 0.0
    monkeypatch.setattr(verify, "_ask", lambda *question: asked.append(question))
    assert verify.maths("5", "\\boxed{10^{10^{10}}}") == 0.0 and not asked
    monkeypatch.undo()
    assert verify.maths("0.5", "\\boxed{2/4}") == 1.0 and verify._worker.pid != before
    with pytest.raises(ProcessLookupError):
        os.kill(before, 0)


def test_a_worker_that_is_late_to_start_gives_no_verdict(monkeypatch):
    """Its "ready" must not be taken as the verdict, nor a verdict as the answer to the next question."""
    verify._stop()
    monkeypatch.setattr(verify, "START", 0.0)
    assert verify.maths("0.5", "\\boxed{1/3}") == 0.0 and verify.maths("0.5", "\\boxed{10/20}") == 0.0
    monkeypatch.undo()
    assert verify.maths("0.5", "\\boxed{10/20}") == 1.0, "no verdict is not remembered as wrong"
    assert verify.maths("0.5", "\\boxed{1/3}") == 0.0 and verify.maths("0.5", "\\boxed{11/22}") == 1.0


def test_a_worker_that_is_not_given_time_to_answer_is_no_verdict(monkeypatch):
    verify.check()
    verify._worker.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(verify, "PATIENCE", 0.1)
    assert verify.maths("0.5", "\\boxed{12/24}") == 0.0
    monkeypatch.undo()
    assert verify.maths("0.5", "\\boxed{12/24}") == 1.0 and verify.maths("0.5", "\\boxed{12/25}") == 0.0


def test_a_killed_worker_comes_back():
    verify.check()
    verify._worker.kill()
    verify._worker.wait()
    assert verify.maths("0.5", "\\boxed{3/6}") == 1.0
    threading.Timer(0.3, verify._worker.kill).start()
    assert verify.maths("5", "\\boxed{9^{9^{9^{9}}}}") == 0.0  # killed over this one
    assert verify.maths("0.5", "\\boxed{4/8}") == 1.0


def test_an_interrupted_question_leaves_no_stale_answer(monkeypatch):
    verify.check()
    read = verify._read

    def interrupted(seconds):
        monkeypatch.setattr(verify, "_read", read)
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        verify.maths("0.5", "\\boxed{5/10}")
    assert verify.maths("0.5", "\\boxed{5/11}") == 0.0 and verify.maths("0.5", "\\boxed{6/12}") == 1.0


def test_a_forked_child_asks_a_worker_of_its_own():
    verify.check()
    ours = verify._worker.pid
    with verify._lock:  # as another thread might, at the moment of the fork
        child = os.fork()
        if child == 0:
            right = verify.maths("0.5", "\\boxed{7/14}") == 1.0 and verify._worker.pid != ours
            verify._stop()
            os._exit(0 if right else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert verify.maths("0.5", "\\boxed{8/16}") == 1.0 and verify._worker.pid == ours


def test_threads_share_the_worker():
    verify.check()
    results = []

    def judge(i):
        results.append(all(verify.maths(f"{i}/7", f"\\boxed{{{j * i}/{7 * j}}}") == 1.0 for j in range(2, 12)))
        results.append(verify.maths(f"{i}/7", f"\\boxed{{{i}/8}}") == 0.0)

    threads = [threading.Thread(target=judge, args=(i,)) for i in range(1, 7)]
    for step in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            step(thread)
    assert results == [True] * 12


def test_whole_numbers_never_reach_the_worker(monkeypatch):
    monkeypatch.setattr(verify, "_ask", None)
    for i in range(2_000):
        assert verify.maths("-12", f"{'thought ' * 50}\\boxed{{{i}}}") == 0.0
        assert verify.maths(str(i), f"\\boxed{{{i:,}}}") == 1.0


def test_a_missing_math_verify_is_an_error_when_loading(monkeypatch):
    verify._stop()
    monkeypatch.setattr(verify.sys, "executable", "/bin/false")
    with pytest.raises(ValueError, match=r"math-verify.*does not run: pip install"):
        verify.check()
    assert verify.maths("0.5", "\\boxed{9/18}") == 0.0
