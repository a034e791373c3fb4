"""Families whose weights need more than a copy to get into vLLM, or into a checkpoint: what went wrong before, tiny."""

import pytest
import torch
from safetensors.torch import load_file

from node import ranks
from node.weights import find_sources, from_stored, stored_groups, stored_tensors
from tests.families import reload

RENAMED = ["qwen3_moe", "glm4_moe", "mixtral", "granitemoehybrid", "gpt_neox"]


@pytest.mark.parametrize("family", RENAMED)
def test_stored_tensors_are_those_that_transformers_saves_and_reads(family, tmp_path):
    model = reload.random_model(family, tied=False)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    ours = dict(ranks.named_weights(model))
    assert ours.keys() == saved.keys() and all(torch.equal(ours[name], saved[name]) for name in ours)
    assert any(group.stored_name not in group.names for group in stored_groups(model)), "something is changed"

    own = stored_tensors(model)
    renamed, sources = find_sources(model, saved)
    read = {name: saved[stored_name] for stored_name, name in renamed.items()}
    for source in sources:
        read |= from_stored(model, source, saved.get)
    assert read.keys() == own.keys() and all(torch.equal(read[name], own[name]) for name in own)


def is_right(row):
    at_start, not_reloaded, after, compared, verdict = row
    assert verdict == "right" and float(at_start) < 1e-5 and float(after) < 1e-5 and float(not_reloaded) > 0.05
    return compared


@pytest.mark.vllm
@pytest.mark.parametrize(
    "family, tied, compared",
    [
        ("glm4_moe", False, "33 of 39"),  # packed experts, joined names, a router without embedding_dim, buffers
        ("gemma2", True, "34 of 34"),  # no lm_head
        ("gpt2", True, "53 of 53"),  # matrices stored transposed
    ],
)
def test_changed_weights_get_into_vllm(family, tied, compared):
    assert is_right(reload.try_family(family, tied)) == compared


@pytest.mark.vllm
def test_a_family_that_vllm_runs_by_transformers_class():
    """In a process of its own: vLLM changes the class for good."""
    assert is_right(reload.run_alone("olmo2", "untied"))


def test_a_table_that_was_begun_is_gone_on_with(tmp_path, monkeypatch, capsys):
    tried = []

    def try_nothing(family, tied):
        tried.append((family, tied))
        return ["1e-06", "0.50", "1e-06", "3 of 3", "right"]

    monkeypatch.setattr(reload, "run_alone", try_nothing)
    monkeypatch.setattr(reload, "FAMILIES", {"llama": {}, "qwen2": {}})
    out = str(tmp_path / "table.md")
    reload.main(reload.Args(only=["qwen2"], out=out))
    reload.main(reload.Args(out=out))
    assert tried == [(family, tied) for family in ("qwen2", "llama") for tied in ("tied", "untied")]
    reload.main(reload.Args(only=["llama"], out=out))  # named: tried again
    assert tried[4:] == [("llama", "tied"), ("llama", "untied")]
    lines = capsys.readouterr().out.strip().splitlines()[-5:]
    assert [line.split("|")[1].strip() for line in lines] == ["---", "llama", "llama", "qwen2", "qwen2"]
