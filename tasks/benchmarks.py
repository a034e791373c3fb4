r"""The public datasets behind tasks.load: where each lies, what its columns are called, how a row becomes a problem.

A dataset comes from the Hugging Face hub, or from a local file (JSON, JSON Lines, parquet) with the same columns. Rows
keep the file's order; a question that comes again is left out, and so is a multiple-choice row whose answer names none
of its options, which nobody could verify. nvidia/Nemotron-CrossThink has one file of questions: a hash of the question
holds one in 64 out for testing, so no training question, however often the file repeats it, is a test question.

Ids, configs, splits and columns were taken from public code that loads these datasets, not tried against the hub. The
least certain: that meta_data.question of Nemotron-CrossThink carries the lettered options, as the files that others
derived from it do. Its open questions are left out.
"""

import re
import tempfile
import warnings
import zlib
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

MATHS = "Please reason step by step, and put your final answer within \\boxed{}."
CHOICE = "Please reason step by step, and put the letter of the correct option within \\boxed{}."


@dataclass(frozen=True)
class Benchmark:
    """A dataset. Columns may lie inside others, as in reward_model.ground_truth."""

    hub: str  # the dataset's id
    question: str
    answer: str  # a text, a number, or a list of them
    splits: dict[str, str] = field(default_factory=lambda: {"test": "test"})  # ours: the hub's
    config: str | None = None
    file: str | None = None  # the one file of the repository to read; then its split is called train
    context: str | None = None  # what the question is about, if that is a column of its own
    choices: str | None = None  # the options of a multiple-choice question, if they are not lines of the question
    verifier: str = "maths"  # maths or choice: verify.py's functions
    held_out: int | None = None  # one question in so many is for testing; the rest, for training
    k: int = 1  # samples that its evaluation takes: 16 makes avg@16


BENCHMARKS = {
    "math": Benchmark(  # DAPO-Math-17k; the original repeats each question about a hundred times
        "open-r1/DAPO-Math-17k-Processed", "prompt", "solution", {"train": "train"}, config="all"
    ),
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "problem", "answer", {"test": "train"}, k=16),
    "aime25": Benchmark("math-ai/aime25", "problem", "answer", k=16),
    "amc23": Benchmark("math-ai/amc23", "question", "answer"),
    "math500": Benchmark("HuggingFaceH4/MATH-500", "problem", "answer"),
    "olympiadbench": Benchmark(
        "Hothan/OlympiadBench", "question", "final_answer", {"test": "train"}, "OE_TO_maths_en_COMP", context="context"
    ),
    "minerva": Benchmark("math-ai/minervamath", "question", "answer"),
    "gsm8k": Benchmark("openai/gsm8k", "question", "answer", {"train": "train", "test": "test"}, "main"),
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
    """(prompt, target) of each problem of a split that the benchmark has; data is a local file to read instead.

    A local file is the split that is asked for, except where a hash tells the splits apart. Raises ValueError, in one
    line, when the file or the hub cannot be read, lacks a column, or holds no problem.
    """
    rows = _local(data) if data else _hub(benchmark, benchmark.splits[split])
    missing = [c for c in columns(benchmark) if c not in rows.column_names and not any(_get(row, c) for row in rows)]
    if missing:
        raise ValueError(
            f"{data or 'dataset ' + benchmark.hub} has columns {_quoted(rows.column_names)}, needs {_quoted(missing)}: "
            f"pass a local file with columns {_quoted(columns(benchmark))} by --data FILE"
        )
    found = {}
    for row in rows:
        question, answer = _get(row, benchmark.question), _get(row, benchmark.answer)
        context, choices = _get(row, benchmark.context), _get(row, benchmark.choices)
        if not (question and answer not in (None, "", [])):
            continue
        if benchmark.held_out and (zlib.crc32(question.encode()) % benchmark.held_out == 0) != (split == "test"):
            continue
        answer = ", ".join(map(str, answer)) if isinstance(answer, list) else str(answer)
        if benchmark.verifier == "choice":
            if choices:
                question += "".join(f"\n{chr(65 + i)}. {c}" for i, c in enumerate(choices))
            if (answer := letter(question, answer)) is None:
                continue
        system = MATHS if benchmark.verifier == "maths" else CHOICE
        context = f"Context: {context}\n\n" if context else ""
        prompt = f"{system}\n\n{context}Question: {question}\n\nAnswer:"
        found.setdefault(prompt, answer.rpartition("####")[2].strip())  # gsm8k's follows its worked solution
    if not found:
        raise ValueError(f"{data or 'dataset ' + benchmark.hub} holds no {split} problem with an answer to verify")
    return list(found.items())


def letter(question: str, answer: str) -> str | None:
    """The letter of the option, a line of question such as "B. yes" or "(B) yes", that answer names; None for none.

    answer may be the letter, the option's text, or both; both must belong together.

    >>> q = "Which?\\nA: one\\nB: two"
    >>> [letter(q, answer) for answer in ("B", "two", "B: two", "A: two", "three")]
    ['B', 'B', 'B', None, None]
    """
    for mark, text in re.findall(r"^[ \t]*\(?([A-Z])[.:)][ \t]*(.*?)[ \t]*$", question, re.MULTILINE):
        if re.sub(rf"^\(?{mark}[.:)]\s*", "", answer.strip()) in (mark, text):
            return mark
    return None


def columns(benchmark: Benchmark) -> list[str]:
    """The columns that its file must have."""
    return [c for c in (benchmark.question, benchmark.answer, benchmark.context, benchmark.choices) if c]


def _quoted(names: list[str]) -> str:
    return ", ".join(map(repr, names))


def _get(row: dict, column: str | None):
    """The value of a column, perhaps inside others; None when there is none. Rows may differ in what lies inside."""
    for part in column.split(".") if column else [None]:
        row = row.get(part) if isinstance(row, dict) else None
    return row


def _local(data: str):
    """The rows of a local file, as a datasets.Dataset; its cache is gone when the rows are read."""
    import datasets

    builder = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}.get(Path(data).suffix)
    if not Path(data).is_file():
        raise ValueError(f"--data {data}: no such file")
    if builder is None:
        raise ValueError(f"--data {data}: unknown type {Path(data).suffix!r}, give a .json, .jsonl or .parquet file")
    with tempfile.TemporaryDirectory() as cache, _offline():
        try:
            return datasets.load_dataset(
                builder, data_files=str(data), split="train", cache_dir=cache, keep_in_memory=True
            )
        except Exception as e:  # datasets lets pyarrow's, json's and its own through
            raise ValueError(f"--data {data}: cannot be read as {builder}: {_reason(e)}") from e


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
