"""What moves in a run: nothing against itself, much against another model, and a real run looked at whole."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import train
from heads import middle_layers
from lab import drift, linkage
from node.run import write_args
from tests.test_train import run


def test_drift_is_none_for_the_same_look_and_large_for_another_model():
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=50, hidden_size=48, intermediate_size=64, num_hidden_layers=6,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=16)  # fmt: skip
    model, other = Qwen3ForCausalLM(config).eval(), Qwen3ForCausalLM(config).eval()
    for layer in model.model.layers:
        layer.self_attn.q_norm.weight.data *= 4  # maps with peaks
    ids = torch.randint(0, 50, (3, 70))
    at = torch.arange(70)
    mask = torch.stack([(at >= start) & (at < end) for start, end in ((4, 70), (10, 50), (2, 18))])
    first, second = (linkage.per_head(m, ids, mask, middle_layers(6)) for m in (model, other))
    same = drift.drift(first, first)
    assert all(same[name] == pytest.approx(1) for name in list(same)[:4])
    moved = drift.drift(first, second)
    assert abs(moved["WAAD rank correlation"]) < 0.7 and abs(moved["FAI rank correlation"]) < 0.9
    swapped = drift.drift(first, first._replace(spans=first.spans.flip(0)))
    assert swapped["local heads"] < 1


def test_a_run_is_looked_at_checkpoint_by_checkpoint(tmp_path, capsys):
    out = tmp_path / "run"
    run("--engine", "torch", "--steps", 2, "--save_every", 1, "--lr", 5e-3, "--out", out)
    drift.main(drift.Args(run=str(out), responses=8))
    lines = capsys.readouterr().out.strip().splitlines()
    table = {cells[1].strip(): cells[2:-1] for line in lines if line[0] == "|" and (cells := line.split("|"))}
    assert [head.strip() for head in table[""]] == ["step 0", "step 1", "step 2"]
    for name in ("WAAD rank correlation", "FAI rank correlation"):
        start, one, two = map(float, table[name])
        assert start == 1 and 0.3 < two < 1 and two <= one, "farther at every step, on the same responses"
    assert lines[-1].startswith("2 checkpoints on 8 responses") and lines[-1].endswith(str(out / "drift.png"))
    assert (out / "drift.png").stat().st_size > 5000


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(SystemExit, match=f"error: {tmp_path}: has no args.json that this can read"):
        drift.main(drift.Args(run=str(tmp_path)))
    write_args(train.Args(), tmp_path)
    with pytest.raises(SystemExit, match=r"error: .*has no checkpoint"):
        drift.main(drift.Args(run=str(tmp_path)))
