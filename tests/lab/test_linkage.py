"""Peaks and links: what was planted is found, chance is what a shuffle gives, and independent maps show nothing."""

import random

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import metrics
from attention import attention_maps, recording
from heads import head_spans, middle_layers, split_heads
from lab import linkage


def rows(weights):
    """A causal map [T,T] whose rows sum to 1."""
    weights = torch.as_tensor(weights).float().tril()
    return weights / weights.sum(-1, keepdim=True)


def series(local, far, receiver, entropy, other=None):
    """A response's series from its maps, by the definitions."""
    mask = torch.ones(1, len(entropy), dtype=torch.bool)
    out = {"WAAD": metrics.waad(local[None], mask)[0].double().numpy(), "entropy": np.asarray(entropy, dtype=float)}
    names = {"FAI": far, "receiver FAI": receiver, "other receiver FAI": receiver if other is None else other}
    for name, grid in names.items():
        out[name] = metrics.fai(grid[None], mask, (linkage.H_LO, None))[0].double().numpy()
        out[name][-linkage.H_LO :] = np.nan
    return out


def planted(n=96, chunk=8):
    """Chunks of 8 tokens. The first of a chunk looks far back and is uncertain; it, or in every second chunk the next
    token, is what later ones look at. Receivers look at every second anchor, and at as many tokens that are none."""
    starts = np.arange(chunk, n - 2, chunk)
    local = torch.eye(n)
    local[starts] = 0.0
    local[starts, 0] = 1.0
    anchors = starts + np.arange(len(starts)) % 2
    seen = [a for a in anchors if a < n - linkage.H_LO - 1]  # the last place that has FAI is an end
    decoys = [a + 3 for a in seen[1::2] if a + 3 < n - linkage.H_LO - 1]

    def looked_at(tokens):
        far = torch.full((n, n), 1e-3)
        far[:, tokens] = 1.0
        return rows(far)

    entropy = np.full(n, 0.25)
    entropy[starts] = 1.0
    entropy[starts + 1] = 0.5
    receiver = looked_at(seen[::2] + decoys)
    return series(local, looked_at(seen), receiver, entropy), starts, seen, decoys


def test_the_tables_find_exactly_what_was_planted():
    response, starts, seen, decoys = planted()
    top = {name: np.flatnonzero(linkage.peaks(x) == 1).tolist() for name, x in response.items()}
    assert top["WAAD"] == starts.tolist() and top["FAI"] == seen
    assert top["receiver FAI"] == sorted(seen[::2] + decoys)

    found = linkage.table([response, response], draws=200)
    at, after, receivers, _, follow = (found[name] for name in linkage.LINKS)
    assert at["observed"][0] == pytest.approx(1.0) and after["observed"][0] == pytest.approx(0.5)
    assert follow["observed"][0] == 1.0 and follow["peaks"] == 2 * len(seen) and follow["p"] < 0.01
    assert receivers["observed"][0] == pytest.approx(len(seen[::2]) / (len(seen[::2]) + len(decoys)))
    # chance: each of a response's eligible places is as likely
    n = len(response["entropy"])
    assert at["random"][0] == pytest.approx(response["entropy"][1 : n - 1].mean())
    eligible = np.arange(1, n - linkage.H_LO - 1)
    hit = np.isin(eligible, starts) | np.isin(eligible - 1, starts)
    assert follow["random"][0] == pytest.approx(hit.mean())
    assert follow["lift"][0] == pytest.approx(1 / hit.mean() - 1)


def noise(n, g):
    """A map of independent random rows."""
    return rows(-torch.rand(n, n, generator=g).log())


def test_independent_random_rows_show_no_link():
    inside, low_p = [], 0
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        responses = [
            series(noise(n, g), noise(n, g), noise(n, g), torch.rand(n, generator=g), noise(n, g))
            for n in torch.randint(40, 90, (25,), generator=g).tolist()
        ]
        for link in linkage.table(responses, draws=300).values():
            value, low, high = link["lift"]
            assert abs(value) < 0.4
            inside.append(low <= 0 <= high)
            low_p += (link["p"] < 0.01) + (link["p shifted"] < 0.01)
    assert np.mean(inside) > 0.87, "95 % intervals of a lift that is zero"
    assert low_p <= 8, "p below 0.01 about once in a hundred"


def test_chance_equals_a_brute_force_shuffle():
    rng = random.Random(0)
    asked = []
    for n in (12, 30, 47):
        value = np.array([rng.random() for _ in range(n)])
        peak = np.array([float(rng.random() < 0.3) for _ in range(n)])
        value[-2:], peak[0] = np.nan, np.nan
        asked.append((value, peak))
    sums = []
    for _ in range(20_000):
        total = 0.0
        for value, peak in asked:
            places = [t for t in range(len(value)) if not np.isnan(value[t]) and not np.isnan(peak[t])]
            total += sum(value[t] for t in rng.sample(places, int(sum(peak[t] for t in places))))
        sums.append(total)
    hits, expected, count = linkage.totals(asked)
    assert np.mean(sums) == pytest.approx(expected.sum(), abs=4 * np.std(sums) / 20_000**0.5)
    mine = linkage.throws(asked, 20_000, np.random.default_rng(0))
    assert mine.mean() == pytest.approx(np.mean(sums), rel=0.005) and mine.std() == pytest.approx(
        np.std(sums), rel=0.05
    )
    assert linkage.link(asked)["p"] == pytest.approx(np.mean([s >= hits.sum() for s in sums]), abs=0.04)
    assert linkage.link(asked)["peaks"] == count.sum()


def test_two_smooth_curves_are_a_link_to_random_throws_but_not_to_shifts():
    """Peaks and values that come in runs of their own, independent of each other: only shifts keep the runs."""
    g, low = np.random.default_rng(0), {"p": 0, "p shifted": 0}
    for _ in range(100):
        series = [((np.arange(72) + g.integers(24)) // 12 % 2).astype(float) for _ in range(4)]
        link = linkage.link([tuple(series[:2]), tuple(series[2:])], draws=200)
        low = {name: n + (link[name] < 0.05) for name, n in low.items()}
    assert low["p"] > 30 and low["p shifted"] <= 12, low


def test_short_and_flat_responses_have_no_peaks_and_do_not_crash():
    for x in (np.array([]), np.array([1.0, np.nan]), np.full(9, np.nan)):
        assert np.isnan(linkage.peaks(x)).all()
    assert np.nansum(linkage.peaks(np.ones(9))) == 0
    flat = {name: np.ones(30) for name in ("receiver FAI", "other receiver FAI", "FAI", "WAAD", "entropy")}
    for link in linkage.table([flat, flat]).values():
        assert link["peaks"] == 0 and link["lift"] == [0, 0, 0]


@pytest.fixture(scope="module")
def looked():
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(vocab_size=50, hidden_size=48, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
                    num_key_value_heads=2, head_dim=16)
    ).eval()  # fmt: skip
    for layer in model.model.layers:
        layer.self_attn.q_norm.weight.data *= 4  # maps with peaks
    ids = torch.randint(0, 50, (3, 70))
    mask = torch.zeros(3, 70, dtype=torch.bool)
    for b, (start, end) in enumerate(((4, 70), (10, 50), (2, 18))):
        mask[b, start:end] = True
    return model, ids, mask


def test_maps_equal_transformers_and_per_head_signals_equal_the_definitions(looked):
    model, ids, mask = looked
    layers = middle_layers(6)
    with torch.no_grad(), recording(model, layers) as recorded:
        model(ids)
    maps = torch.cat([attention_maps(recorded[layer]) for layer in layers], 1)  # [B,heads,N,N]
    model.set_attn_implementation("eager")
    eager = model(ids, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(maps, torch.cat([eager[layer] for layer in layers], 1), atol=1e-5, rtol=0)

    looks = linkage.per_head(model, ids, mask, layers, tokens=90)
    torch.testing.assert_close(looks.spans, head_spans(maps, mask), atol=1e-3, rtol=1e-4)
    for h in range(maps.shape[1]):
        torch.testing.assert_close(looks.waad[h], metrics.waad(maps[:, h], mask), atol=1e-4, rtol=0)
        torch.testing.assert_close(looks.fai[h], metrics.fai(maps[:, h], mask, (10, None)), atol=1e-5, rtol=0)

    responses, overlap = linkage.responses_of(looks)
    local, far = split_heads(looks.spans)
    mean = metrics.waad(maps[:, local].mean(1), mask)
    np.testing.assert_allclose(responses[1]["WAAD"], mean[1, mask[1]].numpy(), atol=1e-4)
    mean = metrics.fai(maps[:, far].mean(1), mask, (10, None))
    np.testing.assert_allclose(responses[1]["FAI"][:-10], mean[1, mask[1]][:-10].numpy(), atol=1e-5)
    assert np.isnan(responses[1]["FAI"][-10:]).all() and 0 <= overlap <= 1


def test_receiver_heads_are_those_looked_at_in_few_places(looked):
    model, ids, mask = looked
    looks = linkage.per_head(model, ids, mask, middle_layers(6))
    spiky = looks.fai.clone() * 0 + 0.01
    spiky[5, :, 20] = spiky[2, :, 15] = 1.0
    spiky += torch.rand(spiky.shape) * 0.01
    looks = looks._replace(fai=spiky)
    assert linkage.receiver_heads(looks, 2).nonzero()[:, 0].tolist() == [2, 5]
    allowed = torch.arange(len(spiky)) != 5
    assert not linkage.receiver_heads(looks, 2, allowed)[5] and linkage.receiver_heads(looks, 2, allowed)[2]
