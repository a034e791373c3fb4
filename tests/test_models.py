"""Observe on some kinds of models that stand for all causes; and whether the comparison finds errors."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import metrics
from node import prepare
from tests.families import models
from tests.families.kinds import kinds

# kind: "exact", or a word of the sentence with which observe refuses it
EXPECTED = {
    # plain attention, norms of queries and keys, windows, chunks, position biases
    "llama": "exact",
    "llama, one layer, two heads of width 2": "exact",
    "qwen3": "exact",
    "mistral": "exact",
    "gemma3_text": "exact",
    "llama4_text": "exact",
    "inkling_text": "exact",
    # logits that are scaled or transformed
    "granite, scaled": "exact",
    "cohere": "exact",
    "falcon_h1, scaled": "exact",
    "bert": "exact",
    # soft-caps, sinks, latent attention, sparse attention
    "gemma2": "exact",  # in sdpa, transformers leaves the soft-cap out
    "gemma2, eager": "exact",
    "gpt_oss": "exact",
    "granite_swa": "exact",
    "deepseek_v3": "exact",
    "deepseek_v32, equal widths": "exact",
    "glm_moe_dsa": "exact",
    "doge": "exact",
    # hybrids
    "qwen3_next": "exact",
    "qwen3_next, attention at the ends": "exact",
    "qwen3_5_text": "exact",
    "lfm2": "exact",
    "nemotron_h": "exact",
    "granitemoehybrid": "exact",
    # refused
    "gemma3_text, bidirectional": "causal",
    "bert, not a decoder": "causal",
    "mamba": "softmax attention",
    "rwkv": "softmax attention",
    "qwen3_next, no attention": "softmax attention",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_observe_is_exact_or_refuses(name):
    verdict = models.try_kind(name, kinds()[name])
    if EXPECTED[name] == "exact":
        assert verdict.word == "exact", verdict
        assert "almost even" not in verdict.note, verdict
    else:
        assert verdict.word == "refused" and EXPECTED[name] in verdict.note, verdict


def test_each_causal_language_model_of_transformers_is_a_kind():
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) <= set(kinds())


@pytest.mark.parametrize("quantity", ["logprobs", "entropy", "waad", "fai"])
def test_a_wrong_signal_is_found(monkeypatch, quantity):
    observe = metrics.observe

    def observe_wrongly(model, ids, mask, heads=None, horizon=(10, 100)):
        signals = observe(model, ids, mask, heads, horizon=horizon)
        return signals._replace(**{quantity: getattr(signals, quantity) + 1e-3 * mask})

    monkeypatch.setattr(metrics, "observe", observe_wrongly)
    verdict = models.try_kind("llama", kinds()["llama"])
    assert verdict.word == "WRONG" and f"{models.QUANTITIES[quantity]} off by 0.001" in verdict.note, verdict


def test_a_wrong_span_is_found(monkeypatch):
    streamed_spans = metrics.streamed_spans
    monkeypatch.setattr(metrics, "streamed_spans", lambda *args: streamed_spans(*args) * 1.001)
    verdict = models.try_kind("llama", kinds()["llama"])
    assert verdict.word == "WRONG" and "span off by 0.001" in verdict.note, verdict


@pytest.mark.parametrize("error", [ValueError("shapes differ"), KeyError("layer")])
def test_an_error_that_is_not_a_refusal_is_a_crash(monkeypatch, error):
    def observe(*args, **kwargs):
        raise error  # here, not in the files of the algorithm

    monkeypatch.setattr(metrics, "observe", observe)
    verdict = models.try_kind("llama", kinds()["llama"])
    assert verdict.word == "crash" and verdict.note.startswith(type(error).__name__), verdict


def test_what_takes_too_long_is_stopped():
    def build_for_ever():
        while True:
            pass

    verdict = models.try_kind("slow", build_for_ever, seconds=1)
    assert verdict.word == "crash" and "more than 1 s" in verdict.note


def test_what_cannot_be_built_is_said():
    verdict = models.try_kind("none", lambda: kinds()["no such kind"]())
    assert verdict.word == "not built" and verdict.note.startswith("KeyError")


@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_the_map_of_an_sdpa_call_makes_its_output(mask):
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 5)
    visible = torch.ones(9, 9, dtype=torch.bool).tril().triu(-3)
    attn_mask = {None: None, "bool": visible, "float": torch.randn(4, 9, 9).masked_fill(~visible, -torch.inf)}[mask]
    weights = models.softmax_map(query, key, attn_mask, is_causal=mask is None, scale=0.7)
    output = scaled_dot_product_attention(
        query, key, value, attn_mask=attn_mask, is_causal=mask is None, scale=0.7, enable_gqa=True
    )
    torch.testing.assert_close(weights @ value.repeat_interleave(2, 1), output)


def test_eager_maps_are_those_that_make_the_output():
    """Granite with sinks returns maps whose rows sum to 1, but multiplies the output by what the sink leaves."""
    model = kinds()["granite_swa"]()
    batch = models.make_batch(80)
    maps = models.run_rows(model, batch).maps[0]
    assert maps.returned[0][0].sum(-1).min() > 0.999
    assert maps.eager[0][0].sum(-1).min() < 0.9


def test_the_report_counts_verdicts_and_causes():
    refusal = "has no layer with softmax attention"
    verdicts = [
        models.Verdict("llama", "LlamaForCausalLM", "exact", "layers 2: sdpa"),
        models.Verdict("mamba", "MambaForCausalLM", "refused", f"MambaForCausalLM {refusal}"),
        models.Verdict("rwkv", "RwkvForCausalLM", "refused", f"RwkvForCausalLM {refusal}"),
    ]
    text = models.report(verdicts, "python -m tests.families.models", 61)
    assert "| exact | 1 |" in text and "| refused | 2 |" in text and "| WRONG | 0 |" in text
    assert f"| 2 | the model {refusal} |" in text
    assert "| llama | LlamaForCausalLM | exact | layers 2: sdpa |" in text


def test_what_is_special_about_a_model_is_said():
    said = {name: prepare.describe_attention(kinds()[name](), layers) for name, layers in
            (("llama", [2, 3]), ("gpt_oss", [2, 3]), ("gemma2, eager", [2, 3]), ("qwen3_next", [3, 7]))}  # fmt: skip
    assert said["llama"] == "WAAD and FAI from layers 2, 3, chosen among 8 with softmax attention, 4 heads each"
    assert "attention sinks; a window of 24 tokens in layers [2]" in said["gpt_oss"]
    assert "scores capped at 50" in said["gemma2, eager"] and "among 2 with softmax attention" in said["qwen3_next"]
    assert "8 layers (6 linear_attention, 2 full_attention)." in prepare.describe_layers(kinds()["qwen3_next"]().config)
