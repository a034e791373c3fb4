"""Spans, WAAD and FAI: definitions against loops from Eq. 7-10; without maps against transformers' eager maps."""

import pytest
import torch
from transformers import (
    AttentionInterface,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import attention
import heads
import metrics
from examples.bench import peak_mib
from grpo import token_logprobs

SHAPE = dict(vocab_size=50, hidden_size=48, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=512)  # fmt: skip


def llm(config_class, model_class, **extra):
    torch.manual_seed(0)
    model = model_class(config_class(**SHAPE, **extra)).eval()
    for name, p in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            p.data *= 12  # fresh weights attend almost evenly; this makes maps with peaks
    return model


MODELS = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, dict(head_dim=16)),
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral, sliding window": (MistralConfig, MistralForCausalLM, dict(sliding_window=24)),
    "gemma3, mixed layers": (Gemma3TextConfig, Gemma3ForCausalLM, dict(head_dim=16, sliding_window=24)),
}


def ragged(lengths, n):
    """Token numbers [B,n], right-padded with noise, and the mask; lengths: (prompt, response)."""
    t = torch.arange(n)
    mask = torch.stack([(t >= p) & (t < p + r) for p, r in lengths])
    return torch.randint(0, 50, (len(lengths), n), generator=torch.Generator().manual_seed(1)), mask


def test_a_model_that_recording_changes_or_that_attends_twice_is_refused(monkeypatch):
    model, (ids, mask) = llm(*MODELS["qwen3"][:2], head_dim=16), ragged([(5, 40)], 45)
    with pytest.raises(ValueError, match="attends twice"), torch.no_grad(), attention.recording(model, [2]):
        model(ids)
        model(ids)
    real = attention.fused_attention
    monkeypatch.setattr(attention, "fused_attention", lambda *how: (100 * real(*how)[0], real(*how)[1]))
    with pytest.raises(ValueError, match="does something in its attention"):
        metrics.observe(model, ids, mask)


def test_definitions_equal_the_equations():
    g = torch.Generator().manual_seed(0)
    maps = torch.rand(2, 3, 20, 20, generator=g).tril()
    maps = maps / maps.sum(-1, keepdim=True)
    _, mask = ragged([(4, 13), (2, 3)], 20)
    window, low, high = 5, 3, 7
    rows = [(b, t) for b in range(2) for t in range(20) if mask[b, t]]
    for h in range(3):
        span = sum(maps[b, h, t, s] * (t - s) for b, t in rows for s in range(t + 1)) / len(rows)
        assert heads.head_spans(maps, mask)[h].item() == pytest.approx(span.item(), rel=1e-5)
    got_waad = metrics.waad(maps[:, 0], mask, window)
    for hi in (high, None):
        got_fai = metrics.fai(maps[:, 0], mask, (low, hi))
        for b in range(2):
            for t in range(20):
                waad = sum(maps[b, 0, t, s] * min(t - s, window) for s in range(t + 1)) if mask[b, t] else 0.0
                later = [u for u in range(t + low, min(20, t + (hi or 20) + 1)) if mask[b, u]] if mask[b, t] else []
                fai = sum(maps[b, 0, u, t] for u in later) / len(later) if later else 0.0
                assert got_waad[b, t].item() == pytest.approx(float(waad), abs=1e-5)
                assert got_fai[b, t].item() == pytest.approx(float(fai), abs=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_signals_equal_transformers_eager_maps(name):
    model = llm(*MODELS[name][:2], **MODELS[name][2])
    lengths = [(5, 140), (30, 1), (2, 10), (8, 11), (3, 90)]  # 1, H_lo, H_lo + 1 tokens among them
    ids, mask = ragged(lengths, 150)
    got = metrics.observe(model, ids, mask)

    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(ids, output_attentions=True).attentions
    maps = [maps[layer] for layer in heads.middle_layers(6)]
    spans = torch.stack([heads.head_spans(m, mask) for m in maps])
    is_local, is_global = heads.split_heads(spans)
    torch.testing.assert_close(got.heads.spans, spans, rtol=1e-4, atol=1e-4)
    assert torch.equal(got.heads.is_local, is_local) and torch.equal(got.heads.is_global, is_global)
    local_map = torch.cat([m[:, group] for m, group in zip(maps, is_local)], 1).mean(1)
    global_map = torch.cat([m[:, group] for m, group in zip(maps, is_global)], 1).mean(1)
    assert local_map.std() > 1e-3, "an even map would test nothing"
    torch.testing.assert_close(got.waad, metrics.waad(local_map, mask), rtol=0, atol=1e-5)
    for horizon in ((10, 100), (10, 50), (1, 3), (10, None), (0, None)):
        got = metrics.observe(model_back(model), ids, mask, got.heads, horizon=horizon)
        torch.testing.assert_close(got.fai, metrics.fai(global_map, mask, horizon), rtol=0, atol=1e-5)
    assert (got.waad[~mask] == 0).all() and (got.fai[~mask] == 0).all()


def model_back(model):
    model.set_attn_implementation("sdpa")
    return model


def shifted(x, by):
    """Each row moved to the right by so many places, round the end."""
    return torch.stack([row.roll(places) for row, places in zip(x, by)])


@pytest.mark.parametrize("name", MODELS)
def test_left_padding_gives_the_numbers_of_right_padding_in_the_callers_places(name):
    model = llm(*MODELS[name][:2], **MODELS[name][2])
    lengths = [(5, 100), (30, 1), (2, 10), (8, 70), (3, 0)]
    ids, mask = ragged(lengths, 110)
    want = metrics.observe(model, ids, mask)
    real = torch.arange(110) < torch.tensor([[p + r] for p, r in lengths])
    left = [110 - p - r for p, r in lengths]
    both = [n // 2 for n in left]  # as TRL pads: prompts on the left, responses on the right
    for by in (left, both, [0] * 5):
        padded_ids, padded_mask, attention = (shifted(x, by) for x in (ids, mask, real.long()))
        got = metrics.observe(model, padded_ids, padded_mask, attention_mask=attention)
        torch.testing.assert_close(got.heads.spans, want.heads.spans, rtol=1e-5, atol=1e-5)
        assert torch.equal(got.heads.is_local, want.heads.is_local)
        assert torch.equal(got.heads.is_global, want.heads.is_global)
        for there, here in zip(got[:4], want[:4]):
            torch.testing.assert_close(there, shifted(here, by), rtol=1e-5, atol=1e-5)
    unmasked = metrics.observe(model, shifted(ids, left), shifted(mask, left), want.heads)
    assert (unmasked.waad - shifted(want.waad, left)).abs().max() > 0.01, "padding on the left is not harmless"


def test_an_attention_mask_that_does_not_fit_is_refused():
    model = llm(*MODELS["qwen3"][:2], head_dim=16)
    ids, mask = torch.ones(1, 8, dtype=torch.long), torch.tensor([[0, 0, 0, 1, 1, 1, 0, 0]]).bool()
    for attention_mask, error in (
        ([0, 1, 0, 1, 1, 1, 0, 0], "has a hole"),
        ([1, 0, 0, 1, 1, 1, 0, 1], "has a hole"),
        ([0, 1, 1, 1, 1, 0, 0, 0], "attention_mask is 0"),
        ([0, 0, 0, 1, 1, 1, 0, 0], "marks token 0"),  # the first token of the row, wherever it lies
    ):
        with pytest.raises(ValueError, match=error):
            metrics.observe(model, ids, mask, attention_mask=torch.tensor([attention_mask]))


def test_left_padding_takes_linear_memory():
    model = llm(*MODELS["qwen3"][:2], head_dim=16)
    model.config.max_position_embeddings = n = 4096
    ids, t = torch.randint(0, 50, (2, n), generator=torch.Generator().manual_seed(0)), torch.arange(n)
    attention = t >= torch.tensor([[5], [900]])
    mask, split = attention & (t >= 1000), metrics.observe(model, ids[:, :99], t[:99].expand(2, -1) > 9).heads
    pairs = 2 * n * n * 4 / 2**20  # MiB of a mask for each pair of tokens, as attention adds it
    assert peak_mib(lambda: metrics.observe(model, ids, mask, split, attention_mask=attention)) < 0.6 * pairs


def test_packed_rows_are_refused():
    model = llm(Qwen3Config, Qwen3ForCausalLM, head_dim=16)
    ids, mask = ragged([(4, 30), (3, 20)], 40)
    positions = torch.arange(40).expand(2, -1).clone()
    positions[1, 30:] = 1  # in the padding behind the response, anything may stand
    plain = metrics.observe(model, ids, mask, position_ids=positions)
    torch.testing.assert_close(plain.fai, metrics.observe(model, ids, mask).fai)

    packed = positions.clone()
    packed[0, 20:] -= 20  # a second sample starts at token 20
    with pytest.raises(ValueError, match="position_ids start again"):
        metrics.observe(model, ids, mask, position_ids=packed)

    def score_packed(model, input_ids, mask, entropy):
        start_again = torch.arange(input_ids.shape[1]) % 20
        model(input_ids=input_ids, position_ids=start_again[None])
        return torch.zeros(mask.shape), torch.zeros(mask.shape)

    with pytest.raises(ValueError, match="position_ids start again"):
        metrics.observe(model, ids, mask, plain.heads, score=score_packed)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_a_mask_that_is_not_bool_is_refused(dtype):
    ids, mask = ragged([(4, 30), (3, 20)], 40)
    with pytest.raises(ValueError, match="has to be bool"):
        metrics.observe(llm(LlamaConfig, LlamaForCausalLM), ids, mask.to(dtype))


def test_a_trainers_own_log_probs_may_be_given():
    model = llm(*MODELS["qwen3"][:2], head_dim=16)
    ids, mask = ragged([(5, 40), (9, 30)], 45)

    def halved(*args, entropy):
        return tuple(x / 2 for x in token_logprobs(*args, entropy=entropy))

    ours, theirs = (metrics.observe(model, ids, mask, score=score) for score in (token_logprobs, halved))
    assert torch.equal(theirs.logprobs, ours.logprobs / 2) and torch.equal(theirs.entropy, ours.entropy / 2)
    assert torch.equal(theirs.waad, ours.waad) and torch.equal(theirs.fai, ours.fai)


@pytest.mark.parametrize("seed", range(40))
def test_streams_equal_definitions_on_random_shapes(seed):
    g = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (1,), generator=g))]

    b, h_kv, n, d = pick(1, 3), pick(1, 2), pick(2, 11, 65, 130, 300), pick(8, 16)
    h = h_kv * pick(1, 2, 4)
    q, k = torch.randn(b, h, n, d, generator=g) * 2, torch.randn(b, h_kv, n, d, generator=g)
    see = torch.ones(n, n, dtype=torch.bool).tril()
    window, bias = pick(None, 7, 40), pick(None, None, torch.randn(1, h, n, n, generator=g))
    softcap, sinks = pick(None, None, 2.0), pick(None, torch.randn(h, generator=g))
    attn_mask = None if window is None else see.triu(1 - window).expand(b, 1, n, n)
    if bias is not None:
        attn_mask = bias.masked_fill(~(see if window is None else attn_mask), torch.finfo().min)
    start = torch.randint(1, n, (b, 1), generator=g)
    mask = (torch.arange(n) >= start) & (torch.arange(n) < start + torch.randint(0, n, (b, 1), generator=g))
    mask[0, n - 1] = True
    scores = (q @ k.repeat_interleave(h // h_kv, 1).mT) * 0.3
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    scores = scores + bias if bias is not None else scores
    scores = scores.masked_fill(~(see if window is None else see.triu(1 - window)), -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(b, h, n, 1)], -1)
    maps = scores.softmax(-1)[..., :n]

    layer = attention.Recorded(q, k, 0.3, None, attn_mask, softcap, sinks)
    v = torch.randn(b, h_kv, n, pick(3, d, 20), generator=g)
    out, lse = attention.attend(layer, v)
    torch.testing.assert_close(out, maps @ v.repeat_interleave(h // h_kv, 1), rtol=1e-4, atol=1e-5)
    layer = layer._replace(lse=lse)
    torch.testing.assert_close(attention.attention_maps(layer), maps, rtol=1e-4, atol=1e-5)

    torch.testing.assert_close(metrics.streamed_spans(layer, mask), heads.head_spans(maps, mask), rtol=1e-4, atol=1e-4)
    group = torch.rand(h, generator=g) > 0.4
    group[0] = True
    chosen = [(layer, group), (layer, torch.zeros_like(group)), (layer, ~group)]  # as if of three layers
    every = torch.cat([maps[:, group], maps[:, ~group]], 1).unbind(1)
    w = pick(1, 2, 10, 200)
    want = torch.stack([metrics.waad(one, mask, w) for one in every], 1)
    torch.testing.assert_close(metrics.streamed_waad(chosen, mask, w), want, rtol=0, atol=1e-5 * w)
    for horizon in ((10, 100), (0, 0), (3, None), (0, None), (n + 5, None)):
        want = torch.stack([metrics.fai(one, mask, horizon) for one in every], 1)
        torch.testing.assert_close(metrics.streamed_fai(chosen, mask, horizon), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_spans_keep_four_digits_at_32k_tokens(dtype):
    """A near-looking head far from the start: the span is the small difference of two large sums of positions."""
    n, d = 2**15, 32
    angle = torch.arange(n).double()[:, None] * 1000.0 ** -(torch.arange(d // 2) / (d // 2))
    q = torch.cat([angle.cos(), angle.sin()], -1)[None, None].to(dtype)  # scores depend on t - s, highest at 0
    rows = torch.arange(n - 40, n)
    scores = (q[0, 0, rows].double() @ q[0, 0].double().T).masked_fill(torch.arange(n) > rows[:, None], -torch.inf)
    want = (scores.softmax(-1) * (rows[:, None] - torch.arange(n))).sum(-1).mean()
    mask = (torch.arange(n) >= n - 40)[None]
    got = metrics.streamed_spans(attention.Recorded(q, q, 1.0, None, None), mask)
    assert got.item() == pytest.approx(want.item(), rel=1e-4)


def test_signals_of_a_bf16_model_are_those_of_its_own_queries_and_keys():
    model = llm(*MODELS["qwen3"][:2], head_dim=16).bfloat16()
    ids, mask = ragged([(5, 140), (30, 60)], 150)
    got = metrics.observe(model, ids, mask)
    with torch.no_grad(), attention.recording(model, got.heads.layers) as recorded:
        model(ids)
    maps = {}
    for layer, r in recorded.items():
        scores = (r.query.double() @ r.key.double().repeat_interleave(2, 1).mT) * r.scale
        maps[layer] = scores.masked_fill(torch.ones(150, 150).triu(1).bool(), -torch.inf).softmax(-1)
    spans = torch.stack([heads.head_spans(m, mask) for m in maps.values()])
    torch.testing.assert_close(got.heads.spans, spans, rtol=1e-4, atol=1e-4)
    local = torch.cat([m[:, group] for m, group in zip(maps.values(), got.heads.is_local)], 1).mean(1)
    far = torch.cat([m[:, group] for m, group in zip(maps.values(), got.heads.is_global)], 1).mean(1)
    torch.testing.assert_close(got.waad, metrics.waad(local, mask), rtol=0, atol=1e-3)
    torch.testing.assert_close(got.fai, metrics.fai(far, mask), rtol=0, atol=1e-4)


def test_under_autocast_the_signals_are_near_those_of_float32():
    model = llm(*MODELS["qwen3"][:2], head_dim=16)
    ids, mask = ragged([(5, 140), (30, 60)], 150)
    exact = metrics.observe(model, ids, mask)
    with torch.autocast("cpu", torch.bfloat16):  # rotation returns float32 queries and keys beside bfloat16 values
        got = metrics.observe(model, ids, mask, exact.heads)
    assert exact.waad[mask].std() > 0.3 and exact.fai[mask].std() > 1e-3
    torch.testing.assert_close(got.waad, exact.waad, rtol=0, atol=0.2)
    torch.testing.assert_close(got.fai, exact.fai, rtol=0, atol=3e-3)


def test_a_trainers_autocast_does_not_reach_the_band():
    torch.manual_seed(0)
    q, k = 3 * torch.randn(1, 4, 150, 16), 3 * torch.randn(1, 2, 150, 16)
    layer = attention.Recorded(q, k, 0.25, attention.fused_attention(q, k, k, 0.25)[1], None)
    chosen, mask = [(layer, torch.ones(4, dtype=torch.bool))], (torch.arange(150) >= 20)[None]
    want = metrics.streamed_waad(chosen, mask), metrics.streamed_fai(chosen, mask)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(metrics.streamed_waad(chosen, mask), want[0])
        assert torch.equal(metrics.streamed_fai(chosen, mask), want[1])


def test_recording_changes_nothing_and_leaves_nothing():
    model = llm(*MODELS["qwen3"][:2], head_dim=16)
    ids, _ = ragged([(5, 40), (9, 3)], 50)
    before = model(ids).logits
    with torch.no_grad(), attention.recording(model, [2, 3]) as recorded:
        during = model(ids).logits
    assert (
        recorded.keys() == {2, 3}
        and recorded[2].query.shape == (2, 4, 50, 16)
        and recorded[3].key.shape == (2, 2, 50, 16)
    )
    assert torch.equal(before, during) and torch.equal(before, model(ids).logits)
    assert model.config._attn_implementation == "sdpa"
    assert AttentionInterface()["sdpa"] is sdpa_attention_forward
    with pytest.raises(ValueError, match=r"Qwen3.* no softmax attention in layers \[6\]"), torch.no_grad():
        with attention.recording(model, [6]):
            model(ids)
    assert AttentionInterface()["sdpa"] is sdpa_attention_forward


def test_models_without_plain_softmax_attention_are_refused():
    ids, mask = ragged([(3, 9)], 12)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=6, state_size=4))
    with pytest.raises(ValueError, match=r"Mamba.*no layer with softmax attention.*--credit uniform, entropy"):
        metrics.observe(mamba, ids, mask)


def test_fused_attention_reads_heads_that_do_not_lie_side_by_side_in_memory():
    q, k, v = torch.randn(3, 1, 2, 16, 70, generator=torch.Generator().manual_seed(0)).mT
    want = attention.fused_attention(q.contiguous(), k.contiguous(), v.contiguous(), 0.25)
    for got, expected in zip(attention.fused_attention(q, k, v, 0.25), want):
        assert torch.equal(got, expected)


def test_head_split_is_disjoint_and_ordered():
    spans = torch.randperm(20, generator=torch.Generator().manual_seed(0)).float().view(5, 4)
    for quantile, size in ((0.3, 6), (0.5, 10), (0.01, 1)):
        near, far = heads.split_heads(spans, quantile)
        assert near.sum() == far.sum() == size and not (near & far).any()
        assert spans[near].max() == size - 1 and spans[far].min() == 20 - size
    assert heads.split_heads(torch.ones(1, 10))[0].sum() == 3  # equal spans, and 0.3 * 10 is not 2
    with pytest.raises(ValueError, match="needs two"):
        heads.split_heads(torch.ones(1, 1))
    with pytest.raises(ValueError, match="quantile"):
        heads.split_heads(spans, 0.7)


def test_a_split_that_was_measured_on_nothing_is_not_taken():
    model, (ids, mask) = llm(LlamaConfig, LlamaForCausalLM), ragged([(3, 9)], 12)
    split = metrics.observe(model, ids, torch.zeros_like(mask)).heads
    with pytest.raises(ValueError, match="without response tokens"):
        metrics.observe(model, ids, mask, split)


def test_layers():
    assert heads.middle_layers(36) == [12, 15, 18, 21, 24] and heads.middle_layers(12) == [4, 5, 6, 7, 8]
    for n in range(1, 80):
        for where in ("bottom", "middle", "top", "all"):
            layers = heads.layer_range(n, where)
            assert layers == sorted(set(layers)) and 0 <= layers[0] and layers[-1] < n and len(layers) <= 5
    assert [heads.layer_range(12, where) for where in ("bottom", "middle", "top", "all")] == [
        [0, 1, 2, 3, 4],
        [4, 5, 6, 7, 8],
        [8, 9, 10, 11],
        [0, 3, 6, 8, 11],
    ]
    with pytest.raises(ValueError, match="unknown layer range"):
        heads.layer_range(12, "upper")
