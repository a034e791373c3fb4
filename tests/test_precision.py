"""--dtype: what auto stands for, passes in bfloat16 that see every step, and a whole run in it."""

import json

import pytest
import torch
from transformers import Qwen3Config

import grpo
import train
from node import precision
from node.settings import load_config, load_model
from tests.test_train import run


def test_auto_is_float32_for_small_models_and_where_bfloat16_is_slow(monkeypatch):
    wide = Qwen3Config(hidden_size=1024)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for able in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: {"avx512_bf16": able})
        assert precision.choose_dtype("auto", wide) == ("bfloat16" if able else "float32")
        assert precision.choose_dtype("auto", load_config("assets/tiny")) == "float32", "the tiny model stays"
        assert (
            precision.choose_dtype("bfloat16", wide) == "bfloat16"
            and precision.choose_dtype("float32", wide) == "float32"
        )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert precision.choose_dtype("auto", load_config("assets/tiny")) == "bfloat16"


def test_each_minibatch_sees_the_weights_that_the_one_before_has_left():
    """Casts of weights that were kept from the first would hide the step."""
    ids = torch.randint(3, 30, (4, 40), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(40) >= 10).expand(4, 40)
    old, advantages = torch.full((4, 40), -3.0), mask * torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None]

    def learn(both: bool) -> torch.Tensor:
        model, _ = load_model("assets/tiny", "cpu")
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        halves = [torch.arange(2), torch.arange(2, 4)]
        for part in [halves] if both else [[h] for h in halves]:
            with precision.autocast("bfloat16", "cpu"):
                grpo.update(model, optimizer, ids, mask, old, advantages, part)
        return model.get_input_embeddings().weight.detach()

    assert torch.equal(learn(True), learn(False))
    assert not torch.equal(learn(True), load_model("assets/tiny", "cpu")[0].get_input_embeddings().weight)


@pytest.mark.vllm
def test_a_run_in_bfloat16_samples_and_trains_in_it(tmp_path):
    run("--out", tmp_path / "run", "--steps", 2, "--eval_problems", 2, "--max_tokens", 40, "--dtype", "bfloat16")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if "reward" in r]
    assert all(1e-5 < r["gap_mean"] < 0.05 and r["stale_weight"] is None for r in steps), "bfloat16, and reloaded"
    assert json.loads((tmp_path / "run" / "args.json").read_text())["dtype"] == "bfloat16"
    weights = load_model(str(tmp_path / "run" / "checkpoint-2"), "cpu")[0].state_dict()
    lost = [w.to(torch.bfloat16).float() for w in weights.values()]
    assert any(not torch.equal(a, b) for a, b in zip(lost, weights.values())), "the trainer's weights are float32"
    with pytest.raises(SystemExit, match="Remove --dtype"):
        train.main(train.Args(resume=str(tmp_path / "run"), dtype="float32"))
