r"""Public datasets of mathematics and question answering, and files of yours with the same columns.

A dataset comes from the Hugging Face hub, or from a local file (JSON, JSON Lines, parquet) with the same columns. Rows
keep the file's order. A row is left out, and counted, if its question has come before, if it has no answer, or if the
answer to a multiple-choice question does not name one of its options. Answers are read once, here: 27.0 becomes 27, and
a unit or a tolerance that the row gives is added. Answers that math-verify cannot read are counted: only the same text
is right for them (python -m tasks.audit NAME prints them). nvidia/Nemotron-CrossThink has one file of questions: a
hash of the question holds one in 64 out for testing, so no training question, however often the file repeats it, is a
test question.

Ids, configs, splits and columns were taken from public code that loads these datasets, not tried against the hub. The
least certain: that meta_data.question of Nemotron-CrossThink carries the lettered options, as the files that others
derived from it do. Its open questions are left out.
"""

import json
import logging
import re
import tempfile
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from tasks import verify
from tasks.answers import read_gold
from tasks.problem import Problem

log = logging.getLogger(__name__)

MATHS = "Please reason step by step, and put your final answer within \\boxed{}."
SEVERAL = "There are several answers: put all of them within one \\boxed{}, separated by commas."
CHOICE = "Please reason step by step, and put the letter of the correct option within \\boxed{}."
CHECKED = 500  # answers of a dataset that are tried on math-verify when it is loaded; tasks.audit tries all


def plain_answer(answer: object) -> str | None:
    """An answer that is a text or a number, as text; None for anything else, and for the NaN of an empty cell."""
    return str(answer).strip() if isinstance(answer, str | int | float) and answer == answer else None


def last_part(answer: object) -> str | None:
    """GSM8K's answer follows its worked solution, after ####."""
    return plain_answer(answer).rpartition("####")[2].strip() if isinstance(answer, str) else plain_answer(answer)


def joined(answer: object) -> str | None:
    """OlympiadBench's answers are lists. None if one of them is missing."""
    parts = [plain_answer(part) for part in answer] if isinstance(answer, list) else [plain_answer(answer)]
    return ", ".join(parts) if all(parts) else None


@dataclass(frozen=True)
class Benchmark:
    """A task. Columns may lie inside others, as in reward_model.ground_truth."""

    hub: str  # the dataset's id
    question: str
    answer: str
    splits: dict[str, str] = field(default_factory=lambda: {"test": "test"})  # ours: the hub's
    config: str | None = None
    file: str | None = None  # the one file of the repository to read; then its split is called train
    context: str | None = None  # what the question is about, if that is a column of its own
    choices: str | None = None  # the options of a multiple-choice question, if they are not in the question
    unit: str | None = None  # of the answer, if there is such a column
    tolerance: str | None = None  # by how much the answer may be missed, if there is such a column
    several: str | None = None  # whether there are several answers, if there is such a column
    verifier: str = "maths"  # maths or choice: verify.py's functions
    read_answer: Callable[[object], str | None] = plain_answer  # what the answer's column holds -> the answer
    held_out: int | None = None  # one question in so many is for testing; the rest, for training
    samples: int = 1  # that its evaluation takes of each problem: 16 makes avg@16
    stop: tuple[str, ...] = ("\n\nQuestion:",)  # a base model would go on with a question of its own

    def __post_init__(self):
        if self.verifier not in ("maths", "choice"):
            raise ValueError(f"unknown verifier {self.verifier!r} of dataset {self.hub}: choose maths or choice")

    def load(self, split: str, data: str | None = None) -> list[Problem]:
        """The problems of a split, from the hub or from a local file. answer: the right answer, or its letter."""
        if self.verifier == "maths":
            verify.check()
        return [Problem(prompt, answer) for prompt, answer in problems(self, split, data)]

    def reward(self, problem: Problem, text: str) -> float:
        r"""1.0 if the last \boxed{} of the response is right, else 0.0."""
        return (verify.maths if self.verifier == "maths" else verify.choice)(problem.answer, text)

    def judge(self, pairs: list[tuple[Problem, str]]) -> list[bool | None]:
        """The verdicts on many responses at once, by several processes. None: the judge failed."""
        if self.verifier == "choice":
            return [bool(self.reward(problem, text)) for problem, text in pairs]
        return verify.verdicts([(problem.answer, text) for problem, text in pairs])


BENCHMARKS = {
    "math": Benchmark(  # DAPO-Math-17k; the original repeats each question about a hundred times
        "open-r1/DAPO-Math-17k-Processed", "prompt", "solution", {"train": "train"}, config="all"
    ),
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "problem", "answer", {"test": "train"}, samples=16),
    "aime25": Benchmark("math-ai/aime25", "problem", "answer", samples=16),
    "amc23": Benchmark("math-ai/amc23", "question", "answer"),
    "math500": Benchmark("HuggingFaceH4/MATH-500", "problem", "answer"),
    "olympiadbench": Benchmark(
        "Hothan/OlympiadBench", "question", "final_answer", {"test": "train"}, "OE_TO_maths_en_COMP", context="context",
        unit="unit", tolerance="error", several="is_multiple_answer", read_answer=joined,
    ),
    "minerva": Benchmark("math-ai/minervamath", "question", "answer"),
    "gsm8k": Benchmark(
        "openai/gsm8k", "question", "answer", {"train": "train", "test": "test"}, "main", read_answer=last_part
    ),
    "crossthink-qa": Benchmark(
        "nvidia/Nemotron-CrossThink",
        "meta_data.question",
        "reward_model.ground_truth",
        {"train": "train", "test": "train"},
        file="Data/Nemotron-CrossThink-QA.jsonl",
        verifier="choice",
        held_out=64,
    ),
    "zebralogic": Benchmark(
        "WildEval/ZebraLogic", "question", "answer", config="mc_mode", context="puzzle", choices="choices",
        verifier="choice",
    ),
}  # fmt: skip


def problems(benchmark: Benchmark, split: str, data: str | None = None) -> list[tuple[str, str]]:
    """(prompt, answer) of each problem of a split that the benchmark has; data is a local file to read instead.

    A local file is the split that is asked for, except where a hash tells the splits apart. Raises ValueError, in one
    line, when the file or the hub cannot be read, lacks a column, or holds no problem.
    """
    # Read the rows, and check that every column is there.
    where = data or f"dataset {benchmark.hub}"
    rows = read_file(data) if data else list(_hub(benchmark, benchmark.splits[split]))
    missing = [c for c in columns(benchmark) if not any(_get(row, c) is not None for row in rows)]
    if missing:
        raise ValueError(
            f"{where} has columns {_quoted(dict.fromkeys(c for row in rows for c in row))}, needs {_quoted(missing)}: "
            f"pass a local file with columns {_quoted(columns(benchmark))}"
        )
    # Make a problem of each row, or count why it is left out.
    found, left_out = {}, Counter()
    for row in rows:
        question, answer = _get(row, benchmark.question), benchmark.read_answer(_get(row, benchmark.answer))
        context, choices = _get(row, benchmark.context), _get(row, benchmark.choices)
        if not isinstance(question, str) or not question.strip() or not answer:
            left_out["without a question or an answer"] += 1
            continue
        if benchmark.held_out and (zlib.crc32(question.encode()) % benchmark.held_out == 0) != (split == "test"):
            continue
        system = MATHS if benchmark.verifier == "maths" else CHOICE
        if benchmark.verifier == "choice":
            if choices:
                question += "".join(f"\n{chr(65 + i)}. {c}" for i, c in enumerate(choices))
            if (mark := letter(question, answer)) is None:
                left_out[why_no_letter(question, answer)] += 1
                continue
            answer = mark
        else:
            answer = read_gold(answer, _get(row, benchmark.unit), _get(row, benchmark.tolerance))
            system += f" {SEVERAL}" if str(_get(row, benchmark.several)).lower() == "true" else ""
        context = f"Context: {context}\n\n" if context else ""
        prompt = f"{system}\n\n{context}Question: {question}\n\nAnswer:"
        left_out["that repeat a question"] += prompt in found
        found.setdefault(prompt, answer)
    # Say what came out.
    if not found:
        reasons = _list_reasons(left_out)
        raise ValueError(
            f"{where} holds no {split} problem with an answer to verify" + (f" ({reasons})" if reasons else "")
        )
    if left_out.total():
        log.warning("%s: %d of %d rows left out: %s", where, left_out.total(), len(rows), _list_reasons(left_out))
    if benchmark.verifier == "maths":
        golds = list(dict.fromkeys(found.values()))
        step = -(-len(golds) // CHECKED)  # every so many, if there are more
        if strange := verify.unreadable(golds[::step]):
            log.warning(
                "%s: the judge cannot read %d of %d different answers; for these only the same text is right: "
                "python -m tasks.audit prints them",
                where, len(strange), len(golds[::step]),
            )  # fmt: skip
    return list(found.items())


def _list_reasons(left_out: Counter) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count)


# The mark of an option: "B." "B:" "(B)" "[B]" "b)" "**B.**" "- B."
MARK = r"(?:[-*•][ \t]+)?\**[(\[]?([{letters}])[.:)\]、]+\**[ \t]*"


def _runs_of_marks(pattern: str, question: str) -> list[list[tuple[str, re.Match]]]:
    """The marks in a question, as runs of letters that follow one another. A run starts at an A, and at the first mark.

    Marks that do not follow the one before are left out.
    """
    runs, last = [], ""
    for mark in re.finditer(pattern, question, re.MULTILINE):
        mark_letter = mark[1].upper()
        if mark_letter == "A" or not runs:
            runs.append([])
        elif mark_letter != chr(ord(last) + 1):
            continue
        runs[-1].append((mark_letter, mark))
        last = mark_letter
    return runs


def options(question: str) -> dict[str, str]:
    """The options of a question, letter -> text: those that begin a line, or else those within a line.

    >>> options("Which?\\nA: one\\r\\n**B.** two"), options("Which? (a) one (b) two")
    ({'A': 'one', 'B': 'two'}, {'A': 'one', 'B': 'two'})
    >>> options("Was it Dr. A. Smith?")
    {}
    """
    best = {}
    for letters in ("A-Z", "a-z"):
        for before in (r"^[ \t]*", r"(?:^|(?<=\s))"):
            for run in _runs_of_marks(before + MARK.format(letters=letters), question):
                if len(run) > max(1, len(best)) and run[0][0] == "A":
                    ends = [mark.start() for _, mark in run[1:]] + [len(question)]
                    texts = [question[mark.end() : end].split("\n")[0] for (_, mark), end in zip(run, ends)]
                    best = {mark_letter: text.strip(" \t\r*,;") for (mark_letter, _), text in zip(run, texts)}
    return best


def letter(question: str, answer: str) -> str | None:
    """The letter of the option that answer names; None for none. Marks are tried before texts.

    answer may be the letter, the option's text, or both; both must belong together.

    >>> q = "Which?\\nA: one\\nB: two"
    >>> [letter(q, answer) for answer in ("B", "(b)", "Two", "B: two", "B - two", "A: two", "three")]
    ['B', 'B', 'B', 'B', 'B', None, None]
    >>> letter("Which?\\nA. B\\nB. A", "B"), letter("Which?\\nA. red\\nB. red", "red")
    ('B', None)
    """
    known = options(question)
    answer = _bare(answer)
    if only := re.fullmatch(r"[(\[]?([A-Za-z])[.:)\]]*", answer):
        return only[1].upper() if only[1].upper() in known else None
    named = {mark for mark, text in known.items() if text and text.lower() == answer.lower()}
    if not named and (both := re.fullmatch(r"[(\[]?([A-Za-z])(?:[.:)\]]+|\s+-)\s*(.+)", answer)):
        text = known.get(both[1].upper(), "")
        named = {both[1].upper()} if text.lower() == both[2].strip().lower() else set()
    return named.pop() if len(named) == 1 else None


def _bare(answer: str) -> str:
    """The answer without boxes, text commands and emphasis."""
    return re.sub(r"\\(?:boxed|text[a-z]*)(?![a-z])|[{}$*]", "", answer).strip()


def why_no_letter(question: str, answer: str) -> str:
    """Why letter found none, as the words after a count of rows.

    >>> why_no_letter("Who wrote it?", "Ann"), why_no_letter("Which?\\nA. red\\nB. red", "red")
    ('whose question has no options', 'whose answer is the text of two options')
    """
    known = options(question)
    if not known:
        return "whose question has no options"
    same = [text for text in known.values() if text.lower() == _bare(answer).lower()]
    return "whose answer is the text of two options" if len(same) > 1 else "whose answer is none of the options"


def columns(benchmark: Benchmark) -> list[str]:
    """The columns that its file must have."""
    return [c for c in (benchmark.question, benchmark.answer, benchmark.context, benchmark.choices) if c]


def _quoted(names) -> str:
    return ", ".join(map(repr, names))


def _get(row: dict, column: str | None):
    """The value of a column, perhaps inside others; None when there is none. Rows may differ in what lies inside."""
    for part in column.split(".") if column else [None]:
        row = row.get(part) if isinstance(row, dict) else None
    return row


def read_file(data: str) -> list[dict]:
    """The rows of a local file. ValueError, in one line that names the file and the line, if it cannot be read.

    Numbers in JSON are the text that stands there: large ones keep their digits.
    """
    path = Path(data)
    if not path.is_file():
        raise ValueError(f"{data}: no such file")
    if path.suffix == ".parquet":
        rows = _parquet(path)
    elif path.suffix in (".json", ".jsonl"):
        rows = _json(path)
    else:
        raise ValueError(f"{data}: unknown type {path.suffix!r}, give a .json, .jsonl or .parquet file")
    if not rows:
        raise ValueError(f"{data} is empty: it has no rows")
    return rows


def _json(path: Path) -> list[dict]:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = content[: e.start].count(b"\n") + 1
        raise ValueError(
            f"{path} line {line}: not valid UTF-8 (byte {content[e.start]:#04x}). Save the file as UTF-8"
        ) from e
    # One JSON list, or an object a line.
    parts = [(1, text)] if text.lstrip().startswith("[") else enumerate(text.split("\n"), 1)
    rows = []
    for number, part in parts:
        if not part.strip():
            continue
        try:
            found = json.loads(part, parse_float=str, parse_constant=lambda _: None)  # NaN is an empty cell
        except ValueError as e:
            raise ValueError(f"{path} line {number}: not valid JSON ({e})") from e
        found = found if isinstance(found, list) else [found]
        if not all(isinstance(row, dict) for row in found):
            raise ValueError(f"{path} line {number}: holds no object {{...}} with columns")
        rows += found
    return rows


def _parquet(path: Path) -> list[dict]:
    import datasets

    with tempfile.TemporaryDirectory() as cache, _offline():
        try:
            return list(
                datasets.load_dataset(
                    "parquet", data_files=str(path), split="train", cache_dir=cache, keep_in_memory=True
                )
            )
        except Exception as e:  # datasets lets pyarrow's and its own through
            raise ValueError(f"{path}: cannot be read as parquet: {_reason(e)}") from e


def _hub(benchmark: Benchmark, split: str):
    """A split of a hub dataset, as a datasets.Dataset."""
    import datasets
    from huggingface_hub import HfApi

    reason = None
    try:  # load_dataset tries for minutes before it says that the hub is away: ask once, and without an answer...
        HfApi().dataset_info(benchmark.hub, timeout=10)
    except Exception as e:  # whatever it is, it is said below, whether the cache has the dataset or not
        reason = e
    try:
        with _offline() if reason else nullcontext():  # ...take what an earlier fetch left in its cache, or nothing
            found = datasets.load_dataset(benchmark.hub, benchmark.config, data_files=benchmark.file, split=split)
    except Exception as e:  # the hub's, the network's, pyarrow's: all one line to the user
        raise ValueError(
            f"cannot fetch dataset {benchmark.hub} from the hub ({_reason(reason or e)}): download it elsewhere and "
            f"pass --data FILE with columns {_quoted(columns(benchmark))}"
        ) from e
    if reason:
        said = f"the hub does not answer ({_reason(reason)}): {benchmark.hub} is as it was last fetched"
        warnings.warn(said, stacklevel=2)
    return found


@contextmanager
def _offline():
    """Keep datasets off the network, where it would also report that a local file is read."""
    import datasets

    before, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _reason(e: BaseException) -> str:
    """The first line of the error that started it."""
    while e.__cause__ is not None:
        e = e.__cause__
    return (str(e).strip() or type(e).__name__).splitlines()[0]
