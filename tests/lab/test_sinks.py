"""Attention without its first token against full maps with the column taken out."""

import pytest
import torch
from transformers import Phi3Config, Phi3ForCausalLM

import attention
import heads
import metrics
from lab import linkage, sinks
from node.settings import load_model
from tests.lab.test_alignment import batch


def layer(window=None):
    """A layer of 4 heads (2 key heads), two of which leave nearly all on the first token; and its maps without it."""
    torch.manual_seed(0)
    q, k = 2 * torch.randn(2, 4, 60, 16), 2 * torch.randn(2, 2, 60, 16)
    k[:, 1, :, 0] = 0.0
    q[:, 2:, :, 0], k[:, 1, 0, 0] = 16.0, 4.0
    visible = None
    if window:
        back = torch.arange(60)[:, None] - torch.arange(60)
        visible = ((back >= 0) & (back < window))[None, None]
    found = attention.Recorded(q, k, 0.25, attention.fused_attention(q, k, k, 0.25, visible)[1], visible)
    scores = (q @ k.repeat_interleave(2, 1).mT * 0.25).double()
    seen = torch.ones(60, 60, dtype=torch.bool).tril() if visible is None else visible
    without = scores.masked_fill(~seen, -torch.inf)[:, :, 1:, 1:].softmax(-1).float()
    return found, attention.attention_maps(found), without


@pytest.mark.parametrize("window", [None, 20])
def test_without_the_first_token_rows_are_the_others_renormalised(window):
    found, maps, want = layer(window)
    share = sinks.on_first(found)
    torch.testing.assert_close(share, maps[..., 0], rtol=1e-4, atol=1e-6)
    assert window or share[:, 2:, 1:].mean() > 0.9 > 0.3 > share[:, :2, 1:].mean()
    other = sinks.without_first(found)
    torch.testing.assert_close(attention.attention_maps(other), want, rtol=1e-3, atol=1e-5)
    clear = share[:, :, 1:] < 0.9  # else the difference has no digits left
    torch.testing.assert_close(other.lse[clear], (found.lse + torch.log1p(-share))[:, :, 1:][clear], rtol=0, atol=1e-4)


def test_signals_without_it_are_those_of_such_maps():
    model, _ = load_model("assets/tiny")
    input_ids, mask, _ = batch(rows=4, n=60)
    layers = [4, 6]
    looks = linkage.per_head(model, input_ids, mask, layers, horizon=(5, 20), drop_first=True)
    with torch.no_grad(), attention.recording(model, layers) as recorded:
        model(input_ids)
    maps = torch.cat([attention.attention_maps(recorded[i]) for i in layers], 1)  # [B,8,N,N]
    without = torch.zeros_like(maps)
    without[:, :, 1:, 1:] = maps[:, :, 1:, 1:] / (1 - maps[:, :, 1:, :1])
    waad, fai = (
        torch.stack([f(without[:, h], mask, *how) for h in range(8)])
        for f, how in ((metrics.waad, ()), (metrics.fai, ((5, 20),)))
    )
    torch.testing.assert_close(looks.waad, waad, rtol=0, atol=1e-3)
    torch.testing.assert_close(looks.fai, fai, rtol=0, atol=1e-4)
    torch.testing.assert_close(looks.spans, heads.head_spans(without, mask), rtol=1e-3, atol=1e-3)
    first = (maps[..., 0] * mask[:, None]).sum((0, 2)) / mask.sum()
    torch.testing.assert_close(looks.first, first, rtol=1e-3, atol=1e-5)
    found = sinks.table(linkage.per_head(model, input_ids, mask, layers).spans, looks.spans, looks.first, looks.first)
    assert found["all heads"][2] == pytest.approx(first.mean().item(), rel=1e-3)
    assert 0 <= found["local heads, overlap"] <= 1 and -1 <= found["correlation"] <= 1


def test_only_models_with_values_of_their_own_are_weighed():
    shape = dict(vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    phi = Phi3ForCausalLM(Phi3Config(**shape, intermediate_size=48, pad_token_id=0))
    assert sinks.can_weigh(load_model("assets/tiny")[0], [4, 6]) and not sinks.can_weigh(phi, [0, 1])


@pytest.mark.parametrize("drop_first", [False, True])
def test_by_norm_each_column_is_weighted_by_what_it_gives(drop_first):
    model, _ = load_model("assets/tiny")
    input_ids, mask, _ = batch(rows=4, n=60)
    layers, values = [4, 6], {}
    how = {"horizon": (5, 20), "drop_first": drop_first}
    plain = linkage.per_head(model, input_ids, mask, layers, **how)
    found = linkage.per_head(model, input_ids, mask, layers, by_norm=True, **how)
    attentions = {i: model.get_decoder().layers[i].self_attn for i in layers}
    for i, module in attentions.items():
        module.v_proj.register_forward_hook(lambda _, __, out, i=i: values.setdefault(i, out))
    with torch.no_grad(), attention.recording(model, layers) as recorded:
        model(input_ids)
        maps = torch.cat([attention.attention_maps(recorded[i]) for i in layers], 1)  # [B,8,N,N]
        norms = []
        for i, module in attentions.items():
            per_head = values[i].unflatten(-1, (-1, module.head_dim)).repeat_interleave(module.num_key_value_groups, 2)
            for h in range(per_head.shape[2]):  # the layer's output, if only head h gives something
                alone = torch.zeros_like(per_head)
                alone[:, :, h] = per_head[:, :, h]
                norms.append(module.o_proj(alone.flatten(2)).norm(dim=-1))
    norms = torch.stack(norms)  # [8,B,N]
    torch.testing.assert_close(found.fai, plain.fai * norms, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.waad, plain.waad)
    taken = maps.transpose(0, 1) * norms[:, :, None]  # [8,B,N,N]: what column s gives to row t
    share = ((taken[..., 0] / taken.sum(-1)) * mask).sum((1, 2)) / mask.sum()
    torch.testing.assert_close(found.first, share, rtol=1e-3, atol=1e-5)
    assert (found.first - plain.first).abs().max() > 1e-3
