"""Several ranks: the same curve as one, the whole loop with real vLLM in each, and no hang when one fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, Glm4MoeConfig, Qwen3Config

from node import checkpoint, ranks, replay
from tests.machine import GAP, GPUS, HIDDEN

ROOT = Path(ranks.__file__).parents[1]


def torchrun(ranks, *argv, timeout=900):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone",
               *map(str, argv)]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | HIDDEN
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, env=environment)


def test_one_and_two_ranks_train_alike_on_the_same_rollouts(tmp_path):
    replay.record_rollouts(tmp_path / "rollouts")
    for count in (1, 2):
        done = torchrun(count, "-m", "node.replay", tmp_path / "rollouts", tmp_path / str(count))
        assert done.returncode == 0, done.stderr[-20000:]
    one, two = (json.loads((tmp_path / name).read_text()) for name in "12")
    assert sum(r["grad_norm"] > 0 for r in one) == 3, "all three steps learned something"
    for a, b in zip(one, two):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        for name in ("reward", "entropy", "gamma", "length", "equal_groups", "truncated"):
            assert a[name] == pytest.approx(b[name], abs=1e-4)
        assert a["kl"] > 0 and a["kl"] == pytest.approx(b["kl"], rel=0.05)
        assert a["clip_fraction"] == pytest.approx(b["clip_fraction"], abs=0.01)
    weights = [torch.load(tmp_path / f"{name}.pt") for name in "12"]
    start = dict(AutoModelForCausalLM.from_pretrained("assets/tiny", dtype=torch.float32).named_parameters())
    moved = max((weights[0][name] - w).abs().max().item() for name, w in start.items())
    apart = max((weights[0][name] - w).abs().max().item() for name, w in weights[1].items())
    assert apart < 0.05 * moved, (apart, moved)


SHAPE = dict(vocab_size=1000, num_attention_heads=8, num_key_value_heads=8, head_dim=128)
LARGE = {
    "dense": Qwen3Config(
        **SHAPE, hidden_size=1024, intermediate_size=3072, num_hidden_layers=8, tie_word_embeddings=True
    ),
    # The files have a matrix for each expert, the model has one for all. The routers have persistent buffers.
    "experts": Glm4MoeConfig(
        **SHAPE, hidden_size=512, intermediate_size=1024, moe_intermediate_size=512, num_hidden_layers=6,
        n_routed_experts=16, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", LARGE)
def test_no_rank_holds_more_than_its_share_of_a_large_model(kind, tmp_path):
    """About 100 million weights, loaded and saved by two ranks: 1.3 times a rank's share and the largest layer.

    Of a mixture of experts, a joined weight and the parts that it is made from are in memory together.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LARGE[kind], dtype=torch.float32)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_()
    model.save_pretrained(tmp_path / "model")
    weights, layer = (sum(p.nbytes for p in part.parameters()) for part in (model, model.model.layers[-1]))
    layer *= 2 if kind == "experts" else 1
    (tmp_path / "run").mkdir()
    done = torchrun(2, "tests/host_memory.py", tmp_path / "model", tmp_path / "run")
    assert done.returncode == 0, done.stderr[-20000:]
    found = json.loads((tmp_path / "run" / "memory.json").read_text())
    assert len(found) == 2
    for loading, saving in found:
        assert 0.9 * weights / 2 < loading < 1.3 * weights / 2 + layer
        assert 0.9 * 3 * weights / 2 < saving < 1.3 * 3 * weights / 2 + layer
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-1", dtype=torch.float32)
    own, read = model.state_dict(), again.state_dict()
    assert own.keys() == read.keys() and all(torch.equal(own[name], read[name]) for name in own)
    assert stored_names(tmp_path / "run" / "checkpoint-1") == stored_names(tmp_path / "model")


def stored_names(folder):
    """The names of the tensors in a checkpoint's files."""
    names = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    return names


@pytest.mark.vllm
@pytest.mark.skipif(GPUS == 1, reason="two ranks with vLLM built for CUDA need two GPUs")
def test_two_ranks_with_vllm_train_save_and_resume(tmp_path):
    # Groups of two, mostly of equal reward: steps without a gradient happen, and are saved like others.
    small = ["--prompts", 5, "--group", 2, "--minibatches", 2, "--eval_problems", 5, "--max_tokens", 64,
             "--gradient_checkpointing", "--save_every", 2]  # fmt: skip
    done = torchrun(2, "train.py", *small, "--out", tmp_path / "run", "--steps", 2)
    assert done.returncode == 0, done.stderr[-20000:]
    assert done.stdout.count("held-out success before") == 1, "only rank 0 talks"
    done = torchrun(2, "train.py", "--resume", tmp_path / "run", "--steps", 3)
    assert done.returncode == 0, done.stderr[-20000:]
    assert done.stdout.strip().splitlines()[-1].endswith(f"{tmp_path}/run")
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in log if "reward" in r] == [1, 2, 3]
    assert [r["step"] for r in log if "success" in r] == [0, 2, 3]
    assert all(r["gap_max"] < GAP for r in log if "reward" in r), "both engines were reloaded from the shards"
    path, _ = checkpoint.find_latest(tmp_path / "run")  # one process reads what two have written, both halves
    before, after = (AutoModelForCausalLM.from_pretrained(p) for p in ("assets/tiny", path))
    assert [p.shape for p in before.parameters()] == [p.shape for p in after.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))
    optimizer = torch.optim.AdamW(after.parameters(), 1e-4, weight_decay=0.0, fused=True)
    checkpoint.restore(path, after, optimizer)
    moments = [optimizer.state[p]["exp_avg_sq"] for p in after.parameters()]
    assert all(m.shape == p.shape for m, p in zip(moments, after.parameters()))
    assert sum((m != 0).double().mean() for m in moments) > 0.9 * len(moments)


def test_a_rank_that_fails_ends_the_run_with_its_message(tmp_path):
    (tmp_path / "one.py").write_text(
        "import torch\n"
        "from node import ranks\n"
        "ranks.start()\n"
        "ranks.any_rank(False)\n"
        "if ranks.rank() == 1:\n"
        "    ranks.exit_with_error('rank one has had enough')\n"
        "ranks.all_reduce_sum(torch.zeros(1))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", tmp_path / "one.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode != 0 and "error: rank one has had enough" in done.stderr


def test_bad_arguments_under_torchrun_are_said_once(tmp_path):
    done = torchrun(2, "train.py", "--group", 1, "--out", tmp_path / "run")
    assert done.returncode != 0 and done.stderr.count("error: --group 1") == 1
