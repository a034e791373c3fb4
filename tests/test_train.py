"""The loop as users run it: real vLLM, the command line, what it leaves behind, and what it says when it cannot run."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

import config
import rollout
import runs
import train

SMALL = [
    "--steps",
    "3",
    "--prompts",
    "6",
    "--group",
    "4",
    "--updates",
    "2",
    "--eval_problems",
    "16",
    "--max_tokens",
    "96",
]


def run(*argv):
    train.main(*HfArgumentParser(train.Args).parse_args_into_dataclasses([*SMALL, *map(str, argv)]))


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_with_vllm(tmp_path, capsys):
    run("--out", tmp_path / "run", "--eval_every", 2)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("held-out success") and "interval" in last and last.endswith(str(tmp_path / "run"))
    log = records(tmp_path / "run")
    assert [r["step"] for r in log if "success" in r] == [0, 2, 3]
    stability = [r["stability"] for r in log if "success" in r]
    assert stability[0]["local heads"] == 1 and 0.7 < stability[2]["FAI rank correlation"] < 1
    steps = [r for r in log if "reward" in r]
    assert [r["step"] for r in steps] == [1, 2, 3]
    for r in steps:
        assert r["gap_max"] < 1e-3 and r["gap_mean"] <= r["gap_max"]
        assert set(r["seconds"]) == {"generate", "score", "credit", "update", "reload"}
        assert r["truncated"] < 24 and r["empty"] == 0 and r["within_horizon"] == 0 and 0.05 < r["entropy"] < 0.6
        assert 1 < r["gamma"] < 1.75
    assert any("grad_norm" in r and r["grad_norm"] > 0 for r in steps)
    assert (tmp_path / "run" / "learning_curve.png").stat().st_size > 5000

    before, after = (
        AutoModelForCausalLM.from_pretrained(p) for p in ("assets/tiny", tmp_path / "run" / "checkpoint-3")
    )
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "run" / "checkpoint-3")) == len(
        AutoTokenizer.from_pretrained("assets/tiny")
    )


def test_a_sampler_that_was_not_reloaded_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(rollout.VLLMActor, "reload", lambda self, model: None)
    with pytest.raises(SystemExit, match="weights were not reloaded"):
        run("--out", tmp_path / "run", "--steps", 12, "--eval_problems", 2)
    steps = [r for r in records(tmp_path / "run") if "reward" in r]
    assert len(steps) <= 4, "noticed within a few steps, at the default learning rate"
    assert list((tmp_path / "run").glob("checkpoint-*/config.json")), "nothing is lost"


CREDITS = ["coupled", "local", "global", "entropy", "random", "uniform", "scaled"]


@pytest.mark.parametrize(
    "extra",
    [*(["--credit", c] for c in CREDITS), ["--sign", "positive"], ["--all_heads"], ["--on_produced"],
     ["--horizon", "5"], ["--epsilon_high", "0.28"]],
    ids=" ".join,
)  # fmt: skip
def test_every_credit_and_ablation_trains(extra, tmp_path):
    run("--engine", "torch", "--out", tmp_path / "run", "--steps", 1, "--eval_problems", 2, *extra)
    step = records(tmp_path / "run")[1]
    assert step["gap_max"] < 1e-3
    if "grad_norm" in step:
        expected = {"uniform": 1.0, "random": 1.2, "entropy": 1.2, "local": 1.2}.get(extra[-1])
        assert expected is None or step["gamma"] == pytest.approx(expected, abs=0.02)


def test_a_run_repeats_itself_and_micro_batches_do_not_matter(tmp_path):
    for name, micro in (("a", 2048), ("b", 2048), ("c", 300)):
        run(
            "--engine",
            "torch",
            "--out",
            tmp_path / name,
            "--micro_tokens",
            micro,
            "--heads_every",
            2,
            "--credit",
            "coupled",
        )
    dropped = ("seconds", "tokens_per_s", "stability")
    a, b, c = (
        [{k: v for k, v in r.items() if k not in dropped} | r.get("stability", {}) for r in records(tmp_path / x)]
        for x in "abc"
    )
    assert a == b
    for x, y in zip(a, c):
        assert x == pytest.approx(y, abs=2e-3), "the same but for rounding"


def test_every_flag_reaches_the_credit():
    """Each ablation changes gamma or the heads on the same rollouts."""
    model, tokenizer = rollout.load_model("assets/tiny")
    torch.manual_seed(0)
    problems = train.tasks.load("countdown-tiny", "test", 16)
    groups = rollout.TorchActor(model, tokenizer).generate([p.prompt for p in problems], n=1, max_tokens=96)
    ids, mask, _ = rollout.pack([r for g in groups for r in g])
    rows = torch.arange(16)

    def outcome(**changes):
        args = train.Args(**changes)
        heads = train.measure_heads(args, model, ids, mask, rows)
        signals = train.score(args, model, ids, mask, rows, heads)
        gamma = train.gammas(args, signals, mask, torch.Generator().manual_seed(0))
        return torch.cat([gamma[mask], train.shape_advantages(torch.tensor([1.0, -1.0] * 8), gamma, args.sign)[mask]])

    changes = [
        {}, {"credit": "local"}, {"credit": "global"}, {"credit": "entropy"}, {"credit": "random"},
        {"credit": "uniform"}, {"credit": "scaled"},
        {"q": 0.2}, {"amp": 2.0}, {"alpha": 0.1}, {"k": 1}, {"window": 3}, {"horizon": [10, 20]}, {"horizon": [10]},
        {"quantile": 0.1}, {"layers": "top"}, {"layers": "bottom"}, {"layers": "all"}, {"all_heads": True},
        {"lowest": True}, {"on_produced": True}, {"sign": "positive"}, {"sign": "negative"},
    ]  # fmt: skip
    seen = [outcome(**c) for c in changes]
    same = [(a, b) for i, a in enumerate(changes) for j, b in enumerate(changes) if i < j and seen[i].equal(seen[j])]
    assert not [pair for pair in same if pair != ({}, {"horizon": [10]})], "responses under 100: the horizon never ends"
    assert seen[0].equal(outcome(micro_tokens=300)), "the size of a pass changes nothing"


def test_checkpointing_and_importance_weights_near_one_change_nothing(tmp_path):
    one = ["--engine", "torch", "--steps", 1, "--eval_problems", 2, "--prompts", 12]
    results = []
    for name, extra in (("a", []), ("b", ["--checkpointing"]), ("c", ["--importance_cap", 2]),
                        ("d", ["--importance_cap", 1e-9])):  # fmt: skip
        run("--out", tmp_path / name, *one, *extra)
        results.append(records(tmp_path / name)[1])
    a, b, c, d = results
    assert a["grad_norm"] > 0.01
    for other in (b, c):
        assert a["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
        assert a["loss"] == pytest.approx(other["loss"], abs=1e-6)
    assert d["grad_norm"] < 1e-6, "the weights are applied: cut at nothing, nothing is learned"


def test_dynamic_sampling_replaces_groups_of_equal_reward():
    actor = rollout.TorchActor(*rollout.load_model("assets/tiny"))
    problems = train.tasks.load("countdown-tiny", "train", 24)
    torch.manual_seed(0)
    args = train.Args(prompts=6, group=4, max_tokens=96, dynamic=True)
    groups, rewards, everything = train.sample(args, actor, problems)
    assert len(groups) == len(rewards) == 6 and all(0 < r.mean() < 1 for r in rewards)
    assert len(everything) > 6 and len(everything) % 6 == 0, "whole batches are drawn until there are enough"
    plain = train.sample(train.Args(prompts=6, group=4, max_tokens=96), actor, problems[:6])
    assert len(plain[0]) == 6 and torch.equal(plain[1], plain[2])


def test_each_epoch_has_every_problem_once_in_an_order_of_its_own():
    got = runs.take(list("abcde"), 0, 15, seed=1)
    epochs = [got[i : i + 5] for i in (0, 5, 10)]
    assert all(sorted(e) == list("abcde") for e in epochs) and epochs[0] != epochs[1]
    assert runs.take(list("abcde"), 3, 7, seed=1) == got[3:10] != runs.take(list("abcde"), 3, 7, seed=2)


def test_groups_of_equal_reward_are_survived(tmp_path, monkeypatch):
    monkeypatch.setattr(train.tasks, "reward", lambda problem, text: 0.0)
    run("--engine", "torch", "--out", tmp_path / "run", "--steps", 2, "--eval_problems", 2)
    steps = [r for r in records(tmp_path / "run") if "reward" in r]
    assert len(steps) == 2
    for r in steps:
        assert r["equal_groups"] == 6 and r["grad_norm"] == 0 and r["gap_max"] < 1e-3


def test_short_and_truncated_responses_are_survived(tmp_path, monkeypatch):
    coin = iter([0.0, 1.0] * 10_000)
    monkeypatch.setattr(train.tasks, "reward", lambda problem, text: next(coin))
    run("--engine", "torch", "--out", tmp_path / "run", "--max_tokens", 3, "--steps", 2, "--eval_problems", 2)
    steps = [r for r in records(tmp_path / "run") if "reward" in r]
    for r in steps:
        assert r["truncated"] + r["empty"] >= 20 and r["within_horizon"] == 24 and r["gamma"] == 1.0


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--group", "1"], "--group 1.*two or more"),
        (["--model", "no/such/place"], "cannot load a model from 'no/such/place'"),
        (["--task", "maths"], "unknown task 'maths'"),
        (["--context", "100"], "do not fit a context of 100"),
        (["--out", "/proc/nothing/run"], "--out /proc/nothing/run: cannot write there"),
        (["--q", "1.5"], "--q 1.5"),
        (["--horizon", "9", "3"], "--horizon"),
        (["--updates", "99"], "--updates 99"),
        (["--steps", "0"], "--steps 0"),
        (["--context", "2000"], "reads 512 tokens at most"),
        (["--prompts", "5000"], "has 4000 training problems"),
        (["--lr", "0"], "--lr 0"),
        (["--lr", "nan"], "--lr nan"),
        (["--seed", "-1"], "--seed -1"),
        (["--importance_cap", "-1"], "--importance_cap -1"),
        (["--eval_every", "-1"], "--eval_every -1"),
        (["--eval_problems", "0"], "--eval_problems 0"),
    ],
)
def test_bad_arguments_are_one_line_before_anything_starts(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "start_actor", None)  # reaching the engine would be a TypeError
    with pytest.raises(SystemExit, match=f"(?s)error: .*{message}") as e:
        run("--out", tmp_path / "run", *argv)
    assert "\n" not in str(e.value)


def test_a_dry_run_says_the_plan_and_starts_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "start_actor", None)
    monkeypatch.setattr(train, "load_model", None)
    run("--dry_run", "--out", tmp_path / "run")
    out = capsys.readouterr().out
    assert "1,443,744 weights" in out and "peak, asleep" in out and "4000 training problems" in out
    assert out.strip().endswith("nothing was started") and not (tmp_path / "run").exists()
    with pytest.raises(SystemExit, match="--group 1"):
        run("--dry_run", "--group", 1)


def test_a_wrong_credit_lists_the_choices(capsys):
    with pytest.raises(SystemExit):
        run("--credit", "anchor")
    assert "'anchor'" in capsys.readouterr().err


def test_the_torch_sampler_is_for_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--engine torch samples with the trainer's own weights"):
        config.check(config.Args(engine="torch", steps=1))


def test_a_second_run_never_writes_into_the_first(tmp_path, monkeypatch):
    first = runs.new_run_folder(train.Args(out=str(tmp_path / "run")), "x")
    (first / "metrics.jsonl").write_text("kept")
    with pytest.raises(ValueError, match="already holds a run"):
        runs.new_run_folder(train.Args(out=str(first)), "x")
    monkeypatch.chdir(tmp_path)
    folders = [runs.new_run_folder(train.Args(), "countdown-tiny-coupled") for _ in range(2)]
    assert [f.name for f in folders] == ["countdown-tiny-coupled-1", "countdown-tiny-coupled-2"]


def test_help_explains_every_option(capsys, monkeypatch):
    with pytest.raises(SystemExit):
        HfArgumentParser(train.Args).parse_args_into_dataclasses(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in train.Args.__dataclass_fields__.values():
        assert field.metadata["help"].split()[0] in text and f"--{field.name}" in text
