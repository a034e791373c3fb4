"""The dataset loaders, on small made-up files of each dataset's columns, and their errors."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import pytest

import tasks
from tasks import audit, benchmarks, load

DATA = Path(__file__).parent / "data"


def local(name):
    return str(DATA / f"{name}.jsonl")


TARGETS = {
    ("math", "train"): ["67", "2", "-16"],  # the third row repeats the first
    ("aime24", "test"): ["44", "199", "49"],
    ("aime25", "test"): ["180^\\circ", "210", "120"],
    ("amc23", "test"): ["45", "12.5", "27"],
    ("math500", "test"): ["\\frac{3}{4}", "[-1,3]", "( 2, \\frac{\\pi}{2} )", "\\text{odd}"],
    ("olympiadbench", "test"): ["-7,7", "7", "1, 2"],  # the proof has no answer
    ("minerva", "test"): ["4 \\times 10^{33}", "\\frac{\\sqrt{3}}{2}", "3e^{t}"],
    ("gsm8k", "train"): ["18", "2500", "3"],
    ("gsm8k", "test"): ["18", "2500", "3"],
    ("crossthink-qa", "train"): ["B", "A", "B"],  # an answer that is another option's, and an open question, are gone
    ("crossthink-qa", "test"): ["A"],
    ("zebralogic", "test"): ["B", "B", "B"],
}


def test_every_split_of_every_dataset_is_here():
    assert set(TARGETS) == {(name, split) for name, b in tasks.BENCHMARKS.items() for split in b.splits}


@pytest.mark.parametrize("name, split", TARGETS)
def test_loader(name, split):
    problems = load(name, split, data=local(name))
    assert [p.answer for p in problems] == TARGETS[name, split] and problems == load(name, split, data=local(name))
    for p in problems:
        assert "\\boxed{}" in p.prompt and p.prompt.endswith("Answer:")
        assert (
            tasks.get(name).reward(p, f"Hence \\boxed{{{p.answer}}}.") == 1.0
            and tasks.get(name).reward(p, "\\boxed{-12345}") == 0.0
        )


@pytest.mark.parametrize(
    "name, right, wrong",
    [
        ("aime24", "44", "440"),
        ("aime25", "180", "181"),
        ("amc23", "45", "46"),
        ("math500", "0.75", "0.7"),
        ("olympiadbench", "7, -7", "7"),
        ("minerva", "4 \\times 10^{33}", "4 \\times 10^{32}"),
        ("gsm8k", "18", "1,8"),
        ("zebralogic", "\\text{B}", "tea"),
    ],
)
def test_first_problem_is_judged(name, right, wrong):
    problem = load(name, data=local(name))[0]
    assert (
        tasks.get(name).reward(problem, f"\\boxed{{{right}}}") == 1.0
        and tasks.get(name).reward(problem, f"\\boxed{{{wrong}}}") == 0.0
    )


def test_prompts():
    assert load("olympiadbench", data=local("olympiadbench"))[0].prompt.startswith(
        "Please reason step by step, and put your final answer within \\boxed{}. There are several answers: put all of "
        "them within one \\boxed{}, separated by commas.\n\nQuestion: Determine"
    )
    assert load("olympiadbench", data=local("olympiadbench"))[1].prompt == (
        "Please reason step by step, and put your final answer within \\boxed{}.\n\n"
        "Context: A troop of 9 soldiers sends 2 on watch.\n\nQuestion: How many soldiers are left?\n\nAnswer:"
    )
    assert load("zebralogic", data=local("zebralogic"))[2].prompt == (
        "Please reason step by step, and put the letter of the correct option within \\boxed{}.\n\n"
        "Context: There are 2 houses, numbered 1 to 2. The cat is left of the dog.\n\n"
        "Question: What animal lives in house 2?\nA. cat\nB. dog\n\nAnswer:"
    )


RED_OR_BLUE = "Which colour?\nA. red\nB. blue"


@pytest.mark.parametrize(
    "question, answer, want",
    [
        *((RED_OR_BLUE, answer, "B") for answer in ("B", "(B)", "B.", "b", "Blue", "\\boxed{B}", "B - blue")),
        *((RED_OR_BLUE, answer, None) for answer in ("C", "B. red", "green", "B or A", "", "AB")),
        *(
            (f"Which colour?{options}", "blue", "B")
            for options in (
                " (A) red (B) blue", " A. red B. blue C. green", "\n(a) red\n(b) blue", "\na) red\nb) blue",
                "\n[A] red\n[B] blue", "\n**A.** red\n**B.** blue", "\n- A. red\n- B. blue", "\nA、red\nB、blue",
                "\r\nA. red\r\nB. blue\r\n", "\n(A) red (B) blue\n(C) green (D) black", "\n  A: red\n  B: blue",
            )
        ),
        ("Which point?\nA. C\nB. B\nC. A", "C", "C"),  # a mark before a text
        ("Which point?\nA. C\nB. B\nC. A", "A", "A"),
        ("Whose?\nA. B\nB. A", "B", "B"),
        ("Which?\nA. red\nB. red", "red", None),
        ("Which?\nA. red\nB. red", "B. red", "B"),
        ("Who is Dr. A. Smith?", "A", None),
        ("Does A. win?\nA. yes\nB. no", "no", "B"),
    ],
)  # fmt: skip
def test_the_option_that_an_answer_names(question, answer, want):
    assert benchmarks.letter(question, answer) == want


def test_rows_without_a_usable_answer_are_left_out_and_counted(tmp_path, caplog):
    def rows_of(name, rows, split="test"):
        (tmp_path / "rows.jsonl").write_text("\n".join(rows))
        caplog.clear()
        return [p.answer for p in load(name, split, data=str(tmp_path / "rows.jsonl"))]

    answers = ['"text\\n#### "', "NaN", "null", '{"value": "3"}', '" "', '"7"', "8.0"]
    assert rows_of("gsm8k", [f'{{"question": "q{i}", "answer": {a}}}' for i, a in enumerate(answers)]) == ["7", "8"]
    assert "5 of 7 rows left out: 5 without a question or an answer" in caplog.text

    answers = ["[null]", '[""]', '["$3$", null]', '["$3$", "4"]']
    rows = [f'{{"question": "q{i}", "final_answer": {a}, "context": "c"}}' for i, a in enumerate(answers)]
    assert rows_of("olympiadbench", rows) == ["3, 4"]

    questions = ["q?\nA. red\nB. red", "q!\nA. red\nB. blue", "Who?", "Which?\nA. red\nB. blue"]
    rows = [
        json.dumps({"puzzle": "p", "question": q, "choices": [], "answer": a})
        for q, a in zip(questions, ("red", "green", "Ann", "red"))
    ]
    assert rows_of("zebralogic", rows) == ["A"]
    for reason in ("is the text of two options", "is none of the options", "question has no options"):
        assert f"1 whose {'answer ' if 'is' in reason else ''}{reason}" in caplog.text


def test_units_and_tolerances_of_the_columns_and_answers_that_cannot_be_read(tmp_path, caplog):
    rows = [
        {"question": "q1", "final_answer": ["$6$"], "context": "c", "unit": "m", "error": None},
        {"question": "q2", "final_answer": ["2.5"], "context": "c", "unit": None, "error": "1e-1"},
        {"question": "q3", "final_answer": ["$1, \\ldots, m$"], "context": "c", "unit": None, "error": None},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    problems, task = load("olympiadbench", data=str(file)), tasks.get("olympiadbench")
    texts = [["\\boxed{6m}", "\\boxed{6}", "\\boxed{6k}"], ["\\boxed{2.6}", "\\boxed{2.7}"], []]
    assert tasks.judge("olympiadbench", problems, texts).rewards == [[1.0, 1.0, 0.0], [1.0, 0.0], []]
    assert "the judge cannot read 1 of 3 different answers" in caplog.text and caplog.text.count("\n") == 1
    lines = audit.audit("olympiadbench", str(file))
    assert len(lines) == 1 and "1, \\ldots, m" in lines[0]
    with pytest.raises(ValueError, match="countdown: only datasets of mathematics"):
        audit.audit("countdown")
    assert task.reward(problems[0], "\\boxed{6m}") == 1.0


def test_what_the_judge_fails_on_is_counted(monkeypatch):
    problems = [tasks.Problem("", "x+1"), tasks.Problem("", "2")]
    monkeypatch.setattr(benchmarks.verify, "START", 0.0)
    benchmarks.verify.stop()
    judged = tasks.judge("math500", problems, [["\\boxed{(2x+2)/2}", "\\boxed{x+1}"], ["\\boxed{2}"]])
    assert judged == ([[0.0, 1.0], [1.0]], [], 1)


@pytest.mark.parametrize("name", ["math", "math500", "olympiadbench", "zebralogic"])
def test_file_types_are_the_same(name, tmp_path):
    rows = [json.loads(line) for line in Path(local(name)).read_text().splitlines()]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    split = next(iter(tasks.BENCHMARKS[name].splits))
    both = [load(name, split, data=str(tmp_path / file)) for file in ("rows.json", "rows.parquet")]
    assert both == [load(name, split, data=local(name))] * 2
    assert sorted(os.listdir(tmp_path)) == ["rows.json", "rows.parquet"], "no cache is left beside the files"


def test_n_is_a_seeded_draw():
    drawn = [load("math500", n=2, seed=s, data=local("math500")) for s in range(4)]
    assert drawn[0] == load("math500", n=2, seed=0, data=local("math500"))
    assert len(Counter(p.answer for two in drawn for p in two)) > 2


def test_columns_inside_others_may_differ_between_rows():
    kinds = {type(json.loads(line)["meta_data"]["index"]) for line in Path(local("crossthink-qa")).open()}
    assert kinds == {int, str} and len(load("crossthink-qa", "train", data=local("crossthink-qa"))) == 3


def test_held_out_questions(tmp_path):
    file = tmp_path / "qa.jsonl"
    questions = [f"Is {i} odd?\nA. yes\nB. no" for i in range(2_000)] * 2
    rows = [{"meta_data": {"question": q}, "reward_model": {"ground_truth": "A"}} for q in questions]
    file.write_text("\n".join(map(json.dumps, rows)))
    train, test = ({p.prompt for p in load("crossthink-qa", s, data=str(file))} for s in ("train", "test"))
    assert len(train) + len(test) == 2_000 and not train & test and 15 < len(test) < 50


def test_samples():
    assert {n: tasks.samples(n) for n in tasks.TASKS if tasks.samples(n) > 1} == {
        "aime24": 16, "aime25": 16, "countdown": 4, "countdown4": 4, "countdown-tiny": 4, "countdown-tiny18": 4,
        "countdown-words": 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("aime23",), "unknown task 'aime23': choose one of countdown, .*zebralogic"),
        (("aime24", "dev"), "unknown split 'dev': choose train or test"),
        (("aime24", "train"), "'aime24' has no train split; these have one: countdown, .*math, gsm8k, crossthink-qa$"),
        (("math", "test"), "'math' has no test split; these have one: .*math500.*--eval_task"),
        (("aime24", "test", 4, 0, local("aime24")), "'aime24' has no 4 distinct test problems, only 3"),
        (("aime24", "test", None, 0, "none.jsonl"), "^none.jsonl: no such file"),
        (("aime24", "test", None, 0, __file__), "unknown type '.py', give a .json, .jsonl or .parquet file"),
        (("aime24", "test", None, 0, local("minerva")),
         "minerva.jsonl has columns 'question', 'answer', needs 'problem': "
         "pass a local file with columns 'problem', 'answer'"),
        (("crossthink-qa", "test", None, 0, local("zebralogic")), "needs 'meta_data.question', 'reward_model"),
        (("zebralogic", "test", None, 0, local("gsm8k")), "needs 'puzzle', 'choices'"),
    ],
)  # fmt: skip
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message) as e:
        load(*arguments)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", "{not json", "a.jsonl line 1: not valid JSON"),
        ("a.jsonl", '{"problem": "x"}\n\n[1]', "a.jsonl line 3: holds no object"),
        ("a.jsonl", "", "a.jsonl is empty"),
        ("a.parquet", "PAR1", "cannot be read as parquet: "),
        ("a.json", '[{"problem": null, "answer": "1"}, {"problem": "x", "answer": ""}]', "holds no test problem"),
    ],
)
def test_broken_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as e:
        load("aime24", data=str(tmp_path / name))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("where", [{"config": "main"}, {"file": "data/rows.jsonl"}])
def test_a_folder_laid_out_as_on_the_hub(tmp_path, monkeypatch, where):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text(Path(local("gsm8k")).read_text())
    split = "train" if "file" in where else "test"
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: test\n    path: data/rows.jsonl\n---\n"
    )
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    dataset = benchmarks.Benchmark(
        str(tmp_path), "question", "answer", {"test": split}, read_answer=benchmarks.last_part, **where
    )
    with pytest.warns(UserWarning, match="is as it was last fetched"):  # a folder is nothing that the hub answers for
        found = benchmarks.problems(dataset, "test")
    assert [target for _, target in found] == TARGETS["gsm8k", "test"]


def test_unreachable_hub_says_so():
    """An address nobody listens at, as a machine without a network has; the cache is an empty folder."""
    code = "import tasks; tasks.load('gsm8k')"
    for setting in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"HF_HOME": "/nonexistent", "HF_HUB_OFFLINE": "0"} | setting,
            cwd=Path(tasks.__file__).parents[1],
            timeout=300,
            capture_output=True,
            text=True,
        )
        last = run.stderr.strip().splitlines()[-1]
        assert last.startswith("ValueError: cannot fetch dataset openai/gsm8k from the hub ("), run.stderr
        assert last.endswith("download it elsewhere and pass --data FILE with columns 'question', 'answer'")
