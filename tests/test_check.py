"""Each check of node.check passes here, and fails when what it checks is broken."""

import io
import logging
import math
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import HfArgumentParser

import attention
import grpo
import metrics
import train
from node import check, checkpoint, memory, ranks, stale
from rollout import VLLMActor

ARGS = check.Args()


def fails(what, *args):
    """The message of a check that must not pass."""
    with pytest.raises(check.Failed) as e:
        what(*args)
    return str(e.value)


def test_versions(monkeypatch):
    assert "torch 2." in check.versions(ARGS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "Update the driver" in fails(check.versions, ARGS)


@pytest.mark.parametrize("name", ["streamed_waad", "streamed_fai", "streamed_spans"])
def test_signals(name, monkeypatch):
    real = getattr(metrics, name)
    monkeypatch.setattr(metrics, name, lambda *args: real(*args) * 1.01)
    assert "differs from full maps" in fails(check.signals, ARGS)


def test_signals_with_another_log_sum_exp(monkeypatch):
    assert "largest differences WAAD" in check.signals(ARGS)
    real = attention.fused_attention

    def in_base_two(*args):
        out, lse = real(*args)
        return out, lse / math.log(2)

    monkeypatch.setattr(attention, "fused_attention", in_base_two)
    with pytest.raises(ValueError, match="another log-sum-exp"):
        check.signals(ARGS)


def test_long_spans(monkeypatch):
    assert "exactly" in check.long_spans(ARGS)
    real = attention.fused_attention
    monkeypatch.setattr(attention, "fused_attention", lambda q, k, v, *how: real(q, k, v.bfloat16().float(), *how))
    check.long_spans(ARGS)  # positions go in as numbers below 256, which eight bits hold
    monkeypatch.setattr(attention, "fused_attention", lambda *how: [x.bfloat16().float() for x in real(*how)])
    assert "not exact" in fails(check.long_spans, ARGS)


def test_memory_formula(monkeypatch):
    assert "by the formula" in check.memory_formula(ARGS)
    real = memory.estimate
    monkeypatch.setattr(memory, "estimate", lambda *a, **k: {n: 0.8 * x for n, x in real(*a, **k).items()})
    assert "the formula says" in fails(check.memory_formula, ARGS)


@pytest.fixture(scope="module")
def loop():
    made = check.Loop(ARGS, train)
    yield made
    made.close()


@pytest.mark.vllm
def test_steps_and_the_reload(loop, monkeypatch):
    assert "gap" in check.steps(loop)
    assert loop.actor.llm.llm_engine.vllm_config.use_v2_model_runner is False, "the name that describe_runner reads"
    assert "a skipped reload is noticed" in check.reload(loop)
    assert "% of a step" in check.cost(loop)

    with monkeypatch.context() as broken:
        broken.setattr(VLLMActor, "reload", lambda self, model: None)
        assert "does not hold" in fails(check.steps, loop)
    loop.actor.reload(loop.model)
    with monkeypatch.context() as broken:
        broken.setattr(check, "find_stale_weight", lambda *args: None)
        assert "was not noticed" in fails(check.reload, loop)
    with monkeypatch.context() as broken:  # a reload of the same weights that changes what is sampled
        named, heads = ranks.named_weights, ("embed_tokens.weight", "lm_head.weight")
        broken.setattr(check, "try_reload", lambda *args: None)
        broken.setattr(ranks, "named_weights", lambda m: ((n, -w if n.endswith(heads) else w) for n, w in named(m)))
        assert "greedy responses differ" in fails(check.reload, loop)
    loop.actor.reload(loop.model)
    with monkeypatch.context() as broken:
        real = metrics.streamed_waad
        broken.setattr(metrics, "streamed_waad", lambda *args: (time.sleep(0.5), real(*args))[1])
        assert "% of a step; a few" in fails(check.cost, loop)
    with monkeypatch.context() as broken:
        broken.setattr(grpo, "clipped_loss", lambda *args, **more: args[0].sum() * float("nan"))
        assert "not finite" in fails(check.steps, loop)


@pytest.mark.vllm
def test_one_wrong_tensor_is_named(loop, monkeypatch):
    """Whatever tensor a reload gets wrong: a packed one, a norm, the embedding, the head packed by itself."""
    everything, generator = 10**6, torch.Generator().manual_seed(0)
    loop.actor.reload(loop.model)
    assert stale.find_stale_weight(loop.actor, loop.model, generator, everything) is None
    named = ranks.named_weights
    wrong = {
        "model.layers.5.self_attn.k_proj.weight": "model.layers.5.self_attn.qkv_proj.weight",
        "model.layers.3.mlp.down_proj.weight": "model.layers.3.mlp.down_proj.weight",
        "model.layers.7.self_attn.q_norm.weight": "model.layers.7.self_attn.q_norm.weight",
        "model.embed_tokens.weight": "lm_head.weight",
    }
    for broken, found in wrong.items():
        with monkeypatch.context() as fault:
            fault.setattr(ranks, "named_weights", lambda m, b=broken: ((n, w + 1e-6 * (n == b)) for n, w in named(m)))
            loop.actor.reload(loop.model)
        assert stale.find_stale_weight(loop.actor, loop.model, generator, everything) == found
    with monkeypatch.context() as fault:  # one that is not handed over at all: vLLM's own warning gets through
        fault.setattr(ranks, "named_weights", lambda m: ((n, w) for n, w in named(m) if "layers.2.mlp.down" not in n))
        said = io.StringIO()
        (handler,) = logging.getLogger("vllm.model_executor.model_loader.reload.inplace").handlers
        fault.setattr(handler, "stream", said)
        loop.actor.reload(loop.model)
        assert "weights were not loaded" in said.getvalue()
    loop.actor.reload(loop.model)
    found = [stale.find_stale_weight(loop.actor, loop.model, generator) for _ in range(3)]
    assert found == [None] * 3
    with monkeypatch.context() as other:
        other.setattr(stale, "comparable_weights", lambda *args: ([], 99))
        with pytest.raises(SystemExit, match="names no weight of Qwen3ForCausalLM as the trainer does"):
            stale.find_stale_weight(loop.actor, loop.model, generator)
    assert stale.count_comparable(loop.actor, loop.model) == (2 + 12 * 8 + 1, 2 + 12 * 8 + 1)


def test_a_model_that_is_not_there_stops_the_check_at_once(monkeypatch, capsys):
    monkeypatch.setattr(check, "versions", None)
    with pytest.raises(SystemExit, match=r"^error: cannot load a model from 'no/such/place'") as e:
        check.main(check.Args(model="no/such/place"), train)
    assert "\n" not in str(e.value) and not capsys.readouterr().out


def test_on_a_gpu_vllms_model_runner_is_named(monkeypatch):
    def actor(uses_v2):
        config = SimpleNamespace(use_v2_model_runner=uses_v2)
        return SimpleNamespace(llm=SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=config)))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert check.describe_runner(actor(True)).endswith("V2 (VLLM_USE_V2_MODEL_RUNNER=0 takes V1, should V2 fail)")
    assert check.describe_runner(actor(False)).endswith("runner V1")
    assert check.describe_runner(SimpleNamespace()) == "", "--engine torch"


def test_kill_and_resume(monkeypatch):
    args = check.Args(engine="torch")
    real = check.run_and_kill

    def killed_and_damaged(folder, engine):
        real(folder, engine)
        for path in checkpoint.list_checkpoints(folder):
            (path / "trainer.pt").unlink()

    monkeypatch.setattr(check, "run_and_kill", killed_and_damaged)
    assert "it did not go on" in fails(check.kill_and_resume, args)


def test_two_ranks_are_compared():
    one = [{"loss": 0.1, "grad_norm": 1.0}, {"loss": 0.2, "grad_norm": 2.0}]
    assert check.compare_replays(one, [{"loss": 0.10002, "grad_norm": 1.0}, one[1]]) == pytest.approx(2e-5)
    assert "differ by" in fails(check.compare_replays, one, [{"loss": 0.2, "grad_norm": 1.0}, one[1]])
    assert "gradient norms" in fails(check.compare_replays, one, [one[0], {"loss": 0.2, "grad_norm": 3.0}])


def test_a_failing_check_is_counted_and_the_others_go_on(monkeypatch, capsys):
    for name in ("signals", "long_spans", "memory_formula", "steps", "reload", "cost", "kill_and_resume", "two_ranks"):
        monkeypatch.setattr(check, name, lambda *args: "well")
    monkeypatch.setattr(check, "Loop", lambda args, train: type("Loop", (), {"close": lambda self: None})())

    def broken(args):
        raise RuntimeError("no such thing\nand more")

    monkeypatch.setattr(check.ranks, "stop", lambda: None)  # another test's sampler may still be at work
    monkeypatch.setattr(check, "versions", broken)
    with pytest.raises(SystemExit, match=r"1 of 9 checks failed in .*: versions"):
        check.main(ARGS, train)
    out = capsys.readouterr().out
    assert "FAIL versions" in out and "RuntimeError: no such thing" in out and out.count("ok  ") == 8
    monkeypatch.setattr(check, "versions", lambda args: "well")
    check.main(ARGS, train)
    assert "all 9 checks passed" in capsys.readouterr().out
    begun = []

    def no_engine(args, train):
        begun.append(args)
        raise RuntimeError("no memory")

    monkeypatch.setattr(check, "Loop", no_engine)
    with pytest.raises(SystemExit, match=r"3 of 9 checks failed in .*: two steps, reload, cost of the credit"):
        check.main(ARGS, train)
    out = capsys.readouterr().out
    assert len(begun) == 1 and "RuntimeError: no memory" in out and out.count("could not be started") == 2


def test_the_step_stops_at_once_when_the_reload_is_taken_away(tmp_path, monkeypatch):
    """As train.py has it: at the first step, with the tensor's name, and nothing is lost."""
    monkeypatch.setattr(train, "find_stale_weight", lambda *args: "lm_head.weight")
    flags = ["--engine", "torch", "--steps", "4", "--prompts", "4", "--group", "2", "--minibatches", "2",
             "--eval_problems", "2", "--max_tokens", "24", "--out", str(tmp_path / "run")]  # fmt: skip
    with pytest.raises(SystemExit, match=r"step 1: after the reload the sampler does not hold lm_head\.weight"):
        train.main(*HfArgumentParser(train.Args).parse_args_into_dataclasses(flags))
    assert checkpoint.list_checkpoints(tmp_path / "run")
