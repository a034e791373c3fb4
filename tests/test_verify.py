"""The verifier of maths answers and letters: right as math-verify is, and out of reach of whatever a model writes."""

import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import math_verify
import pytest

from tasks import answers, boxes, verify


@pytest.fixture(autouse=True)
def no_memory_of_earlier_tests():
    verify._remember.cache_clear()


RIGHT = [
    ("7", "7"), ("7", " 7. "), ("044", "44"), ("-3", "−3"), ("27.0", "27"), ("27", "27.00"),
    ("1000", "1,000"), ("1,000", "1000"), ("12345", "12{,}345"), ("1234567", "1\\,234\\,567"), ("18", "\\$18"),
    ("1/2", "0.5"), ("0.5", "1/2"), ("0.5", "\\frac12"), ("\\frac{3}{4}", "\\dfrac34"), ("-\\frac12", "\\frac{-1}{2}"),
    ("2\\sqrt{3}", "\\sqrt{12}"), ("(x+1)^2", "x^2+2x+1"), ("p-q", "p - q"), ("x^{12}", "x**12"), ("3e^{t}", "3 e^t"),
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
    ("100,200", "200,300"), ("12", "1**2"), ("1", "2**(1/2)"), ("3", "x != 3"),
    ("7", "7 or 8"), ("7", "\\text{7 or 8}"),
]  # fmt: skip


@pytest.mark.parametrize("target, answer", RIGHT)
def test_right_answers(target, answer):
    assert verify.maths(target, f"so \\boxed{{{answer}}}") == 1.0


@pytest.mark.parametrize("target, answer", WRONG)
def test_wrong_answers(target, answer):
    assert verify.maths(target, f"so \\boxed{{{answer}}}") == 0.0


CASES = [json.loads(line) for line in (Path(__file__).parent / "data" / "answers.jsonl").open()]


def test_every_class_of_cases_is_judged_rightly():
    """Answers in the forms that models write, right and wrong, of each class that the rules of answers.py are for."""
    verdicts = verify.verdicts([(case["gold"], case["response"]) for case in CASES])
    assert [case for case, verdict in zip(CASES, verdicts) if verdict is not case["right"]] == []


def test_numbers_are_equal_as_in_math_verify():
    """Both ways of judging, on a grid of numbers."""
    numbers = ["3", "-3", "3.0", "3.5", "7/2", "\\frac{7}{2}", "1,500", "1500", "0", "0.0", "2^3", "8", "\\sqrt{64}"]
    for a in numbers:
        for b in numbers:
            theirs = math_verify.verify(*(math_verify.parse(f"\\boxed{{{x}}}") for x in (a, b)))
            assert theirs == (verify.maths(a, f"\\boxed{{{b}}}") == 1.0), (a, b)


TWO_NUMBERS = [
    "{} or {}", "{}, {}", "{},{}", "{} = {}", "{} and {}", "{}; {}", "{} {}", "{}/{}", "\\frac{{{}}}{{{}}}",
    "({}, {})", "[{}, {}]", "({}, {}]", "\\{{{}, {}\\}}", "{} \\text{{ or }} {}", "\\text{{{} or {}}}", "{} \\lor {}",
    "{} \\vee {}", "{} \\to {}", "{} \\implies {}", "{} \\Rightarrow {}", "{} \\cup {}",
    "\\{{{}\\}} \\cup \\{{{}\\}}", "{} \\approx {}", "{} \\sim {}", "{} \\pm {}", "{} \\mid {}", "{} < {}",
    "{} \\le {}", "{} \\ne {}", "{} \\equiv {}", "x = {} = {}", "x = {}, y = {}", "x={} \\text{{ or }} x={}",
    "x = {} \\ne {}", "{} \\text{{ not }} {}", "{} \\text{{ then }} {}", "{}:{}", "{}.{}", "{}_{}", "{}^{}",
    "{}_{{{}}}", "{} \\cdot {}", "{} + {}", "{} - {}", "{}, \\ldots, {}", "{} \\star {}",
    "{} \\text{{ pens and }} {} \\text{{ caps}}", "{} \\% = {}", "{} \\circ {}", "{} & {}", "{} \\\\ {}",
    "{} \\quad {}", "{} \\bmod {}", "{}\\text{{{}}}", "\\phantom{{{}}}{}", "\\text{{about }} {} \\text{{ or }} {}",
    "{}!{}", "{}..{}", "{} (or {})", "{} \\text{{ (or {})}}", "f({}) > {}", "{}x = {}x", "\\max({}, {})",
    "\\sqrt{{{}}} \\sqrt{{{}}}", "{}|{}", "\\begin{{pmatrix}} {} \\\\ {} \\end{{pmatrix}}", "\\overline{{{}}} {}",
    "{}`{}", "\"{}\" \"{}\"", "**{}** **{}**", "\\boxed{{{}}}, \\boxed{{{}}}", "\\boxed{{{}}} or \\boxed{{{}}}",
    "{} \\text{{ hours }} {} \\text{{ minutes}}", "{} = x = {}", "{} \\in \\{{{}\\}}", "x \\in \\{{{}, {}\\}}",
    "{} \\land {}",
]  # fmt: skip


def test_no_answer_is_paid_for_two_golds():
    """An answer that names two numbers may be right for one gold, never for both."""
    texts = [
        text if "boxed" in text else f"\\boxed{{{text}}}"
        for template in TWO_NUMBERS
        for a, b in ((7, 8), (8, 7), ("7.5", "7"), ("0.5", "5"))
        for text in [template.format(a, b)]
    ]
    golds = ["7", "8", "7.5", "0.5", "5"]
    paid = [verify.verdicts([(gold, text) for text in texts]) for gold in golds]
    assert [text for i, text in enumerate(texts) if sum(bool(verdicts[i]) for verdicts in paid) > 1] == []


@pytest.mark.parametrize(
    "text, want",
    [
        ("7", 0.0),
        ("", 0.0),
        ("\\boxed{6} no, \\boxed{7}", 1.0),
        ("\\boxed{7} no, \\boxed{6}", 0.0),
        ("\\boxed{7} and then \\boxed{", 0.0),
        ("\\boxed{7} and then \\boxed", 1.0),
        ("\\boxed{7} and then \\boxed{}", 1.0),
        ("\\boxed 7", 1.0),
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
    assert boxes.find("\\boxed{\\left\\{1, 2\\right.} }") == "\\left\\{1, 2\\right."


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


def workers():
    """The processes that are alive."""
    return [worker.process for worker in verify._alive]


def memory(process):
    """Pages of it that are in memory, in bytes."""
    with open(f"/proc/{process.pid}/statm") as f:
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
    assert max(map(memory, workers())) < 200e6


def test_what_a_model_may_write_is_found_and_tidied_quickly():
    """Nothing in the rules is exponential: repeated pieces of a thousand characters, and texts of a million."""
    pieces = [
        "\\text{",
        "}",
        "{",
        "(",
        "[",
        "1",
        ",",
        " ",
        "=",
        "\\approx",
        "\\pm",
        " or ",
        "E_",
        "'",
        "√(",
        "\\sqrt(",
        "million",
    ]
    start = time.process_time()
    for piece in pieces:
        for gold in ("7", "3, 4", "(1, 2)", "x > 3"):
            for text in (piece * 1_000, (piece + "1") * 500, "12<" + piece * 950 + ">x"):
                try:
                    answers.is_right(gold, text[:1_000], lambda *question: False)
                except RecursionError:  # verify.py's
                    pass
    for piece in ("\\boxed{", "\\boxed ", "\\fbox{\\boxed{", "\n\nQuestion:", "\\boxed{7}\n\nQuestion:"):
        boxes.find(piece * 10**5, "3, 4")
    assert time.process_time() - start < 20


def test_an_answer_that_takes_too_much_computing_has_no_verdict_and_is_remembered(monkeypatch):
    monkeypatch.setattr(verify, "DEADLINE", 0.5)
    verify.check()
    before = {process.pid for process in workers()}
    assert verify.verdict("5", "\\boxed{10^{10^{10}}}") is None and verify.maths("5", "\\boxed{10^{10^{10}}}") == 0.0
    monkeypatch.setattr(verify, "Worker", None)
    verify.stop()
    assert verify.verdict("5", "\\boxed{10^{10^{10}}}") is None, "without asking again"
    monkeypatch.undo()
    assert verify.maths("2x", "\\boxed{4x/2}") == 1.0 and not before & {process.pid for process in workers()}


def test_all_questions_of_an_answer_share_one_deadline(monkeypatch):
    seen, dumps = [], json.dumps
    monkeypatch.setattr(
        verify.json, "dumps", lambda question, **how: seen.append(question[3]) or dumps(question, **how)
    )
    assert verify.maths("x+1, y+1", "\\boxed{1+y, 1+x}") == 1.0
    assert len(seen) > 1 and seen == [verify.DEADLINE] + [None] * (len(seen) - 1)


def test_a_worker_that_cannot_be_made_gives_no_verdict(monkeypatch):
    def refuse(*args, **options):
        raise OSError("Resource temporarily unavailable")

    verify.stop()
    monkeypatch.setattr(verify.subprocess, "Popen", refuse)
    assert verify.verdict("2x", "\\boxed{12x/6}") is None
    with pytest.raises(ValueError, match="math-verify"):
        verify.check()
    monkeypatch.undo()
    assert verify.maths("2x", "\\boxed{12x/6}") == 1.0, "and it is not remembered"


def test_a_worker_that_is_late_to_start_gives_no_verdict(monkeypatch):
    """Its "ready" must not be taken as the verdict, nor a verdict as the answer to the next question."""
    verify.stop()
    monkeypatch.setattr(verify, "START", 0.0)
    assert verify.verdict("2x", "\\boxed{2x/3}") is None and verify.verdict("2x", "\\boxed{20x/10}") is None
    monkeypatch.undo()
    assert verify.maths("2x", "\\boxed{20x/10}") == 1.0, "no verdict is not remembered as wrong"
    assert verify.maths("2x", "\\boxed{2x/3}") == 0.0 and verify.maths("2x", "\\boxed{22x/11}") == 1.0


def test_a_worker_that_is_not_given_time_to_answer_is_no_verdict_and_waited_for_once_in_a_batch(monkeypatch):
    verify.stop()
    verify.check()
    (process,) = workers()
    process.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(verify, "PATIENCE", 0.1)
    asked = []
    take = verify._take
    monkeypatch.setattr(verify, "_take", lambda: asked.append(1) or take())
    assert verify.verdicts([("2x", "\\boxed{24x/12}")] * 5) == [None] * 5 and len(asked) == 1
    monkeypatch.undo()
    assert verify.maths("2x", "\\boxed{24x/12}") == 1.0 and verify.maths("2x", "\\boxed{24x/13}") == 0.0


def test_an_answer_over_which_a_worker_is_killed_is_asked_once_more(monkeypatch):
    verify.stop()
    verify.check()
    (process,) = workers()
    process.kill()
    process.wait()
    assert verify.maths("2x", "\\boxed{6x/3}") == 1.0  # it was dead before

    asked = []

    def kill_and_read(worker, seconds):
        asked.append(worker)
        worker.process.kill()
        worker.process.wait()
        return b""

    read, most = verify.Worker.read, 2
    monkeypatch.setattr(verify, "PATIENCE", verify.START - 1)  # to tell the two reads apart
    monkeypatch.setattr(
        verify.Worker, "read", lambda w, s: (kill_and_read if s != verify.START and len(asked) < most else read)(w, s)
    )
    assert verify.verdict("2x", "\\boxed{8x/4}") is None and len(asked) == 2
    most = 3
    assert verify.verdict("2x", "\\boxed{8x/4}") is True and len(asked) == 3, "the second attempt has a verdict"


def test_an_interrupted_question_leaves_no_stale_answer(monkeypatch):
    verify.check()
    read = verify.Worker.read

    def interrupted(worker, seconds):
        monkeypatch.setattr(verify.Worker, "read", read)
        raise KeyboardInterrupt

    monkeypatch.setattr(verify.Worker, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        verify.maths("2x", "\\boxed{10x/5}")
    assert verify.maths("2x", "\\boxed{10x/11}") == 0.0 and verify.maths("2x", "\\boxed{12x/6}") == 1.0


def test_a_forked_child_asks_a_worker_of_its_own():
    verify.check()
    ours = {process.pid for process in workers()}
    for _ in range(verify.WORKERS):  # as other threads might, at the moment of the fork
        verify._slots.acquire()
    child = os.fork()
    if child == 0:
        right = verify.maths("2x", "\\boxed{14x/7}") == 1.0 and not ours & {process.pid for process in workers()}
        verify.stop()
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for _ in range(verify.WORKERS):
        verify._slots.release()
    assert verify.maths("2x", "\\boxed{16x/8}") == 1.0 and ours == {process.pid for process in workers()}


def test_a_batch_is_judged_by_several_workers():
    pairs = [(f"x^{{{i}}}", f"\\boxed{{x^{{{j}}} \\cdot x}}") for i in range(1, 7) for j in range(6)]
    assert verify.verdicts(pairs * 2) == [i == j + 1 for i in range(1, 7) for j in range(6)] * 2
    assert 1 <= len(workers()) <= verify.WORKERS


@pytest.mark.parametrize("ranks, cores, want", [(None, 8, 8), ("4", 8, 2), ("16", 8, 1)])
def test_ranks_share_the_cores(ranks, cores, want, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert verify.number_of_workers() == want


def test_numbers_never_reach_a_worker(monkeypatch):
    verify.stop()
    monkeypatch.setattr(verify, "Worker", None)
    for i in range(2_000):
        assert verify.maths("-12", f"{'thought ' * 50}\\boxed{{{i}}}") == 0.0
        assert verify.maths(str(i), f"\\boxed{{{i:,}}}") == 1.0
    assert verify.maths("2.88e-19", "\\boxed{3.5 \\times 10^{-19}}") == 0.0


def test_a_missing_math_verify_is_an_error_when_loading(monkeypatch):
    verify.stop()
    monkeypatch.setattr(verify.sys, "executable", "/bin/false")
    with pytest.raises(ValueError, match=r"math-verify.*does not run: pip install"):
        verify.check()
    assert verify.maths("2x", "\\boxed{18x/9}") == 0.0


def test_within_a_tolerance():
    assert (
        verify.maths("3.1 within 0.1", "\\boxed{3.2}") == 1.0 and verify.maths("3.1 within 0.1", "\\boxed{3.3}") == 0.0
    )
    assert verify.maths("1.4 within 0.1", "\\boxed{\\sqrt{2}}") == 1.0
    assert verify.maths("1.7 within 0.1", "\\boxed{\\sqrt{2}}") == 0.0


def test_golds_read_once_are_read():
    for case in CASES:
        read = answers.read_gold(case["gold"])
        assert answers.read_gold(read) == read, "reading it again changes nothing"
    assert verify.unreadable(["1, \\ldots, m", "\\frac{1}{2}", "7", "y'+x=0", "5 \\star 3"]) == [
        "1, \\ldots, m",
        "5 \\star 3",
    ]


def test_the_known_limits_are_as_the_docstring_says():
    rows = [line.split(" | ") for line in answers.__doc__.splitlines() if line.startswith("| `")]
    assert len(rows) > 5
    for gold, answer, should_be, found, _ in rows:
        gold, answer = gold.removeprefix("| ").strip("`"), answer.strip("`")
        verdict = {1.0: "right", 0.0: "wrong"}[verify.maths(gold, f"\\boxed{{{answer}}}")]
        assert verdict == found != should_be, (gold, answer)
