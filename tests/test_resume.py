"""A run that is stopped, killed or cut short of disk goes on as if it never had been."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import HfArgumentParser

import train
from node import checkpoint, settings
from node import run as node_run

pytestmark = pytest.mark.usefixtures("short_runs")
SMALL = ["--engine", "torch", "--prompts", "4", "--group", "4", "--minibatches", "2", "--eval_problems", "4",
         "--max_tokens", "48", "--eval_every", "3", "--save_every", "1", "--heads_every", "2"]  # fmt: skip


ROOT = Path(train.__file__).parent


def run(*argv):
    train.main(*HfArgumentParser(train.Args).parse_args_into_dataclasses([*map(str, argv)]))


def outcome(folder, steps=5):
    """The final weights, and all that is logged but times."""
    files = [folder / name for name in ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl")]
    log = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return load_file(folder / f"checkpoint-{steps}" / "model.safetensors"), [
        {k: v for k, v in r.items() if k not in ("seconds", "tokens_per_s")} for r in log
    ]


def same(a, b):
    return a[1] == b[1] and a[0].keys() == b[0].keys() and all(torch.equal(a[0][k], b[0][k]) for k in a[0])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(*SMALL, "--steps", 5, "--out", folder)
    assert [p.name for p in checkpoint.list_checkpoints(folder)] == ["checkpoint-4", "checkpoint-5"]
    assert sum(r.get("grad_norm", 0) > 0 for r in outcome(folder)[1]) >= 3, "there is something to lose"
    return outcome(folder)


def after_step(monkeypatch, number, do):
    """Have something happen at the end of a step."""
    real, count = train.train_step, iter(range(1, 99))

    def step(*args):
        result = real(*args)
        if next(count) == number:
            do()
        return result

    monkeypatch.setattr(train, "train_step", step)


def test_a_signal_saves_and_the_run_goes_on_to_the_bit(tmp_path, monkeypatch, capsys, uninterrupted):
    how = [*SMALL, "--steps", 5, "--out", tmp_path / "run"]
    monkeypatch.setattr("sys.argv", ["my_train.py"])
    for number, steps, after in ((signal.SIGTERM, 1, 1), (signal.SIGINT, 3, 4)):
        before = signal.getsignal(number)
        with monkeypatch.context() as patch:
            after_step(patch, steps, lambda number=number: os.kill(os.getpid(), number))
            run(*how)
        said = f"stopped after step {after}, as asked. To resume: python my_train.py --resume {tmp_path}/run"
        assert said in capsys.readouterr().out
        assert signal.getsignal(number) == before
        how = ["--resume", tmp_path / "run"]
    run(*how)
    assert same(outcome(tmp_path / "run"), uninterrupted)


def test_the_gain_counts_from_before_the_first_step_also_after_a_resume(tmp_path, monkeypatch, capsys):
    found, started, limit = iter([0.0, 0.5, 1.0, 1.0]), [], node_run.Run.gap_limit
    monkeypatch.setattr(train, "evaluate", lambda *args, **how: ([], torch.full((4, 2), next(found))))
    monkeypatch.setattr(node_run.Run, "gap_limit", lambda self: started.append(self.started_at) or limit(self))
    run(*SMALL, "--steps", 2, "--out", tmp_path / "run")
    run("--resume", tmp_path / "run", "--steps", 3)
    assert "0.0 % -> 100.0 %, +100.0 points" in capsys.readouterr().out
    assert started == [0, 0, 2], "gap_mean is compared with the first steps since the start or the resume"


def test_more_steps_may_be_added_and_nothing_else(tmp_path, capsys, uninterrupted):
    run(*SMALL, "--steps", 3, "--out", tmp_path / "run")
    with pytest.raises(SystemExit, match="Remove --lr"):
        run("--resume", tmp_path / "run", "--lr", 1)
    run("--resume", tmp_path / "run", "--steps", 5)
    assert same(outcome(tmp_path / "run"), uninterrupted)
    assert node_run.read_args(train.Args(resume=str(tmp_path / "run"))).steps == 5, "and killed, it is to be resumed so"
    with pytest.raises(SystemExit, match=r"--steps 2: .*has already done 5 steps"):
        run("--resume", tmp_path / "run", "--steps", 2)
    capsys.readouterr()
    run("--resume", tmp_path / "run", "--dry_run")
    assert "5 steps of 4 problems x 4 responses" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no run is there"):
        run("--resume", tmp_path)


DAMAGE = {
    "truncated weights": lambda c: os.truncate(c / "model.safetensors", 100_000),
    "a flipped bit in the state": lambda c: (c / "trainer.pt").write_bytes(
        bytes(b ^ (i == 500) for i, b in enumerate((c / "trainer.pt").read_bytes()))
    ),
    "moments cut off": lambda c: os.truncate(max((c / "optimizer").iterdir(), key=lambda f: f.stat().st_size), 1000),
    "no manifest": lambda c: (c / "manifest.json").unlink(),
    "a missing file": lambda c: (c / "tokenizer.json").unlink(),
}


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, monkeypatch, capsys, uninterrupted):
    after_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    run(*SMALL, "--steps", 5, "--out", tmp_path / "run")
    for name, damage in DAMAGE.items():
        shutil.copytree(tmp_path / "run", tmp_path / name)
        damage(tmp_path / name / "checkpoint-3")
        assert checkpoint.find_latest(tmp_path / name)[0].name == "checkpoint-2"
        assert "checkpoint-3 is damaged" in capsys.readouterr().err
    for file in ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl"):
        with open(tmp_path / name / file, "a") as f:
            f.write('{"step": 4, "rew')  # and the line that was being written
    run("--resume", tmp_path / name)
    captured = capsys.readouterr()
    assert "checkpoint-3 is damaged" in captured.err and "checkpoint-2" in captured.out
    assert same(outcome(tmp_path / name), uninterrupted)


def test_the_checksum_is_of_the_whole_file(tmp_path):
    content = bytes(2**24) + b"the second block"
    (tmp_path / "x").write_bytes(content)
    assert checkpoint._crc(tmp_path / "x") == zlib.crc32(content)


def test_saving_after_a_damaged_later_checkpoint_keeps_the_new_one(tmp_path, capsys):
    model, tokenizer = settings.load_model(settings.TINY)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (3, 5, 4):  # 5 is damaged, so the run went on from 3
        checkpoint.save(tmp_path, {"step": step}, model, tokenizer, optimizer, keep=1 if step == 4 else 9)
        if step == 5:
            DAMAGE["truncated weights"](tmp_path / "checkpoint-5")
    assert [p.name for p in checkpoint.list_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-5"]
    assert checkpoint.find_latest(tmp_path)[0].name == "checkpoint-4"
    assert "checkpoint-5 is damaged" in capsys.readouterr().err


def test_moments_that_do_not_exist_yet(tmp_path):
    """A checkpoint before the first gradient counts no step; and a weight may have no gradient for the whole run."""

    def begin():
        torch.manual_seed(0)
        model, tokenizer = settings.load_model(settings.TINY)
        return model, tokenizer, torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.0, fused=True)

    def step(model, optimizer):
        skipped = model.model.layers[3].mlp.up_proj.weight  # as the indexer of DeepSeek V3.2 is
        model(input_ids=torch.tensor([[3, 4, 5]])).logits.square().sum().backward()
        skipped.grad = None
        optimizer.step()
        optimizer.zero_grad()

    def save_and_restore(name, model, tokenizer, optimizer):
        checkpoint.save(tmp_path, {"step": name}, model, tokenizer, optimizer, keep=9)
        again, _, new = begin()
        again.load_state_dict(model.state_dict())
        checkpoint.restore(tmp_path / f"checkpoint-{name}", again, new)
        return again, new

    model, tokenizer, optimizer = begin()
    for name in range(3):
        again, new = save_and_restore(name, model, tokenizer, optimizer)
        step(model, optimizer)
        step(again, new)
        for (weight, a), b in zip(model.named_parameters(), again.parameters()):
            assert torch.equal(a, b), weight


def test_nothing_whole_is_an_error_and_nothing_saved_yet_a_new_start(tmp_path, monkeypatch, uninterrupted):
    run(*SMALL, "--steps", 1, "--out", tmp_path / "run")
    (tmp_path / "run" / "checkpoint-1" / "manifest.json").write_text("{")
    with pytest.raises(SystemExit, match=r"every checkpoint in .* is damaged"):
        run("--resume", tmp_path / "run")
    (tmp_path / "run" / "checkpoint-1").rename(tmp_path / "run" / "checkpoint-unfinished")
    run("--resume", tmp_path / "run", "--steps", 5)
    assert same(outcome(tmp_path / "run"), uninterrupted)
    assert not (tmp_path / "run" / "checkpoint-unfinished").exists()


def test_a_full_disk_is_an_error_and_the_run_can_go_on(tmp_path, monkeypatch, uninterrupted):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    after_step(monkeypatch, 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8_000_000, limits[1])))
    try:  # the weights still fit (6 MB), the optimizer's state (12 MB) does not
        with pytest.raises(SystemExit, match=r"checkpoint-3 could not be written.*checkpoint-2 is there: make room"):
            run(*SMALL, "--steps", 5, "--out", tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "run" / "checkpoint-unfinished").exists()
    run("--resume", tmp_path / "run")
    assert same(outcome(tmp_path / "run"), uninterrupted)


def test_gradients_that_are_not_finite_are_skipped_counted_and_end_the_run(tmp_path, monkeypatch):
    real, steps = train.shape_advantages, iter([1.0, float("nan"), 1.0, *[float("nan")] * 9])
    monkeypatch.setattr(train, "shape_advantages", lambda a, g, sign: real(a, g, sign) * next(steps))
    with pytest.raises(SystemExit, match="not finite in 3 steps in a row"):
        run(*SMALL, "--steps", 9, "--prompts", 8, "--out", tmp_path / "run")
    log = [r for r in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) if "reward" in r]
    assert [r["skipped"] for r in log] == [0, 2, 0, 2, 2, 2]
    path, _ = checkpoint.find_latest(tmp_path / "run")
    assert all(w.isfinite().all() for w in load_file(path / "model.safetensors").values())


def test_killed_at_any_moment_it_ends_with_the_same_weights(tmp_path, uninterrupted):
    """kill -9 at random moments, KILLS of them (2 here; more by the environment), resumed each time; a run that gets to
    its end must be the uninterrupted one, and if there are kills left another is begun. Every second kill waits for
    a new checkpoint first, so that some fall after one however slow the machine is."""
    kills, rng, number, after_a_checkpoint = int(os.environ.get("KILLS", 2)), random.Random(0), 0, 0
    while kills > 0:
        number, done = number + 1, False
        folder = tmp_path / f"run{number}"
        while not done:
            begun = (folder / "args.json").exists()
            how = ["--resume", str(folder)] if begun else [*SMALL, "--steps", "5", "--out", str(folder)]
            process = subprocess.Popen(
                [sys.executable, "train.py", *how], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                text=True,
            )  # fmt: skip
            if kills > 0:
                seen, new_one = checkpoint.list_checkpoints(folder), kills % 2 == 1
                while process.poll() is None and (
                    checkpoint.list_checkpoints(folder) in (seen, [])
                    if new_one
                    else not (folder / "args.json").exists()
                ):
                    time.sleep(0.05)
                time.sleep(rng.uniform(0, 2))
                after_a_checkpoint += process.poll() is None and bool(checkpoint.list_checkpoints(folder))
                process.kill()
                kills -= 1
            err = process.communicate(timeout=900)[1]
            assert process.returncode in (0, -signal.SIGKILL), err
            done = process.returncode == 0
        assert same(outcome(folder), uninterrupted)
    assert after_a_checkpoint > 0
