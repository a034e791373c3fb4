"""A task in a file of the user's: loaded, judged, trained on, evaluated; and everything that can be wrong with it."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import eval as evaluation
import tasks
import train
from node import prepare, settings
from rollout import Chat, TorchActor, VLLMActor, cut_at, tokenize

EXAMPLE = str(Path(__file__).parents[1] / "examples" / "my_task.py")

# A task that the tiny model can read: its letters are digits, operators and a few tags.
TINY_TASK = """
import json
from tasks import Problem

def load(split, data=None):
    return [Problem(f"{json.loads(line)['numbers']}>36\\n<think>") for line in open(data)]

def reward(problem, text):
    return len(set(text)) / 30  # a fraction
"""


def write(path, text):
    path.write_text(text)
    return str(path)


def write_rows(path, count=40):
    numbers = [f"{a} {b} 4" for a in range(1, 10) for b in range(1, 10)][:count]
    return write(path, "".join(json.dumps({"numbers": n}) + "\n" for n in numbers))


def test_the_example_loads_and_judges(tmp_path, monkeypatch):
    rows = [{"question": "What is 6 * 7?", "answer": "42"}, {"question": "Write f.", "tests": "assert f(3) == 9"}]
    data = write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    one, two = tasks.load(EXAMPLE, "train", data=data)
    reward = tasks.get(EXAMPLE).reward
    monkeypatch.setattr(tasks.get(EXAMPLE), "SECONDS", 2)
    assert [reward(one, text) for text in ("it is 42", "42 or 43", "")] == [1.0, 0.0, 0.0]
    assert reward(tasks.Problem("", {"answer": 42}), "42") == 1.0
    code = {
        "def f(x): return x * x": 1.0,
        "def f(x): return x + x": 0.0,
        "exit(0)": 0.0,
        "while True: pass": 0.0,
        "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)": 0.0,
        "def f(x):\x00": 0.0,
        "(" * 10_000: 0.0,
    }
    assert {text: reward(two, text) for text in code} == code
    with pytest.raises(ValueError, match=r"load.*raised ValueError: give a file of problems"):
        tasks.load(EXAMPLE, "train")


@pytest.mark.parametrize(
    "text, message",
    [
        ("def load(split, data=None): return []", "has no function reward"),
        ("def reward(problem, text): return 1", r"has no function load\(split"),
        ("def reward(:", "cannot be imported: SyntaxError"),
        (
            "import nosuchmodule",
            r"cannot be imported: ModuleNotFoundError: No module.*nosuchmodule' \(wrong.py, line 1\)",
        ),
    ],
)
def test_a_file_that_is_no_task_is_named(text, message, tmp_path):
    with pytest.raises(ValueError, match=message) as e:
        tasks.get(write(tmp_path / "wrong.py", text))
    assert "\n" not in str(e.value) and "wrong.py" in str(e.value)


@pytest.mark.parametrize(
    "body, message",
    [
        ("return []", "returned no problems"),
        ("return None", "raised TypeError"),
        ("return ['a prompt']", "item 0 is 'a prompt', not a Problem"),
        ("\n    return {}['question']", r"raised KeyError: 'question' \(my.py, line 2\)"),
    ],
)
def test_what_load_returns_is_checked(body, message, tmp_path):
    file = write(tmp_path / "my.py", f"def load(split, data=None): {body}\ndef reward(problem, text): return 1")
    with pytest.raises(ValueError, match=message):
        tasks.load(file, "train")


def test_a_reward_that_raises_counts_as_0_and_is_named(tmp_path):
    text = "def load(s, d=None): return []\ndef reward(p, text):\n    return dict(a=1, b=float('nan'), d=3.5)[text]"
    file = write(tmp_path / "my.py", text)
    rewards, errors, _ = tasks.judge(file, [tasks.Problem("say a")], [["a", "b", "c", "d"]])
    assert rewards == [[1.0, 0.0, 0.0, 0.0]]
    assert "reward returned nan, which is not from 0 to 1, for the response 'b' to the prompt 'say a'" in errors[0]
    assert "reward raised KeyError: 'c' (my.py, line 3), for the response 'c'" in errors[1]
    assert "reward returned 3.5, which is not from 0 to 1, for the response 'd'" in errors[2]


def test_a_reward_that_exits_counts_as_0(tmp_path):
    file = write(tmp_path / "my.py", "def load(s, d=None): return []\ndef reward(p, text): exit(text)")
    rewards, errors, _ = tasks.judge(file, [tasks.Problem("")], [["0"]])
    assert rewards == [[0.0]] and "reward raised SystemExit: 0 (my.py, line 2)" in errors[0]


def test_a_task_file_may_have_classes_of_its_own(tmp_path):
    """Dataclasses and pickle look a class up in the module of its name."""
    text = """
from __future__ import annotations
from dataclasses import dataclass
from tasks import Problem

@dataclass
class Answer:
    value: int

def load(split, data=None):
    return [Problem("6 * 7 =", Answer(42))]

def reward(problem, text):
    return float(text == str(problem.answer.value))
"""
    file = write(tmp_path / "with_a_class.py", text)
    for processes in (1, 2):
        found = tasks.judge(file, tasks.load(file, "train"), [["42", "43"]], processes=processes)
        assert found == ([[1.0, 0.0]], [], 0)
    tasks._pool.cache_clear()


def test_a_template_that_refuses_a_message_is_one_line():
    tokenizer = settings.load_tokenizer(settings.TINY, 1)
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ValueError, match=r"refuses this message \(System role not supported\)"):
        tokenize(tokenizer, ["1"], Chat(system="Be brief."))


def test_several_processes_judge_as_one_does():
    problems = [tasks.Problem("", ((3, 7, 5), 38)), tasks.Problem("", ((1, 2, 4), 7))]
    texts = [["<answer>5*7+3</answer>", "38"], ["<answer>1+2+4</answer>", ""]]
    assert tasks.judge("countdown", problems, texts, processes=2) == ([[1.0, 0.0], [1.0, 0.0]], [], 0)


def test_a_response_that_kills_its_judging_process_counts_as_0_and_the_others_as_they_are(tmp_path):
    text = "import os\ndef load(s, d=None): return []\ndef reward(p, text): return os._exit(1) if text == 'a' else 1.0"
    file = write(tmp_path / "my.py", text)
    for responses in (["a", "b", "b"], ["b", "b", "a"]):
        rewards, errors, _ = tasks.judge(file, [tasks.Problem("1")], [responses], processes=2)
        assert rewards == [[float(response == "b") for response in responses]]
        assert errors == ["a judging process died of the response 'a'"]
    tasks._pool.cache_clear()


JUDGE = """
import os, signal, sys, time
import tasks

if __name__ == "__main__":
    asked = []
    if sys.argv[2] == "finish":
        signal.signal(signal.SIGINT, lambda *_: asked.append("SIGINT"))
        signal.signal(signal.SIGTERM, lambda *_: asked.append("SIGTERM"))
    try:
        print(tasks.judge(sys.argv[1], [tasks.Problem("1")], [["a"] * 4], processes=2).rewards, *asked)
    except KeyboardInterrupt:
        print("interrupted")
"""
SLOW = """
import os, time
from pathlib import Path
def load(split, data=None): return []
def reward(problem, text):
    Path(__file__).with_name(f"pid-{os.getpid()}").touch()
    while not Path(__file__).with_name("go").exists():
        time.sleep(0.05)
    return 1.0
"""


@pytest.mark.parametrize("what", ["finish", "interrupt", "kill"])
def test_signals_to_the_run_are_not_those_of_its_judging_processes(what, tmp_path):
    """A run that is asked to stop finishes its step, rewards and all; one that ends at once waits for none of them."""
    task = write(tmp_path / "slow.py", SLOW)
    script = write(tmp_path / "judge.py", JUDGE)
    environment = os.environ | {"PYTHONPATH": str(Path(tasks.__file__).parents[1])}
    run = subprocess.Popen(
        [sys.executable, script, task, what], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    while len(pids := [int(file.name[4:]) for file in tmp_path.glob("pid-*")]) < 2:  # both processes judge
        assert run.poll() is None
        time.sleep(0.05)
    numbers = {"finish": (signal.SIGINT, signal.SIGTERM), "interrupt": (signal.SIGINT,), "kill": (signal.SIGKILL,)}
    for number in numbers[what]:
        os.killpg(run.pid, number)  # as a terminal and torchrun do
    if what == "finish":
        (tmp_path / "go").touch()
    out, _ = run.communicate(timeout=60)
    said = {"finish": "[[1.0, 1.0, 1.0, 1.0]] SIGINT SIGTERM\n", "interrupt": "interrupted\n", "kill": ""}
    assert out == said[what]
    for _ in range(200):
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            break
        time.sleep(0.05)
    else:
        raise AssertionError("a judging process outlived its run")


SHORT = dict(engine="torch", prompts=2, group=4, minibatches=2, max_tokens=24, eval_problems=4)


def arguments(**given):
    args = train.Args(**SHORT, **given)
    return prepare.complete_args(args, train.DEFAULTS)


def test_a_part_of_the_data_is_held_out(tmp_path, capsys):
    task, data = write(tmp_path / "my.py", TINY_TASK), write_rows(tmp_path / "rows.jsonl")
    args = arguments(task=task, data=data)
    tokenizer = settings.load_tokenizer("assets/tiny", 512)
    train_set, test_set = prepare.load_problems(args, tokenizer)
    prompts = [{p.prompt for p in problems} for problems in (train_set, test_set)]
    assert len(prompts[0]) == 36 and len(prompts[1]) == 4 and not prompts[0] & prompts[1]
    assert "4 of its 40 problems are held out" in capsys.readouterr().out
    assert prepare.load_problems(args, tokenizer) == (train_set, test_set), "always the same ones"
    with pytest.raises(ValueError, match="are the same file"):
        prepare.load_problems(arguments(task=task, data=data, eval_data=data), tokenizer)
    _, test_set = prepare.load_problems(arguments(task=task, data=data, eval_task="countdown-tiny"), tokenizer)
    assert test_set == tasks.load("countdown-tiny", "test", 4), "not a part of the data"
    other = write_rows(tmp_path / "others.jsonl", 10)
    train_set, test_set = prepare.load_problems(arguments(task=task, data=data, eval_data=other), tokenizer)
    assert len(train_set) == 36 and len(test_set) == 4
    assert "4 training problems are also held out" in capsys.readouterr().out
    same = arguments(task=task, data=data, eval_data=write_rows(tmp_path / "same.jsonl"))
    same.eval_problems = 40
    with pytest.raises(ValueError, match=r"all training problems are also held out.*--eval_data"):
        prepare.load_problems(same, tokenizer)


def test_english_for_the_tiny_model_is_warned_of(tmp_path, capsys):
    rows = [{"question": f"What is {i}?", "answer": "1"} for i in range(20)]
    data = write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    prepare.load_problems(arguments(task="gsm8k", data=data), settings.load_tokenizer("assets/tiny", 512))
    assert "% of the prompts' tokens are unknown to the tokenizer of assets/tiny" in capsys.readouterr().out


def test_rows_that_are_left_out_are_counted(tmp_path, caplog):
    rows = [{"question": "a", "answer": "1"}] * 2 + [
        {"question": "b", "answer": None},
        {"question": "c", "answer": "2"},
    ]
    rows += [{"question": "d", "answer": 123456789012345678901}, {"question": "e #### f", "answer": "g #### 1.50"}]
    data = write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    with caplog.at_level(logging.WARNING, logger="tasks"):
        found = tasks.load("gsm8k", "train", data=data)
    assert [p.answer for p in found] == ["1", "2", "123456789012345678901", "1.50"] and "e #### f" in found[3].prompt
    assert "2 of 6 rows left out: 1 that repeat a question, 1 without a question or an answer" in caplog.text
    assert tasks.load("minerva", data=data)[3].answer == "g #### 1.50"


def test_not_utf8_is_said_with_its_line(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"question": "a", "answer": "1"}\n{"question": "\xf6"}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl line 2: not valid UTF-8 \(byte 0xf6\). Save the file as UTF-8"):
        tasks.load("gsm8k", data=str(tmp_path / "rows.jsonl"))


def test_fractional_rewards_train_and_have_no_pass_at_j(tmp_path, monkeypatch, capsys):
    task, data = write(tmp_path / "my.py", TINY_TASK), write_rows(tmp_path / "rows.jsonl")
    args = train.Args(task=task, data=data, out=str(tmp_path / "run"), steps=1, **SHORT)
    train.main(args)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    step = next(record for record in records if "reward" in record)
    assert 0 < step["reward"] < 1 and step["reward_errors"] == 0 and "reward" in step["seconds"]
    out = tmp_path / "x.json"
    args = evaluation.Args(task=[task], data=data, engine="torch", problems=4, max_tokens=24, out=str(out))
    evaluation.main(args)
    (result,) = json.loads(out.read_text())["results"]
    assert "avg@1" in result["scores"] and not [name for name in result["scores"] if name.startswith("pass@")]
    with pytest.raises(ValueError, match="rewards of 0 or 1"):
        evaluation.pass_at(1, torch.tensor([[0.5, 1.0]]))


def test_each_task_has_its_own_stops_and_problems_of_any_kind(tmp_path, monkeypatch):
    """The held-out task's responses end at its own texts; problems that are no tasks.Problem train and are kept."""
    own_problem = TINY_TASK.replace("from tasks import Problem", "from collections import namedtuple").replace(
        "\ndef load", "\nProblem = namedtuple('Problem', 'prompt cells')\n\ndef load"
    )
    own_problem = own_problem.replace('<think>")', '<think>", {(0, 1): 2})')
    task = write(tmp_path / "my.py", own_problem + "\nstop = ('y',)\n")
    always_right = own_problem.replace("len(set(text)) / 30", "1.0")
    held_out = write(tmp_path / "other.py", always_right + "\nstop = ('n',)\n")
    data = write_rows(tmp_path / "rows.jsonl")
    seen, generate = [], TorchActor.generate

    def remember(self, prompts, n, max_tokens, temperature=1.0, stop=(), **options):
        seen.append(stop)
        return generate(self, prompts, n, max_tokens, temperature, stop, **options)

    monkeypatch.setattr(TorchActor, "generate", remember)
    args = train.Args(
        task=task, data=data, eval_task=held_out, eval_data=data, out=str(tmp_path / "run"), steps=1, **SHORT
    )
    args.eval_data = write_rows(tmp_path / "others.jsonl", 8)
    train.main(args)
    assert seen == [["n"], ["y"], ["n"]]
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["success"] for r in log if "success" in r] == [1.0, 1.0], "judged by the held-out task"
    out = tmp_path / "x.json"
    args = evaluation.Args(
        model=[str(tmp_path / "run")], task=[task], data=data, engine="torch", problems=2, max_tokens=24, out=str(out)
    )
    evaluation.main(args)
    assert seen[3:] == [["y"], ["y"]]
    ((row, _),) = [result["responses"] for result in json.loads(out.read_text())["results"]]
    assert row["prompt"].endswith("<think>") and row["answer"] is None


def test_a_run_whose_every_reward_raises_ends_with_a_checkpoint(tmp_path):
    text = TINY_TASK.replace("return len(set(text)) / 30", "return 1 / 0")
    task, data = write(tmp_path / "my.py", text), write_rows(tmp_path / "rows.jsonl")
    args = train.Args(task=task, data=data, out=str(tmp_path / "run"), steps=3, **SHORT)
    with pytest.raises(SystemExit, match=r"step 1: all 8 rewards raised.*division by zero \(.*, line 9\)"):
        train.main(args)
    assert (tmp_path / "run" / "checkpoint-1").is_dir()
    args = train.Args(task=task, data=data, out=str(tmp_path / "dynamic"), steps=3, dynamic=True, **SHORT)
    with pytest.raises(SystemExit, match="step 1: all 32 rewards raised"):
        train.main(args)


# ---- Chat templates, and texts that end a response ----

TEMPLATE = (
    "{% for m in messages %}{{ '3' if m.role == 'system' else '4' }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}{% if enable_thinking %}<think>{% endif %}"
)


def test_chat():
    _, tokenizer = settings.load_model("assets/tiny")
    with pytest.raises(ValueError, match=r"--chat: .*has no chat template"):
        tokenize(tokenizer, ["1"], Chat())
    tokenizer.chat_template = TEMPLATE
    for chat, text in ((Chat(), "41>"), (Chat("2"), "3241>"), (Chat(thinking=True), "41><think>"),
                       (Chat(thinking=False), "41>"), (None, "1")):  # fmt: skip
        assert tokenize(tokenizer, ["1"], chat) == tokenizer([text]).input_ids
    with pytest.raises(ValueError, match=r"--system: only with --chat"):
        prepare.load_problems(arguments(system="2"), tokenizer)


def test_a_run_with_chat_samples_from_the_template(tmp_path):
    model, tokenizer = settings.load_model("assets/tiny")
    tokenizer.chat_template = TEMPLATE
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    how = dict(model=str(tmp_path / "model"), task="countdown-tiny", chat=True, system="2", thinking="on")
    train.main(train.Args(**how, steps=1, out=str(tmp_path / "run"), **SHORT))
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])
    assert re.fullmatch(r"324\d[^<]*<think>><think>", sample["prompt"])


@pytest.mark.vllm
def test_stop(tmp_path):
    folder = shutil.copytree("assets/tiny", tmp_path / "tags")  # whose tags are special tokens: they count all the same
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"special": false', '"special": true'))
    assert cut_at("12=3=", ["3", "="]) == "12" and cut_at("12", []) == cut_at("12", None) == "12"
    model, tokenizer = settings.load_model(str(folder))
    assert tokenizer.decode(tokenizer("<think>").input_ids, skip_special_tokens=True) == ""
    prompts = [problem.prompt for problem in tasks.load("countdown-tiny", n=6)]
    for sampler in (TorchActor(model, tokenizer), VLLMActor(str(folder))):
        whole = sampler.generate(prompts, max_tokens=64, temperature=0.0)
        stopped = sampler.generate(prompts, max_tokens=64, temperature=0.0, stop=["n\n", "y<"])
        for (a,), (b,) in zip(whole, stopped):
            assert b.text == cut_at(a.text, ["n\n", "y<"])
            assert b.ids == a.ids[: len(b.ids)] and len(b.logprobs) == len(b.ids)
            if b.text != a.text:
                before = tokenizer.decode(b.ids[:-1])
                assert not b.truncated and cut_at(before, ["n\n", "y<"]) == before
                assert cut_at(tokenizer.decode(b.ids), ["n\n", "y<"]) == b.text != tokenizer.decode(b.ids)
        again = sampler.generate(prompts, max_tokens=64, temperature=0.0, stop=["<think>"])
        assert [r.ids for (r,) in again] == [r.ids for (r,) in whole], "a stop in the prompt ends nothing"
        assert sum(len(b.ids) < len(a.ids) for (a,), (b,) in zip(whole, stopped)) > 2
        sampler.close()
    assert tasks.stops("gsm8k", None, chat=False) == ["\n\nQuestion:"] and tasks.stops("gsm8k", None, chat=True) == []
    assert tasks.stops("gsm8k", ["x"], chat=True) == ["x"] and tasks.stops("countdown", None, chat=False) == []


# ---- Models and arguments that do not fit ----


def broken_copy(folder, **config):
    shutil.copytree("assets/tiny", folder)
    for name in ("config.json", "generation_config.json"):
        found = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(found | {k: v for k, v in config.items() if k in found}))
    return folder


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path):
    folder = broken_copy(tmp_path / "none")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match="tokenizer") as e:
        settings.load_tokenizer(str(folder), 512)
    assert "\n" not in str(e.value) and "none" in str(e.value)
    folder = broken_copy(tmp_path / "small", vocab_size=20)
    with pytest.raises(ValueError, match="has 30 tokens and the model's embedding 20"):
        settings.load_tokenizer(str(folder), 512)
    folder = broken_copy(tmp_path / "endless", eos_token_id=None)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer.pop("eos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="no end-of-text token"):
        settings.load_tokenizer(str(folder), 512)


def test_an_unknown_argument_is_said_in_one_line_with_the_nearest_name(monkeypatch):
    for unknown, message in (("--lrr", "unknown argument --lrr: did you mean --lr?"), ("countdown", "--help lists")):
        monkeypatch.setattr(sys, "argv", ["train.py", unknown, "1"])
        with pytest.raises(SystemExit, match=re.escape(message)):
            settings.parse_args(train.Args)


def test_a_run_is_evaluated_by_its_last_checkpoint(tmp_path, capsys):
    (tmp_path / "args.json").write_text("{}")
    with pytest.raises(ValueError, match="this run has no checkpoint yet"):
        evaluation.last_checkpoint(str(tmp_path))
    for step in (20, 100, 40):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert evaluation.last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-100")
    assert evaluation.last_checkpoint("assets/tiny") == "assets/tiny"


def test_the_tiny_model_is_found_from_any_folder(tmp_path):
    code = "from node.settings import TINY, is_tiny; assert is_tiny(TINY)"
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(root)}, check=True)
