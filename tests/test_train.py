"""The loop as users run it: real vLLM, the command line, what it leaves behind, and what it says when it cannot run."""

import itertools
import json
import math
import re
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

import credit
import eval as evaluation
import grpo
import metrics
import rollout
import train
from node import check, prepare, settings
from node import run as node_run
from node.replay import Replay
from tasks import countdown
from tests.machine import GAP

SMALL = ["--steps", "3", "--prompts", "6", "--group", "4", "--minibatches", "2", "--eval_problems", "16",
         "--max_tokens", "96"]  # fmt: skip


def run(*argv):
    train.main(*HfArgumentParser(train.Args).parse_args_into_dataclasses([*SMALL, *map(str, argv)]))


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tiny_args(**changes):
    return settings.fill_defaults(train.Args(**changes), train.DEFAULTS, settings.TINY)[0]


@pytest.mark.vllm
def test_a_run_with_vllm(tmp_path, capsys):
    run("--out", tmp_path / "run", "--eval_every", 2)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("held-out success") and "interval" in last and last.endswith(str(tmp_path / "run"))
    log = records(tmp_path / "run")
    assert [r["step"] for r in log if "success" in r] == [0, 2, 3]
    steps = [r for r in log if "reward" in r]
    assert [r["step"] for r in steps] == [1, 2, 3]
    for r in steps:
        assert r["gap_max"] < GAP and r["gap_mean"] <= r["gap_max"]
        assert set(r["seconds"]) == {"generate", "reward", "score", "credit", "update", "reload", "check"}
        assert r["truncated"] < 24 and r["empty"] == 0 and r["within_horizon"] == 0 and 0.05 < r["entropy"] < 0.6
        assert 1 < r["gamma"] < 1.75 and r["equal_groups"] + r["unequal_groups"] == 6
    assert any(r["grad_norm"] > 0 for r in steps)
    assert (tmp_path / "run" / "learning_curve.png").stat().st_size > 5000

    trained = tmp_path / "run" / "checkpoint-3"
    before, after = (AutoModelForCausalLM.from_pretrained(p) for p in ("assets/tiny", trained))
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))
    assert len(AutoTokenizer.from_pretrained(trained)) == len(AutoTokenizer.from_pretrained("assets/tiny"))
    assert settings.is_tiny(str(trained)), "its defaults are still the tiny model's"


@pytest.mark.vllm
def test_a_sampler_that_was_not_reloaded_stops_the_run(tmp_path, monkeypatch):
    """Before training by a trial; without it, at the first step by its weights; and if nobody looked at those, within
    a few by its log-probabilities."""
    monkeypatch.setattr(rollout.VLLMActor, "reload", lambda self, model: None)
    with pytest.raises(
        SystemExit, match=r"error: Qwen3ForCausalLM: vLLM's .* differ .* after a reload of changed"
    ) as e:
        run("--out", tmp_path / "tried", "--eval_problems", 2)
    assert "\n" not in str(e.value) and not (tmp_path / "tried").exists(), "nothing was trained"
    monkeypatch.setattr(train, "try_reload", lambda *args: None)
    with pytest.raises(SystemExit, match=r"step 1: after the reload the sampler does not hold \S+weight"):
        run("--out", tmp_path / "looked", "--eval_problems", 2)
    assert list((tmp_path / "looked").glob("checkpoint-1/config.json")), "nothing is lost"
    monkeypatch.setattr(train, "find_stale_weight", lambda *args: None)
    with pytest.raises(SystemExit, match="weights were not reloaded"):
        run("--out", tmp_path / "run", "--steps", 12, "--eval_problems", 2)
    steps = [r for r in records(tmp_path / "run") if "reward" in r]
    assert len(steps) <= 4, "noticed within a few steps, at the default learning rate"
    assert list((tmp_path / "run").glob("checkpoint-*/config.json")), "nothing is lost"


def test_in_bfloat16_the_first_steps_say_what_gap_is_too_large():
    gaps = [0.01, 0.02, 0.03, 0.04, 0.05, 0.05, 0.05, 0.05]
    records = [{"step": step, "gap_mean": gap} for step, gap in enumerate(gaps, 1)]

    def limit(step, resumed_at=0):
        log = type("Log", (), {"records": records[:step]})
        state = type("Run", (), {"log": log, "args": tiny_args(dtype="bfloat16"), "started_at": resumed_at})
        return pytest.approx(node_run.Run.gap_limit(state))

    assert [limit(1), limit(3), limit(4), limit(8)] == [0.3, 0.3, 0.1, 0.1]
    assert [limit(5, 4), limit(7, 4), limit(8, 4)] == [0.3, 0.3, 0.25], "a resumed run measures anew"
    records = [{"step": step, "gap_mean": 0.0005} for step in range(1, 5)]
    assert limit(4) == node_run.LEAST_LIMIT, "a few sure tokens are no measure"


@pytest.fixture(scope="module")
def sampled():
    """Eight problems and four responses to each; some groups are of equal reward and some are not."""
    torch.manual_seed(0)
    problems = train.tasks.load("countdown-tiny", "train", 8)
    actor = rollout.TorchActor(*settings.load_model("assets/tiny"))
    return problems, dict(zip([p.prompt for p in problems], actor.generate([p.prompt for p in problems], 4, 96)))


def one_step(sampled, own_credit=None, **changes):
    """What a step on these rollouts logs, the heads it used, and the weights after it."""
    problems, groups = sampled
    args = tiny_args(prompts=8, group=4, minibatches=2, max_tokens=96, **changes)
    model, _ = settings.load_model("assets/tiny", "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    record, heads = train.train_step(args, model, optimizer, Replay(groups), problems, None, generator, own_credit)
    return record, heads, torch.cat([p.detach().flatten() for p in model.parameters()])


def given(sampled, monkeypatch, **changes):
    """What a step hands to update after model and optimizer, by the names of update's arguments."""
    seen = {}

    def note(model, optimizer, input_ids, mask, **more):
        seen.update(input_ids=input_ids, mask=mask, **more)
        return {"loss": 0.0, "clip_fraction": 0.0, "kl": 0.0, "grad_norm": 0.0, "skipped": 0}

    with monkeypatch.context() as patch:
        patch.setattr(train, "update", note)
        one_step(sampled, **changes)
    return seen


def test_a_step_hands_update_the_advantages_of_its_own_rows(sampled, monkeypatch):
    seen = given(sampled, monkeypatch, credit="uniform", epsilon=0.1, epsilon_high=0.3)
    ids, mask, shaped, parts = (seen[x] for x in ("input_ids", "mask", "advantages", "minibatches"))
    b = 0
    for problem in sampled[0]:
        group = sampled[1][problem.prompt]
        rewards = [train.tasks.get("countdown-tiny").reward(problem, r.text) for r in group]
        std = statistics.stdev(rewards)
        for r, reward in zip(group, rewards):
            want = (reward - statistics.mean(rewards)) / std if std else 0.0
            assert ids[b][mask[b]].tolist() == r.ids and (shaped[b][mask[b]] - want).abs().max() < 1e-4
            b += 1
    assert (seen["epsilon"], seen["epsilon_high"]) == (0.1, 0.3) and [len(x) for x in parts] == [16, 16]
    assert sorted(torch.cat(parts).tolist()) == list(range(32))


def test_nothing_is_learned_from_truncated_responses_if_they_are_masked(sampled, monkeypatch):
    problems, groups = sampled
    cut = {prompt: [r._replace(truncated=i % 2 == 0) for i, r in enumerate(group)] for prompt, group in groups.items()}
    both = [given((problems, cut), monkeypatch, mask_truncated=on, loss="token") for on in (False, True)]
    plain, masked = (seen["advantages"] * seen["mask"] for seen in both)
    assert (plain[::2] != 0).any() and (masked[::2] == 0).all() and torch.equal(masked[1::2] != 0, plain[1::2] != 0)
    assert both[0]["token_level"] is True


def test_importance_weights_are_trainer_over_sampler_up_to_the_cap(sampled, monkeypatch):
    """A sampler whose log-probs are off by known factors; pi_old is the trainer's all the same."""
    shift = [math.log(x) for x in (0.5, 1.5, 4.0)]
    off = {
        prompt: [r._replace(logprobs=[x - shift[i % 3] for i, x in enumerate(r.logprobs)]) for r in group]
        for prompt, group in sampled[1].items()
    }
    seen = given((sampled[0], off), monkeypatch, credit="uniform")
    ids, mask, old, plain = (seen[x] for x in ("input_ids", "mask", "old_logprobs", "advantages"))
    capped = given((sampled[0], off), monkeypatch, credit="uniform", tis_cap=2.0)["advantages"]
    weight = torch.tensor([0.5, 1.5, 2.0])[(mask.cumsum(1) - 1) % 3]
    torch.testing.assert_close(capped * mask, plain * weight * mask, rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        want = grpo.token_logprobs(settings.load_model("assets/tiny", "cpu")[0], ids, mask)[0]
    taught = mask & (plain != 0)
    torch.testing.assert_close(old[taught], want[taught], rtol=0, atol=1e-4)


def test_scoring_and_learning_are_in_the_same_precision(sampled, monkeypatch):
    seen = {}

    def noted(name, real):
        def call(*args, **more):
            seen[name] = torch.is_autocast_enabled("cpu")
            return real(*args, **more)

        return call

    for name in ("measure_heads", "score", "update"):
        monkeypatch.setattr(train, name, noted(name, getattr(train, name)))
    one_step(sampled, dtype="bfloat16")
    assert seen == dict.fromkeys(("measure_heads", "score", "update"), True)


def test_spans_do_not_depend_on_the_passes(sampled):
    model, _ = settings.load_model("assets/tiny", "cpu")
    ids, mask, _ = rollout.pad_batch([r for group in sampled[1].values() for r in group])
    ids, mask = ids[5:], mask[5:]
    want = metrics.observe(model, ids, mask).heads.spans
    for micro_tokens in (10**6, 300):
        heads = train.split_into_local_and_global(tiny_args(micro_tokens=micro_tokens), model, ids, mask)
        torch.testing.assert_close(heads.spans, want, rtol=1e-4, atol=1e-4)


def test_what_is_learned_from_is_never_evaluated_on(tmp_path, monkeypatch):
    trained, judged, step, evaluate = [], [], train.train_step, train.evaluate
    monkeypatch.setattr(train, "train_step", lambda *args: trained.extend(args[4]) or step(*args))
    monkeypatch.setattr(train, "evaluate", lambda *args, **how: judged.extend(args[2]) or evaluate(*args, **how))
    how = ["--engine", "torch", "--steps", 2, "--max_tokens", 24, "--eval_problems", 4, "--seed", 1]
    run("--out", tmp_path / "run", *how)
    splits = [{countdown.split_of(*p.answer) for p in problems} for problems in (trained, judged)]
    assert splits == [{"train"}, {"test"}] and len(trained) == 12
    assert judged == 2 * train.tasks.load("countdown-tiny", "test", 4), "the same whatever --seed is"


@pytest.fixture(scope="module")
def plain(sampled):
    return one_step(sampled, credit="uniform")


@pytest.mark.parametrize("name", credit.CREDITS)
def test_every_credit_trains_and_differs_from_uniform_as_it_should(name, sampled, plain):
    record, heads, weights = one_step(sampled, credit=name)
    assert record["equal_groups"] > 0 and record["unequal_groups"] > 2 and record["grad_norm"] > 0.01
    assert (heads is None) == (name not in credit.NEED_ATTENTION)
    expected = {"uniform": 1.0, "random": 1.2, "entropy": 1.2, "local": 1.2, "global": 1.2}
    if name == "forking":  # 20 % of the tokens, rounded up, at 1, and the others at 0
        assert record["gamma"] == pytest.approx(0.2, abs=0.02)
    elif name in expected:  # 40 % of the tokens, rounded up, at 1.5
        assert record["gamma"] == pytest.approx(expected[name], abs=0.01)
    else:
        assert 1.0 < record["gamma"] < 1.5 or name not in ("coupled", "scaled")
    same = torch.equal(weights, plain[2])
    assert same == (name == "uniform") and (weights - plain[2]).abs().max() < 5e-4


def test_scaled_has_the_mean_of_coupled_although_some_groups_are_not_scored(sampled):
    scaled, coupled = (one_step(sampled, credit=name)[0] for name in ("scaled", "coupled"))
    assert scaled["equal_groups"] > 0, "rows that are not scored have gamma 1, and must not count"
    assert scaled["gamma"] == pytest.approx(coupled["gamma"], abs=1e-5)


def test_the_split_is_measured_on_the_batch_even_if_all_groups_are_equal(sampled, monkeypatch):
    rows, measure = [], train.measure_heads

    def note(model, input_ids, mask, **how):
        rows.append(len(mask))
        return measure(model, input_ids, mask, **how)

    monkeypatch.setattr(train, "measure_heads", note)
    _, mixed, _ = one_step(sampled, credit="coupled")
    monkeypatch.setattr(countdown.Countdown, "reward", lambda self, problem, text: 0.0)
    record, equal, _ = one_step(sampled, credit="coupled")
    assert rows == [32, 32] and torch.equal(equal.spans, mixed.spans)
    assert record["grad_norm"] == 0 and record["equal_groups"] == 8 and record["gap_max"] < GAP


def test_the_split_is_measured_on_a_few_rows_drawn_from_all(sampled, monkeypatch):
    seen, measure = [], train.measure_heads

    def note(model, input_ids, *more, **how):
        seen.append(input_ids)
        return measure(model, input_ids, *more, **how)

    monkeypatch.setattr(train, "SPAN_ROWS", 5)
    monkeypatch.setattr(train, "measure_heads", note)
    one_step(sampled, credit="coupled")
    ids = rollout.pad_batch([r for problem in sampled[0] for r in sampled[1][problem.prompt]])[0]
    assert torch.equal(seen[0], ids[torch.randperm(32, generator=torch.Generator().manual_seed(0))[:5]])


def test_micro_batches_do_not_matter(tmp_path):
    for name, micro in (("a", 2048), ("c", 300)):
        how = ["--engine", "torch", "--micro_tokens", micro, "--heads_every", 1]
        how += ["--dtype", "float32"]  # in bfloat16 a rounding error can change a response of the second step
        how += ["--steps", 2, "--max_tokens", 40, "--eval_problems", 4]
        run("--out", tmp_path / name, *how)
    dropped = ("seconds", "tokens_per_s", "gap_mean", "gap_max")  # times, and rounding itself
    a, c = (
        [{k: v for k, v in r.items() if v is not None and k not in dropped} for r in records(tmp_path / name)]
        for name in "ac"
    )
    assert len(a) == len(c) == 4
    for x, y in zip(a, c):
        assert x == pytest.approx(y, rel=2e-3, abs=1e-6), "the same but for rounding"


def test_every_flag_reaches_the_credit(sampled, monkeypatch):
    """Each ablation changes the advantages that a step learns from, on the same rollouts."""

    def outcome(**changes):
        seen = given(sampled, monkeypatch, **changes)
        return seen["advantages"][seen["mask"]]

    changes = [
        {}, {"credit": "local"}, {"credit": "global"}, {"credit": "entropy"}, {"credit": "random"},
        {"credit": "uniform"}, {"credit": "scaled"}, {"q": 0.2}, {"gamma_amp": 2.0}, {"alpha": 0.1}, {"k": 1},
        {"window": 3}, {"horizon": [10, 20]}, {"horizon": [10]},
        {"head_quantile": 0.1}, {"layers": "top"}, {"layers": "bottom"}, {"layers": "all"}, {"all_heads": True},
        {"lowest": True}, {"on_produced": True}, {"sign": "positive"}, {"sign": "negative"},
    ]  # fmt: skip
    seen = [outcome(**c) for c in changes]
    same = [(a, b) for i, a in enumerate(changes) for j, b in enumerate(changes) if i < j and seen[i].equal(seen[j])]
    assert not [pair for pair in same if pair != ({}, {"horizon": [10]})], "responses under 100: the horizon never ends"
    assert seen[0].equal(outcome(micro_tokens=300)), "the size of a pass changes nothing"


def test_importance_weights_near_one_change_nothing(sampled, plain):
    a, _, _ = plain
    b, c, d = (one_step(sampled, credit="uniform", tis_cap=cap)[0] for cap in (None, 2.0, 1e-9))
    for other in (b, c):
        assert a["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
        assert a["loss"] == pytest.approx(other["loss"], abs=1e-6)
    assert d["grad_norm"] < 1e-6, "the weights are applied: cut at nothing, nothing is learned"


def test_with_checkpointing_a_layer_runs_again_and_the_gradient_is_the_same():
    """Also after the model has sampled, which takes it out of training mode for a while."""
    found = []
    for again in (False, True):
        args, calls = tiny_args(gradient_checkpointing=again, eval_problems=2), []
        model, tokenizer, *_ = prepare.load(args, "assets/tiny", torch.device("cpu"))
        rollout.TorchActor(model, tokenizer).generate(["1 2 3>10\n<think>"], max_tokens=2)
        model.model.layers[0].input_layernorm.register_forward_pre_hook(lambda *a, calls=calls: calls.append(1))
        ids = torch.arange(3, 13)[None]
        grpo.token_logprobs(model, ids, ids > 5)[0].sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert len(calls) == 1 + again
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_dynamic_sampling_replaces_groups_of_equal_reward(sampled, tmp_path, monkeypatch, capsys):
    actor = rollout.TorchActor(*settings.load_model("assets/tiny"))
    problems = train.tasks.load("countdown-tiny", "train", 24)
    args = tiny_args(prompts=6, group=4, max_tokens=4, dynamic=True)
    plain_groups, plain_rewards, *_ = train.sample_batch(args, actor, problems[:6], node_run.Clock())
    assert len(plain_groups) == 6 and plain_rewards.shape == (6, 4)

    # Four of six groups differ, each in its own way: every group that is kept has its own rewards.
    coin = itertools.cycle([*torch.eye(4).flatten().tolist(), *[0.0] * 8])
    with monkeypatch.context() as patch:
        patch.setattr(countdown.Countdown, "reward", lambda self, problem, text: next(coin))
        (groups, rewards, *_), everything = train.sample_dynamic(args, actor, problems, node_run.Clock())
    assert len(everything) == 12, "whole batches are drawn until there are enough"
    assert torch.equal(rewards, torch.eye(4)[[0, 1, 2, 3, 0, 1]]) and everything.sum() == 8
    prompts = [actor.tokenizer(problems[i].prompt).input_ids for i in (0, 1, 2, 3, 6, 7)]
    assert [group[0].prompt_ids for group in groups] == prompts

    rewards = iter([0.0, 0.0, 0.0, 1.0] * 2 + [0.0] * 999)  # two groups differ, of the six that are wanted
    monkeypatch.setattr(countdown.Countdown, "reward", lambda self, problem, text: next(rewards))
    monkeypatch.setattr(train, "evaluate", lambda *args, **how: ([[]] * 16, torch.zeros(16, 2)))
    run("--engine", "torch", "--out", tmp_path / "run", "--steps", 1, "--dynamic", "--max_tokens", 24)
    assert "step 1: --dynamic found 2 groups of unequal reward among 24, not 6" in capsys.readouterr().out
    (step,) = [r for r in records(tmp_path / "run") if "reward" in r]
    assert step["unequal_groups"] == 2 and step["reward"] == pytest.approx(2 / 96), "of all that was sampled"


def test_dynamic_stops_when_it_has_enough_and_goes_on_behind_what_it_drew(tmp_path, monkeypatch):
    coin = itertools.cycle([0.0, 0.0, 0.0, 1.0] * 4 + [0.0] * 8)  # four of six groups differ
    asked, step = [], train.train_step
    monkeypatch.setattr(countdown.Countdown, "reward", lambda self, problem, text: next(coin))
    monkeypatch.setattr(train, "evaluate", lambda *args, **how: ([[]] * 16, torch.zeros(16, 2)))
    monkeypatch.setattr(train, "train_step", lambda *args: asked.append(args[4]) or step(*args))
    run("--engine", "torch", "--out", tmp_path / "run", "--steps", 2, "--dynamic", "--max_tokens", 24)
    assert [r["problems"] for r in records(tmp_path / "run") if "reward" in r] == [12, 12]
    assert asked[1] == node_run.take_problems(train.tasks.load("countdown-tiny", "train"), 12, 24, 0)


def test_each_epoch_has_every_problem_once_in_an_order_of_its_own():
    got = node_run.take_problems(list("abcde"), 0, 15, seed=1)
    epochs = [got[i : i + 5] for i in (0, 5, 10)]
    assert all(sorted(e) == list("abcde") for e in epochs) and epochs[0] != epochs[1]
    assert (
        node_run.take_problems(list("abcde"), 3, 7, seed=1)
        == got[3:10]
        != node_run.take_problems(list("abcde"), 3, 7, seed=2)
    )


def test_each_seed_step_rank_and_purpose_samples_with_a_seed_of_its_own(monkeypatch):
    seen = set()
    for rank, seed, step, what in itertools.product("01", (0, 1), (0, 1), ("step", "evaluation")):
        monkeypatch.setenv("RANK", rank)
        state = type("Run", (), {"args": tiny_args(seed=seed), "step": step})
        seen.add(node_run.Run._seed(state, what))
    assert len(seen) == 16


def test_minibatches_are_the_same_whatever_the_credit(sampled, monkeypatch):
    seen, update = [], train.update

    def note(*args, **more):
        seen.append(torch.cat(more["minibatches"]).tolist())
        return update(*args, **more)

    monkeypatch.setattr(train, "update", note)
    for name in ("uniform", "random"):
        one_step(sampled, credit=name)
    assert seen[0] == seen[1]
    steps = [torch.randperm(32, generator=node_run.Run.generator(type("Run", (), {"args": a, "step": s})))
             for a, s in ((tiny_args(), 0), (tiny_args(), 1), (tiny_args(seed=1), 0), (tiny_args(), 0))]  # fmt: skip
    assert torch.equal(steps[0], steps[3]) and not any(torch.equal(steps[0], s) for s in steps[1:3])


def test_the_learning_rate_grows_and_the_split_is_measured_in_turn_across_a_resume(tmp_path, monkeypatch):
    rates, measured, step = [], [], train.train_step

    def note(args, model, optimizer, actor, problems, heads, generator, own_credit):
        rates.append(optimizer.param_groups[0]["lr"])
        assert optimizer.param_groups[0]["weight_decay"] == 0
        measured.append(heads is None)
        return step(args, model, optimizer, actor, problems, heads, generator, own_credit)

    monkeypatch.setattr(train, "train_step", note)
    how = ["--engine", "torch", "--eval_problems", 2, "--max_tokens", 24, "--lr", 1, "--heads_every", 3]
    run("--out", tmp_path / "run", *how)
    run_again = ["--resume", str(tmp_path / "run"), "--steps", "7"]
    train.main(*HfArgumentParser(train.Args).parse_args_into_dataclasses(run_again))
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1])
    assert measured == [True, False, False, True, False, False, True], "every third step, whatever was resumed"


@pytest.mark.parametrize("flags, groups", [([], 6), (["--dynamic"], 24)])
def test_groups_of_equal_reward_are_survived(flags, groups, tmp_path, monkeypatch):
    monkeypatch.setattr(countdown.Countdown, "reward", lambda self, problem, text: 0.0)
    how = ["--engine", "torch", "--steps", 2, "--eval_problems", 2, "--max_tokens", 24]
    run("--out", tmp_path / "run", *how, *flags)
    steps = [r for r in records(tmp_path / "run") if "reward" in r]
    assert len(steps) == 2
    for r in steps:
        assert r["equal_groups"] == groups and r["grad_norm"] == 0 and r["gap_max"] < GAP


def test_short_and_truncated_responses_are_survived(tmp_path, monkeypatch):
    coin = iter([0.0, 1.0] * 10_000)
    monkeypatch.setattr(countdown.Countdown, "reward", lambda self, problem, text: next(coin))
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
        (["--max_model_len", "100"], "0 fit --max_model_len 100 with --max_tokens 96; 6 are needed"),
        (["--out", "/proc/nothing/run"], "--out /proc/nothing/run: cannot write there"),
        (["--q", "1.5"], "--q 1.5"),
        (["--horizon", "9", "3"], "--horizon"),
        (["--minibatches", "99"], "--minibatches 99"),
        (["--steps", "0"], "--steps 0"),
        (["--max_model_len", "2000"], "reads 512 tokens at most"),
        (["--prompts", "5000"], "has 4000 training problems"),
        (["--lr", "0"], "--lr 0"),
        (["--lr", "nan"], "--lr nan"),
        (["--seed", "-1"], "--seed -1"),
        (["--kv_cache_gib", "0"], "--kv_cache_gib 0"),
        (["--tis_cap", "-1"], "--tis_cap -1"),
        (["--eval_every", "-1"], "--eval_every -1"),
        (["--eval_problems", "0"], "--eval_problems 0"),
    ],
)
def test_bad_arguments_are_one_line_before_anything_starts(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "start_actor", None)  # reaching the engine would be a TypeError
    with pytest.raises(SystemExit, match=f"(?s)error: .*{message}") as e:
        run("--out", tmp_path / "run", *argv)
    assert "\n" not in str(e.value) and not (tmp_path / "run").exists()


def test_a_dry_run_says_the_plan_and_starts_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "start_actor", None)
    monkeypatch.setattr(prepare, "load_sharded", None)
    run("--dry_run", "--out", tmp_path / "run")
    out = capsys.readouterr().out
    assert "1,443,744 weights" in out and "peak, asleep" in out and "4000 training problems" in out
    assert "defaults for the tiny model: --task countdown-tiny --lr 0.0002" in out
    assert out.strip().endswith("nothing was started") and not (tmp_path / "run").exists()
    with pytest.raises(SystemExit, match="--group 1"):
        run("--dry_run", "--group", 1)


def test_the_dry_run_counts_the_longest_row_which_is_never_split(capsys):
    def memory(*flags):
        run("--dry_run", "--max_model_len", 512, *flags)
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("GiB"))

    assert memory("--micro_tokens", 64) == memory("--micro_tokens", 512) != memory("--micro_tokens", 8192)


def test_a_generation_config_that_transformers_does_not_save_is_kept_as_it_came(tmp_path):
    for file in Path(settings.TINY).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    came = json.loads((tmp_path / "generation_config.json").read_text()) | {"temperature": 0.6}  # without do_sample
    (tmp_path / "generation_config.json").write_text(json.dumps(came))
    run("--model", tmp_path, "--engine", "torch", "--steps", 1, "--eval_problems", 2, "--out", tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "checkpoint-1" / "generation_config.json").read_text())
    assert kept["temperature"] == 0.6 and kept["eos_token_id"] == came["eos_token_id"]


def test_a_real_model_gets_the_papers_defaults_and_the_dry_run_says_so(tmp_path, capsys):
    config = settings.load_config("assets/tiny")
    config.hidden_size, config.max_position_embeddings = 64, 4096  # no longer the tiny model
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained("assets/tiny").save_pretrained(tmp_path)
    flags = ["--model", str(tmp_path), "--task", "countdown-tiny", "--dry_run", "--prompts", "8"]
    train.main(*HfArgumentParser(train.Args).parse_args_into_dataclasses(flags))
    out = capsys.readouterr().out
    expected = "--steps 500 --minibatches 16 --lr 1e-06 --max_tokens 1024 --max_model_len 2048 --kv_cache_gib 8.0"
    assert f"defaults for a real model: {expected}" in out and "--prompts" not in out
    assert "learning rate 1e-06" in out and "up to 1024 tokens" in out


def test_problems_that_are_too_long_are_left_out_and_counted(capsys, monkeypatch):
    tokenizer, load = settings.load_tokenizer("assets/tiny", 512), train.tasks.load

    def with_long_ones(name, split, *args, **more):
        problems = load(name, split, *args, **more)
        longer = [replace(p, prompt="1" * 300 + p.prompt) for p in problems[:3]]
        return longer + problems[3:]

    monkeypatch.setattr(prepare.tasks, "load", with_long_ones)
    train_set, test_set = prepare.load_problems(tiny_args(max_model_len=256, eval_problems=20), tokenizer)
    assert len(train_set) == 3997 and len(test_set) == 17 and all(len(p.prompt) < 100 for p in train_set + test_set)
    out = capsys.readouterr().out
    assert "countdown-tiny: 3 of 4000 training problems are too long, left out" in out
    assert "countdown-tiny: 3 of 20 held-out problems are too long, left out" in out


def test_a_wrong_credit_lists_the_choices(capsys):
    with pytest.raises(SystemExit):
        run("--credit", "anchor")
    assert "'anchor'" in capsys.readouterr().err


def test_the_torch_sampler_is_for_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--engine torch samples with the trainer's own weights"):
        prepare.check_args(tiny_args(engine="torch"))


def test_a_second_run_never_writes_into_the_first(tmp_path, monkeypatch):
    first = node_run.new_folder(str(tmp_path / "run"), "x")
    (first / "metrics.jsonl").write_text("kept")
    with pytest.raises(ValueError, match="already holds a run"):
        node_run.new_folder(str(first), "x")
    monkeypatch.chdir(tmp_path)
    folders = [node_run.new_folder(None, "countdown-tiny-coupled") for _ in range(2)]
    assert [f.name for f in folders] == ["countdown-tiny-coupled-1", "countdown-tiny-coupled-2"]


@pytest.mark.parametrize("arguments", [train.Args, evaluation.Args, check.Args])
def test_help_explains_every_option_in_one_sentence_with_one_default(arguments, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program", "--help"])
    with pytest.raises(SystemExit):
        settings.parse_args(arguments)
    text = " ".join(capsys.readouterr().out.split())
    assert "None" not in text and "[options]" in text
    for name, field in arguments.__dataclass_fields__.items():
        help_text = field.metadata["help"]
        assert help_text.endswith(".") and not re.search(r"[a-z)]\. [A-Z]", help_text), name
        assert f"--{name} " in text and help_text.split(" (default")[0].rstrip(".") in text.replace("- ", "-"), name
        assert text.split(f" --{name} ")[1].split(" --")[0].count("(default") <= 1, name


def test_a_credit_of_ones_own_reaches_the_update(sampled, monkeypatch):
    """A function in place of the name; it sees the tokens."""
    asked = []

    def third_token(signals, mask, input_ids, amp, model, **_):
        asked.append((signals.logprobs.shape, input_ids.shape, type(model).__name__))
        return 1 + (amp - 1) * (mask & (mask.cumsum(1) == 3))

    seen, uniform = given(sampled, monkeypatch, own_credit=third_token), given(sampled, monkeypatch, credit="uniform")
    factor = torch.where(seen["mask"].cumsum(1) == 3, 1.5, 1.0)
    torch.testing.assert_close(seen["advantages"], uniform["advantages"] * torch.where(seen["mask"], factor, 1.0))
    assert asked == [(seen["mask"].shape, seen["mask"].shape, "Qwen3ForCausalLM")]
