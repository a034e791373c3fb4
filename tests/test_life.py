"""The life of a run: it starts or leaves nothing, has its folder for itself, stops when asked, goes on as it was."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import HfArgumentParser

import eval as evaluation
import tasks
import train
from node import checkpoint, prepare, ranks, settings
from node import run as node_run
from node.reload import wake

pytestmark = pytest.mark.usefixtures("short_runs")
QUICK = ["--engine", "torch", "--prompts", "2", "--group", "2", "--minibatches", "1", "--eval_problems", "2",
         "--eval_every", "0", "--save_every", "99", "--max_tokens", "12"]  # fmt: skip


def run(*argv):
    train.main(*HfArgumentParser(train.Args).parse_args_into_dataclasses([*map(str, argv)]))


def refused(*argv):
    """The one line that a run ends with."""
    with pytest.raises(SystemExit, match=r"^error: ") as e:
        run(*argv)
    assert "\n" not in str(e.value)
    return str(e.value)


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def what_was_sampled(folder):
    return [line for line in (folder / "samples.jsonl").read_text().splitlines()]


def at_call(monkeypatch, name, number, do, after=False):
    """Have something happen before, or after, a call of a function of train.py, counted from 1."""
    real, calls = getattr(train, name), []

    def call(*args, **more):
        calls.append(1)
        if len(calls) == number and not after:
            do()
        result = real(*args, **more)
        if len(calls) == number and after:
            do()
        return result

    monkeypatch.setattr(train, name, call)


def interrupt(times=1, number=signal.SIGINT):
    for _ in range(times):
        os.kill(os.getpid(), number)


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    run(*QUICK, "--steps", 4, "--out", folder)
    return folder


@pytest.fixture
def one_step(four_steps, tmp_path):
    """A run that can be resumed after its last step, in a folder of its own."""
    return shutil.copytree(four_steps, tmp_path / "copy")


# ---- the folder ----

HOLD = """
import fcntl, sys
files = [open(name, "a+") for name in sys.argv[1:]]
for file in files:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("held", flush=True)
input()
"""


def test_a_run_has_its_folder_for_itself_and_kill_9_frees_it(one_step, tmp_path, monkeypatch):
    (tmp_path / "new").mkdir()
    hold = [sys.executable, "-c", HOLD, str(one_step / "lock"), str(tmp_path / "new" / "lock")]
    other = subprocess.Popen(hold, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    (one_step / "lock").write_text(f"process {other.pid} on elsewhere\n")
    assert f"{one_step} is in use by process {other.pid} on elsewhere" in refused("--resume", one_step)
    assert len(records(one_step)) == 6, "nothing was touched"
    assert "new is in use by another process" in refused(*QUICK, "--out", tmp_path / "new")
    assert (tmp_path / "new" / "lock").exists(), "the folder of another run that starts is not removed"
    other.kill()
    other.wait()
    tried = []
    at_call(monkeypatch, "train_step", 1, lambda: tried.append(subprocess.run(hold, capture_output=True)))
    run("--resume", one_step, "--steps", 5)
    assert b"BlockingIOError" in tried[0].stderr and f"process {os.getpid()} on" in (one_step / "lock").read_text()


def test_without_locks_in_the_file_system_a_run_says_so(one_step, monkeypatch, capsys):
    def no_locks(file, how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    run("--resume", one_step)
    assert "has no locks (No locks available)" in capsys.readouterr().out


@pytest.fixture
def ctrl_c():
    """Ctrl-C as in a terminal. A background job of a shell, which may run the tests, ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_run_that_does_not_start_leaves_no_folder(tmp_path, monkeypatch, capsys, ctrl_c):
    def no_memory(*args, **how):
        raise ValueError("vLLM has no memory")

    (tmp_path / "empty").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(train, "start_actor", no_memory)
        assert "vLLM has no memory" in refused(*QUICK, "--out", tmp_path / "new")
        assert "vLLM has no memory" in refused(*QUICK, "--out", tmp_path / "empty")
    for number in (signal.SIGINT, signal.SIGTERM):
        before = signal.getsignal(number)
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as e:
            at_call(patch, "start_actor", 1, lambda number=number: interrupt(1, number))
            run(*QUICK, "--out", tmp_path / "new")
        assert e.value.code == 130 and signal.getsignal(number) == before
        assert "stopped before the first step, as asked: nothing has changed" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["empty"] and not [*(tmp_path / "empty").iterdir()]


def test_saving_is_tried_before_the_first_step(tmp_path, monkeypatch):
    real = prepare.load

    def load_one_that_cannot_be_saved(*args):
        model, *others = real(*args)
        model.config.strange = object()
        return model, *others

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "load", load_one_that_cannot_be_saved)
        assert "a checkpoint of this model cannot be written: TypeError" in refused(*QUICK, "--out", tmp_path / "run")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**24))
    line = refused(*QUICK, "--steps", 5, "--save_every", 2, "--out", tmp_path / "run")
    assert "3 checkpoint(s) need 0.05 GiB, and 0.02 GiB are free. Make room, lower --keep" in line
    assert not (tmp_path / "run").exists()


def test_the_size_of_a_checkpoint_is_known_and_a_full_disk_is_named(four_steps, tmp_path, monkeypatch):
    model, tokenizer = settings.load_model(str(four_steps / "checkpoint-4"), "cpu")
    size = sum(file.stat().st_size for file in (four_steps / "checkpoint-4").rglob("*"))
    assert checkpoint.count_bytes(model) == pytest.approx(size, rel=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**6))
    monkeypatch.setattr(checkpoint, "_save_weights", lambda *args: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    with pytest.raises(OSError, match=r"too full: 1 checkpoint.* 0.02 GiB, and 0.00 GiB are free\); none is there"):
        checkpoint.save(tmp_path, {"step": 1}, model, tokenizer, optimizer, 1)


# ---- stopping ----


def test_ctrl_c_says_what_follows_and_a_second_one_saves_the_step_before(tmp_path, monkeypatch, capfd, four_steps):
    monkeypatch.setattr(node_run, "SAME_SIGNAL", -1)
    monkeypatch.setattr("sys.argv", ["my_train.py"])
    with monkeypatch.context() as patch:
        at_call(patch, "sample_batch", 3, lambda: interrupt(2))
        run(*QUICK, "--steps", 4, "--out", tmp_path / "run")
    out, err = capfd.readouterr()
    assert "Ctrl-C: finishing step 3, then saving. A second Ctrl-C stops now" in err
    assert "saving step 2" in out and "stopped after step 2, as asked. To resume: python my_train.py --resume" in out
    run("--resume", tmp_path / "run")
    assert what_was_sampled(tmp_path / "run") == what_was_sampled(four_steps), "as if it had not been stopped"
    mine, theirs = (settings.load_model(str(f / "checkpoint-4"), "cpu")[0] for f in (tmp_path / "run", four_steps))
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters()))


def test_two_signals_at_once_are_one_request(tmp_path, monkeypatch, capfd):
    at_call(monkeypatch, "sample_batch", 1, lambda: interrupt(2, signal.SIGTERM))
    run(*QUICK, "--steps", 4, "--out", tmp_path / "run")
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path / "run")] == ["checkpoint-1"]
    assert capfd.readouterr().err.count("SIGTERM: finishing step 1, then saving") == 1


def test_a_second_ctrl_c_in_an_update_says_what_is_lost(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(node_run, "SAME_SIGNAL", -1)
    at_call(monkeypatch, "update", 3, lambda: interrupt(2), after=True)
    real = train.shape_advantages
    monkeypatch.setattr(train, "shape_advantages", lambda *args: real(*args) + 1)  # every step has a gradient
    with pytest.raises(SystemExit) as e:
        run(*QUICK, "--steps", 4, "--out", tmp_path / "run")
    assert e.value.code == 130 and not checkpoint.list_checkpoints(tmp_path / "run")
    assert "stopped at once, as asked; steps 1 to 2 could not be saved" in capsys.readouterr().out


@pytest.mark.parametrize("evaluation_number, saved", [(1, []), (2, ["checkpoint-1"])])
def test_ctrl_c_ends_an_evaluation_at_once(evaluation_number, saved, tmp_path, monkeypatch, capsys):
    after = []
    monkeypatch.setattr("sys.argv", ["my_train.py"])
    at_call(monkeypatch, "evaluate", evaluation_number, lambda: (interrupt(), after.append("not at once")))
    run(*QUICK, "--steps", 4, "--eval_every", 1, "--out", tmp_path / "run")
    assert not after and [p.name for p in checkpoint.list_checkpoints(tmp_path / "run")] == saved
    where = "after step 1" if saved else "before the first step"
    said = f"stopped {where}, as asked. To resume: python my_train.py --resume {tmp_path}/run"
    assert said in capsys.readouterr().out
    assert node_run.read_args(train.Args(resume=str(tmp_path / "run"))).steps == 4


def test_several_ranks_finish_an_evaluation_and_save_nothing_when_asked_again(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    state = SimpleNamespace(doing=node_run.EVALUATION, step=2, saved_step=1, _asked_at=None, say=print, folder="runs/x")
    node_run.Run._on_signal(state, signal.SIGINT, None)
    assert state.doing == node_run.EVALUATION and state._asked_at
    monkeypatch.setattr(node_run, "SAME_SIGNAL", -1)
    with pytest.raises(KeyboardInterrupt):
        node_run.Run._on_signal(state, signal.SIGINT, None)
    with pytest.raises(SystemExit):
        node_run.Run._end_at_once(state)
    assert "step 2 could not be saved. To resume: torchrun --nproc-per-node 2" in capsys.readouterr().out


# ---- going on ----


def test_edited_arguments_hold_or_are_refused(one_step, capsys):
    args = json.loads((one_step / "args.json").read_text())

    def edit(**changes):
        (one_step / "args.json").write_text(json.dumps(args | changes))

    edit(seed=1)
    assert "the training problems of countdown-tiny are not those that the run had" in refused("--resume", one_step)
    edit(model="another/model")
    assert "its args.json says --model another/model now" in refused("--resume", one_step)
    edit(lr=0.5)
    run("--resume", one_step, "--steps", 5)
    assert "edited since checkpoint-4. From the next step on: lr 0.0002 to 0.5" in capsys.readouterr().out
    assert [r["lr"] for r in records(one_step) if "lr" in r][-1] == pytest.approx(0.5), "step 5 ends the warmup"


def test_other_data_is_refused_with_the_files_name_and_older_checkpoints_resume(tmp_path):
    args = train.Args(resume="runs/x", data="mine.jsonl", task="gsm8k")
    problem = tasks.Problem
    then, now = ([problem("1 + 1 =", "2"), problem("1 + 2 =", answer)] for answer in ("3", "4"))
    kept = {"problems": prepare.identify_problems(then, then)}
    prepare.check_resumed(args, tmp_path, kept, prepare.identify_problems(then, then))
    prepare.check_resumed(args, tmp_path, {}, prepare.identify_problems(then, now))
    with pytest.raises(ValueError, match=r"training problems of mine\.jsonl are not .* \(2 now, 2 then\)"):
        prepare.check_resumed(args, tmp_path, kept, prepare.identify_problems(now, then))
    args.eval_data = "held.jsonl"
    with pytest.raises(ValueError, match=r"held-out problems of held\.jsonl are not .* \(1 now, 2 then\)"):
        prepare.check_resumed(args, tmp_path, kept, prepare.identify_problems(then, then[:1]))


def test_how_a_run_is_evaluated_does_not_change_what_it_samples(tmp_path, four_steps):
    run(*QUICK, "--steps", 4, "--out", tmp_path / "run", "--eval_every", 1, "--eval_problems", 3, "--eval_samples", 1)
    assert what_was_sampled(tmp_path / "run") == what_was_sampled(four_steps)


def test_a_checkpoint_remembers_its_chat_settings(four_steps, tmp_path):
    copied = shutil.copytree(four_steps / "checkpoint-4", tmp_path / "alone")
    args = evaluation.Args(task=["countdown-tiny"])
    args.max_tokens = checkpoint.read_args(copied)["max_tokens"]
    assert evaluation.compare_with_training(str(copied), args) == []
    args.chat, args.thinking = True, "off"
    (warning,) = evaluation.compare_with_training(str(copied), args)
    assert "--chat False then, True now; --thinking None then, off now" in warning and "\n" not in warning
    assert evaluation.compare_with_training("assets/tiny", args) == [], "not trained here"
    kept = checkpoint.read_args(copied) | {"chat": True, "thinking": "off", "stop": ["\n\n"]}
    (copied / "train_args.json").write_text(json.dumps(kept))
    assert "--stop ['\\n\\n'] then, [] now" in evaluation.compare_with_training(str(copied), args)[0]
    args.stop = ["\n\n"]
    assert evaluation.compare_with_training(str(copied), args) == []
    args.max_tokens += 1
    assert "--max_tokens" in evaluation.compare_with_training(str(copied), args)[0]


def test_evaluating_on_the_training_file_is_said(four_steps, tmp_path):
    copied = shutil.copytree(four_steps / "checkpoint-4", tmp_path / "alone")
    trained = checkpoint.read_args(copied) | {"data": str(tmp_path / "mine.jsonl")}
    (copied / "train_args.json").write_text(json.dumps(trained))
    args = evaluation.Args(task=["gsm8k"], data=f"{tmp_path}/./mine.jsonl", max_tokens=trained["max_tokens"])
    (warning,) = evaluation.compare_with_training(str(copied), args)
    assert "was trained on" in warning and "mine.jsonl" in warning and "\n" not in warning
    args.data = str(tmp_path / "other.jsonl")
    assert evaluation.compare_with_training(str(copied), args) == []


def test_a_run_that_was_asked_to_stop_is_not_evaluated_first(tmp_path, monkeypatch):
    at_call(monkeypatch, "sample_batch", 2, interrupt)
    run(*QUICK, "--steps", 4, "--eval_every", 2, "--out", tmp_path / "run")
    assert [r["step"] for r in records(tmp_path / "run") if "success" in r] == [0]


# ---- errors ----


def test_a_run_that_diverged_ends_and_saves_nothing(tmp_path, monkeypatch):
    real = train.describe_tokens
    monkeypatch.setattr(train, "describe_tokens", lambda *args: real(*args) | {"gap_mean": float("nan")})
    assert "the update diverged" in refused(*QUICK, "--steps", 2, "--out", tmp_path / "run")
    assert not checkpoint.list_checkpoints(tmp_path / "run")


def test_errors_of_users_and_libraries_are_one_line_and_ours_are_not():
    def ours():
        raise RuntimeError("a bug of ours")

    for error in (KeyError, TypeError, AttributeError, RuntimeError):
        with pytest.raises(error), ranks.errors_in_one_line():
            ours() if error is RuntimeError else exec("raise error('x')", {"error": error})
    with pytest.raises(SystemExit, match="OutOfMemoryError: CUDA out of memory"), ranks.errors_in_one_line():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    with pytest.raises(SystemExit) as e, ranks.errors_in_one_line():
        torch.nn.Linear(2, 3)(torch.ones(1, 5))
    assert str(e.value).startswith("error: RuntimeError: ") and "(raised by torch, called in test_life.py" in str(
        e.value
    )


def test_a_sleeping_vllm_that_finds_its_memory_taken_is_one_line():
    def wake_up(tags):
        raise RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp:62\nmore")

    with pytest.raises(SystemExit, match=r"GPU memory of its weights .* out of memory .* Another process") as e:
        wake(SimpleNamespace(wake_up=wake_up), "weights")
    assert "\n" not in str(e.value)
